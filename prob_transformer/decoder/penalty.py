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
from prob_transformer.accelerated.cells import Cells
from prob_transformer.attention import Attention


class BarrierPenalty(NamedTuple):
    """Mean of b_i in nats () and the share of det J_i <= 0 (), over all layers, heads, sequences and positions."""

    mean: Float[Array, ""]
    negative_share: Float[Array, ""]


def barrier_penalty(layers: Iterable[tuple[Attention, Float[Array, "... n d"]]]) -> BarrierPenalty:
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
        cells = Cells.of_heads_alone(*at_least_float32((layer, inputs))).flat()
        places += cells.keys.shape[0] * cells.length
        shapes = tuple(x.shape[1:] for x in jax.tree.leaves(cells))
        swept[jax.tree.structure(cells), shapes].append(cells)
    # Layers of one shape are one sweep: compiled once, whatever the depth.
    for alike in swept.values():
        cells = jax.tree.map(lambda *x: jnp.concatenate(x), *alike)
        found = mean_barrier(cells)
        count = cells.keys.shape[0] * cells.length
        total.append(count * found.mean)
        negative.append(count * found.negative_share)
    if not places:
        raise ValueError("layers: got none; pass at least one attention layer with its inputs.")
    return BarrierPenalty(jnp.stack(total).sum() / places, jnp.stack(negative).sum() / places)
