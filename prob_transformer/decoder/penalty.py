"""The barrier of a decoder's heads as a penalty in someone's own training loop: value, gradient and sign share.

    mean over layers, heads, sequences and positions of b_i = -log|det J_i|,   J_i = I - C_i W_Q,   strict past,

identity values, in the names of jacobian.py, through det(I_p - scale Cov(W_Q u, k~)). It is the two-sided barrier: not
bounded below, so train with a weight prior (decay), and watch the share of negative signs: a step can jump the wall.

Layers without rotary positions and windows go to the accelerated sweep, which finds the gradient with the value. Others
take the form below, whose weights and covariances are made again in the backward pass instead of being kept.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prob_transformer._validation import require_embeddings
from prob_transformer.accelerated.barrier import mean_barrier
from prob_transformer.accelerated.cells import Cells
from prob_transformer.accelerated.sweep import LogDet
from prob_transformer.decoder.layer import DecoderAttention, Projected, at_least_float32
from prob_transformer.decoder.moments import visible_past

# Positions a step: (block, n, p) of centred keys and features are alive at once.
_BLOCK = 32


class BarrierPenalty(NamedTuple):
    """Mean of b_i in nats () and the share of det J_i <= 0 (), over all layers, heads, sequences and positions."""

    mean: Float[Array, ""]
    negative_share: Float[Array, ""]


def _sequences(layer: DecoderAttention, inputs: Float[Array, "... n d"]) -> Projected:
    """Projections of every sequence, keys repeated for each head: (b, H, n, p)."""
    found = jax.vmap(lambda one: Projected.of(layer, one))(inputs.reshape(-1, *inputs.shape[-2:]))
    group = layer.group_of_head
    return found._replace(plain_keys=found.plain_keys[:, group], keys=found.keys[:, group])


def _cells(layer: DecoderAttention, inputs: Float[Array, "... n d"]) -> Cells:
    """Every sequence and head as a cell (c, 1, p, n). A query's bias shifts its features, which no covariance sees."""
    projected = _sequences(layer, inputs)

    def last(x: Float[Array, "b H n p"]) -> Float[Array, "c one p n"]:
        return jnp.swapaxes(x.reshape(-1, 1, *x.shape[2:]), 2, 3)

    # The sweep divides logits and determinants by sqrt(p), whatever the layer's own scale.
    queries = last(projected.queries) * (layer.scale * layer.head_size**0.5)
    return Cells(queries, last(projected.keys), queries)


def _general(layer: DecoderAttention, inputs: Float[Array, "... n d"]) -> LogDet:
    """Sign and log|det J_i| of every sequence, head and position, (c, n)."""
    length = inputs.shape[-2]
    block = min(_BLOCK, length)
    starts = jnp.arange(0, length, block)

    @jax.checkpoint
    def of_block(
        start: Int[Array, ""],
        features: Float[Array, "n p"],
        queries: Float[Array, "m p"],
        keys: Float[Array, "n p"],
    ) -> LogDet:
        positions = start + jnp.arange(block)
        here = jax.lax.dynamic_slice_in_dim(queries, start, block)
        visible = visible_past(layer.window, positions, length)
        # Finite, and 0 in the end where nothing is visible, so that no gradient meets inf - inf.
        logits = jnp.where(visible, layer.scale * here @ keys.T, jnp.finfo(keys.dtype).min / 2)
        weights = jax.nn.softmax(logits, axis=-1) * visible
        left = features - (weights @ features)[:, None]
        right = keys - (weights @ keys)[:, None]
        covariance = jnp.einsum("bsf,bsp->bfp", left * weights[:, :, None], right)
        seen = layer.scale * layer.turn(covariance, positions[:, None], backwards=True)
        return LogDet(*jnp.linalg.slogdet(jnp.eye(seen.shape[-1], dtype=seen.dtype) - seen))

    def of_head(parts: tuple[Array, Array, Array]) -> LogDet:
        features, queries, keys = parts
        # Rows after the last fill the last block, and are cut off again.
        queries = jnp.pad(queries, [(0, -length % block), (0, 0)])
        found = jax.lax.map(lambda start: of_block(start, features, queries, keys), starts)
        return LogDet(*(x.reshape(-1)[:length] for x in found))

    projected = _sequences(layer, inputs)
    heads = (projected.plain_queries, projected.queries, projected.keys)
    return jax.lax.map(of_head, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), heads))


def barrier_penalty(layers: Iterable[tuple[DecoderAttention, Float[Array, "... n d"]]]) -> BarrierPenalty:
    """Mean barrier of all heads of the layers, each with its normalised inputs (..., n, d), to be added to a loss.

    Differentiable in reverse mode in weights and inputs, under jit too; the gradient is not defined where det J_i = 0.
    Layers and inputs in bfloat16 or float16 are worked on in float32, which the mean has; gradients keep their dtypes.
    Identity values and the strict past, each head alone; value maps that a layer has are not used. Raises ValueError
    for inputs that do not fit, naming the layer, and for no layers. Equation: the module docstring; docs/own_model.md.
    """
    swept = defaultdict[tuple[int, ...], list[Cells]](list)
    total, negative, places = [], [], 0
    for index, (layer, given) in enumerate(layers):
        try:
            inputs = require_embeddings("inputs", given, layer.width)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from None
        layer, inputs = at_least_float32((layer, inputs))
        places += inputs[..., 0].size * layer.heads
        if layer.rotary is None and layer.window is None:
            cells = _cells(layer, inputs)
            swept[cells.keys.shape].append(cells)
        else:
            sign, log_det = _general(layer, inputs)
            total.append(-log_det.sum())
            negative.append((sign <= 0).sum(dtype=log_det.dtype))
    # Layers of one shape are one sweep: compiled once, whatever the depth.
    for alike in swept.values():
        cells = jax.tree.map(lambda *x: jnp.concatenate(x), *alike)
        found, count = mean_barrier(cells), cells.keys.shape[0] * cells.length
        total.append(count * found.mean)
        negative.append(count * found.negative_share)
    if not places:
        raise ValueError("layers: got none; pass at least one attention layer with its inputs.")
    return BarrierPenalty(jnp.stack(total).sum() / places, jnp.stack(negative).sum() / places)
