"""Causal self-attention as a generative stochastic process: exact likelihood, barrier prior, stability margins.

Read in this order: attention, change_of_variables, sampling, embedding_process, barrier, margins, certified_radius,
token_model, map_objectives; training_barrier for training, and self_inclusion for layers as decoders have them.
"""

from prob_transformer import _moved as _moved
from prob_transformer.attention import Attention
from prob_transformer.barrier import barrier, one_sided_barrier, one_sided_penalty
from prob_transformer.certified_radius import certified_radius
from prob_transformer.change_of_variables import (
    attention_mean,
    jacobian_block,
    residual_and_log_det,
)
from prob_transformer.embedding_process import EmbeddingProcess
from prob_transformer.kernels.conditioning import conditioning_margin
from prob_transformer.logits import RMSNorm, Rotary
from prob_transformer.map_objectives import map_objective, weight_prior
from prob_transformer.margins import (
    decoder_margins,
    layer_margins,
    stability_margin,
    support_tokens,
)
from prob_transformer.root_finder import ImplicitSolveError, SolveStatus
from prob_transformer.sampling import CausalAttentionTransform, named_solve_errors
from prob_transformer.token_model import LinearDecoder, sampled_attention, token_model
from prob_transformer.training_barrier import barrier_penalty

__version__ = "0.2.0"

__all__ = [
    "Attention",
    "CausalAttentionTransform",
    "EmbeddingProcess",
    "ImplicitSolveError",
    "LinearDecoder",
    "RMSNorm",
    "Rotary",
    "SolveStatus",
    "attention_mean",
    "barrier",
    "barrier_penalty",
    "certified_radius",
    "conditioning_margin",
    "decoder_margins",
    "jacobian_block",
    "layer_margins",
    "map_objective",
    "named_solve_errors",
    "one_sided_barrier",
    "one_sided_penalty",
    "residual_and_log_det",
    "sampled_attention",
    "stability_margin",
    "support_tokens",
    "token_model",
    "weight_prior",
]
