"""The formula of straightforward.py in PyTorch, with its gradient by autograd. Needs the extra `benchmark`.

The einsum over three arrays is made in the same order as in JAX, for PyTorch too asks opt_einsum where that is
installed.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def weights(queries: Float[Tensor, "c p n"], keys: Float[Tensor, "c p n"]) -> Float[Tensor, "c n n"]:
    """Softmax of the logits over the strict past; all zero at the first position."""
    _, size, length = queries.shape
    logits = torch.einsum("cpi,cps->cis", queries, keys) / math.sqrt(size)
    past = torch.ones(length, length, dtype=torch.bool, device=logits.device).tril(-1)
    return torch.softmax(logits.masked_fill(~past, torch.finfo(logits.dtype).min), -1) * past


def log_det(queries: Float[Tensor, "c p n"], keys: Float[Tensor, "c p n"]) -> Float[Tensor, "c n"]:
    """log|det J_i| in nats at every position of every cell."""
    alpha = weights(queries, keys)
    mean_x = torch.einsum("cis,cas->cia", alpha, queries)
    mean_k = torch.einsum("cis,cas->cia", alpha, keys)
    moments = torch.einsum("cis,cas,cbs->ciab", alpha, queries, keys)
    covariance = moments - mean_x[..., :, None] * mean_k[..., None, :]
    size = queries.shape[1]
    identity = torch.eye(size, dtype=moments.dtype, device=moments.device)
    return torch.linalg.slogdet(identity - covariance / math.sqrt(size))[1]


def value_and_gradient(
    queries: Float[Tensor, "c p n"], keys: Float[Tensor, "c p n"]
) -> tuple[Float[Tensor, ""], tuple[Float[Tensor, "c p n"], Float[Tensor, "c p n"]]]:
    """The mean barrier and its gradient in queries and keys, which have to require one."""
    value = -log_det(queries, keys).mean()
    return value.detach(), torch.autograd.grad(value, (queries, keys))
