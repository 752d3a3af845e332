"""The whole transformer: a deterministic map, text drawn from it, and the generative NumPyro model that it is part of.

Read in this order: network, decoding (windows and the cache), generation, window_margins, token_process, weight_sites,
numpyro_model.
"""

from prob_transformer.transformer.decoding import next_token_logits
from prob_transformer.transformer.generation import generate, sample, stream
from prob_transformer.transformer.network import Transformer, TransformerConfig
from prob_transformer.transformer.numpyro_model import HeadBarrier, transformer_model
from prob_transformer.transformer.token_process import TokenProcess
from prob_transformer.transformer.weight_sites import default_priors, with_weights

__all__ = [
    "HeadBarrier",
    "TokenProcess",
    "Transformer",
    "TransformerConfig",
    "default_priors",
    "generate",
    "next_token_logits",
    "sample",
    "stream",
    "transformer_model",
    "with_weights",
]
