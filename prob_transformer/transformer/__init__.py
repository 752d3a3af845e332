"""The whole transformer: a deterministic map (network), text drawn from it, and the NumPyro model that it is part of.

Read in this order: network, decoding (windows and the cache), generation, window_margins.
"""

from prob_transformer.transformer.decoding import next_token_logits
from prob_transformer.transformer.generation import Generated, Sampled, generate, sample, stream
from prob_transformer.transformer.network import Transformer, TransformerConfig

__all__ = [
    "Generated",
    "Sampled",
    "Transformer",
    "TransformerConfig",
    "generate",
    "next_token_logits",
    "sample",
    "stream",
]
