"""Margins and support tokens of the attention layers of any trained decoder.

Read in this order: layer (what a layer is), moments, view, jacobian, determinant, support, margins.
"""

from prob_transformer.decoder.layer import DecoderAttention, Projected, Rotary
from prob_transformer.decoder.margins import LayerMargins, decoder_margins, layer_margins

__all__ = ["DecoderAttention", "LayerMargins", "Projected", "Rotary", "decoder_margins", "layer_margins"]
