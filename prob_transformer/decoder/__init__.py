"""Margins and support tokens of the attention layers of any trained decoder.

Read in this order: layer (what a layer is), moments, view, jacobian, determinant, support, margins, penalty.
"""

from prob_transformer.decoder.margins import LayerMargins, decoder_margins, layer_margins
from prob_transformer.penalty import BarrierPenalty, barrier_penalty

__all__ = [
    "BarrierPenalty",
    "LayerMargins",
    "barrier_penalty",
    "decoder_margins",
    "layer_margins",
]
