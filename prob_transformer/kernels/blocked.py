"""The change of variables at scale: the numbers of `prob_transformer.change_of_variables`, blocked and batched.

Residual and log-determinants never hold (n, p, p) or (n, n) for more than one block of queries at a time, forwards or
backwards; memory grows linearly with n. docs/accelerated.md derives the gradient and lists what was measured.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prob_transformer._dtypes import ranks_promoted
from prob_transformer._implementation import ResidualAndLogDet
from prob_transformer.attention import Attention
from prob_transformer.kernels.log_det import log_det
from prob_transformer.kernels.moments import block_weights
from prob_transformer.kernels.projections import Projections
from prob_transformer.kernels.tiling import DEFAULT_TILING, Tiling, padded


@ranks_promoted
def _blocked_mean(
    attention: Attention, cells: Projections, embeddings: Float[Array, "c n d"], tiling: Tiling
) -> Float[Array, "c n d"]:
    length = embeddings.shape[1]
    tiling = tiling.fitted(length)
    queries, keys, attended = padded(tiling, (cells.queries, cells.keys, jnp.swapaxes(embeddings, 1, 2)))
    attended = jnp.swapaxes(attended, 1, 2)
    values = None if attention.value is None else attention.value_maps(jnp.eye(attention.width, dtype=embeddings.dtype))

    # Recomputed in the backward pass: its weights over all keys are what must not be stored.
    @jax.checkpoint
    def one_block(start: Int[Array, ""], queries: Array, keys: Array, attended: Array) -> Float[Array, "c b d"]:
        here = jax.lax.dynamic_slice_in_dim(queries, start, tiling.block, 3)
        means = jnp.einsum("chsb,csd->chbd", block_weights(here, keys, start, attention.window).all, attended)
        if attention.value is None:
            return means[:, 0]
        return jnp.einsum("hde,chbe->cbd", values, means)

    starts = jnp.arange(0, attended.shape[1], tiling.block)
    blocks = jax.lax.map(lambda start: one_block(start, queries, keys, attended), starts)
    return jnp.moveaxis(blocks, 0, 1).reshape(attended.shape)[:, :length]


@partial(jax.jit, static_argnums=2)
def attention_mean(
    attention: Attention, embeddings: Float[Array, "... n d"], tiling: Tiling = DEFAULT_TILING
) -> Float[Array, "... n d"]:
    """mu_i at every position, as `prob_transformer.attention_mean`, of arguments that it has checked."""
    flat = embeddings.reshape(-1, *embeddings.shape[-2:])
    return _blocked_mean(attention, Projections.of(attention, flat), flat, tiling).reshape(embeddings.shape)


@partial(jax.jit, static_argnums=2)
def residual_and_log_det(
    attention: Attention, embeddings: Float[Array, "... n d"], tiling: Tiling = DEFAULT_TILING
) -> ResidualAndLogDet:
    """Residual e_i, sign(det J_i) and log|det J_i| in nats at every position of embeddings (..., n, d).

    As `prob_transformer.residual_and_log_det`, which checks its arguments and casts them to one dtype; the gradient is
    reverse mode only, and not defined on the boundary itself, where the sign is 0. Raises ValueError for a tiling that
    does not fit, and for a layer with a cap.
    """
    flat = embeddings.reshape(-1, *embeddings.shape[-2:])
    cells = Projections.of(attention, flat)
    sign, values = log_det(cells, tiling)
    residual = flat - _blocked_mean(attention, cells, flat, tiling)
    shape = embeddings.shape[:-1]
    return ResidualAndLogDet(residual.reshape(embeddings.shape), sign.reshape(shape), values.reshape(shape))
