"""The whole transformer: a deterministic map (network), and the NumPyro model that it is part of.

Read in this order: network.
"""

from prob_transformer.transformer.network import Transformer, TransformerConfig

__all__ = ["Transformer", "TransformerConfig"]
