"""The whole transformer: a deterministic map, and the generative NumPyro model that it is part of.

Read in this order: network, token_process, weight_sites, numpyro_model.
"""

from prob_transformer.transformer.network import Transformer, TransformerConfig
from prob_transformer.transformer.numpyro_model import HeadBarrier, transformer_model
from prob_transformer.transformer.token_process import TokenProcess
from prob_transformer.transformer.weight_sites import default_priors, weights_of, with_weights

__all__ = [
    "HeadBarrier",
    "TokenProcess",
    "Transformer",
    "TransformerConfig",
    "default_priors",
    "transformer_model",
    "weights_of",
    "with_weights",
]
