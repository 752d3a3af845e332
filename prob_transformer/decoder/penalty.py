"""The barrier of a decoder's heads as a penalty in someone's own training loop: value, gradient and sign share.

    mean over layers, heads, sequences and positions of b_i = -log|det J_i|,   J_i = I - C_i W_Q,   strict past,

identity values, in the names of jacobian.py, through det(I_p - scale Cov(W_Q u, k~)). It is the two-sided barrier: not
bounded below, so train with a weight prior (decay), and watch the share of negative signs: a step can jump the wall.

The accelerated sweep finds the gradient with the value. Rotary positions turn its small matrices, and a window leaves
out the keys beyond it.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prob_transformer._precision import at_least_float32
from prob_transformer._validation import require_embeddings
from prob_transformer.accelerated.barrier import mean_barrier
from prob_transformer.accelerated.cells import DEFAULT_TILING, Cells, QueryMap
from prob_transformer.decoder.layer import DecoderAttention, Projected


class BarrierPenalty(NamedTuple):
    """Mean of b_i in nats () and the share of det J_i <= 0 (), over all layers, heads, sequences and positions."""

    mean: Float[Array, ""]
    negative_share: Float[Array, ""]


def _cells(layer: DecoderAttention, inputs: Float[Array, "... n d"]) -> Cells:
    """Every sequence and head as a cell (c, 1, p, n). A query's bias shifts its features, which no covariance sees."""
    projected = jax.vmap(lambda one: Projected.of(layer, one))(inputs.reshape(-1, *inputs.shape[-2:]))
    group, rotary = layer.group_of_head, layer.rotary

    def last(x: Float[Array, "b H n p"]) -> Float[Array, "c one p n"]:
        if rotary is not None:
            x = rotary.halves_first(x)
        return jnp.swapaxes(x.reshape(-1, 1, *x.shape[2:]), 2, 3)

    # The sweep divides logits and determinants by sqrt(p), whatever the layer's own scale.
    scale = layer.scale * layer.head_size**0.5
    queries, features = last(projected.queries) * scale, last(projected.plain_queries) * scale
    query_map = None
    if rotary is not None:
        angles = rotary.frequencies[:, None].astype(queries.dtype) * jnp.arange(inputs.shape[-2], dtype=queries.dtype)
        query_map = QueryMap(jnp.broadcast_to(angles, (queries.shape[0], *angles.shape)))
    return Cells(queries, last(projected.keys[:, group]), features, query_map)


def barrier_penalty(layers: Iterable[tuple[DecoderAttention, Float[Array, "... n d"]]]) -> BarrierPenalty:
    """Mean barrier of all heads of the layers, each with its normalised inputs (..., n, d), to be added to a loss.

    Differentiable in reverse mode in weights and inputs, under jit too; the gradient is not defined where det J_i = 0.
    Layers and inputs in bfloat16 or float16 are worked on in float32, which the mean has; gradients keep their dtypes.
    Identity values and the strict past, each head alone; value maps that a layer has are not used. Raises ValueError
    for inputs that do not fit, naming the layer, and for no layers. Equation: the module docstring; docs/own_model.md.
    """
    swept = defaultdict[tuple[Any, ...], list[Cells]](list)
    total, negative, places = [], [], 0
    for index, (layer, given) in enumerate(layers):
        try:
            inputs = require_embeddings("inputs", given, layer.width)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from None
        cells = _cells(*at_least_float32((layer, inputs)))
        places += cells.keys.shape[0] * cells.length
        shapes = tuple(x.shape[1:] for x in jax.tree.leaves(cells))
        swept[jax.tree.structure(cells), shapes, layer.window].append(cells)
    # Layers of one shape are one sweep: compiled once, whatever the depth.
    for (_, _, window), alike in swept.items():
        cells = jax.tree.map(lambda *x: jnp.concatenate(x), *alike)
        found = mean_barrier(cells, DEFAULT_TILING._replace(window=window))
        count = cells.keys.shape[0] * cells.length
        total.append(count * found.mean)
        negative.append(count * found.negative_share)
    if not places:
        raise ValueError("layers: got none; pass at least one attention layer with its inputs.")
    return BarrierPenalty(jnp.stack(total).sum() / places, jnp.stack(negative).sum() / places)
