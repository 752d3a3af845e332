"""The barrier of a decoder's heads as a penalty in someone's own training loop: value, gradient and sign share.

    mean over layers, heads, sequences and positions of b_i = -log|det J_i|,   J_i = I - C_i W_Q,   strict past,

identity values, in the names of jacobian.py, through det(I_p - scale Cov(W_Q u, k~)). It is the two-sided barrier: not
bounded below, so train with a weight prior (decay), and watch the share of negative signs: a step can jump the wall.

The accelerated sweep finds the gradient with the value. It does not cover capped logits: their layers take the
reference, position by position, whose weights and covariances are made again in the backward pass.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from prob_transformer._precision import at_least_float32
from prob_transformer._validation import require_embeddings
from prob_transformer.attention import Attention, Past
from prob_transformer.change_of_variables import residual_and_log_det_at
from prob_transformer.kernels.barrier import mean_barrier
from prob_transformer.kernels.cells import Cells
from prob_transformer.kernels.sweep import LogDet

# Positions a step of the reference.
_BLOCK = 32


class BarrierPenalty(NamedTuple):
    """Mean of b_i in nats () and the share of det J_i <= 0 (), over all layers, heads, sequences and positions."""

    mean: Float[Array, ""]
    negative_share: Float[Array, ""]


@partial(jax.jit, inline=True)
def _reference(layer: Attention, inputs: Float[Array, "... n d"]) -> LogDet:
    """Sign and log|det J_i| of every sequence, head and position, (b, H, n)."""

    def of_head(sequence: Float[Array, "n d"], head: Int[Array, ""]) -> LogDet:
        alone = layer.head_alone(head)
        past = Past.of(alone, sequence)

        @jax.checkpoint
        def at(position: Int[Array, ""]) -> LogDet:
            found = residual_and_log_det_at(alone, past.before(alone, position), sequence[position])
            return LogDet(found.sign, found.log_det)

        return jax.lax.map(at, jnp.arange(sequence.shape[0]), batch_size=_BLOCK)

    def of_sequence(sequence: Float[Array, "n d"]) -> LogDet:
        return jax.lax.map(partial(of_head, sequence), jnp.arange(layer.heads))

    return jax.lax.map(of_sequence, inputs.reshape(-1, *inputs.shape[-2:]))


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
        layer, inputs = at_least_float32((layer, inputs))
        places += inputs[..., 0].size * layer.heads
        if layer.cap is not None:
            sign, log_det = _reference(layer, inputs)
            total.append(-log_det.sum())
            negative.append((sign <= 0).sum(dtype=log_det.dtype))
            continue
        cells = Cells.of_heads_alone(layer, inputs).flat()
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
