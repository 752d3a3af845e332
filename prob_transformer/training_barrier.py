"""The barrier of a model's heads as a penalty in someone's own training loop: value, gradient and sign share.

    mean over layers, heads, sequences and positions of phi(det J_i),   J_i = I - Cov_alpha(u, g) W_Q,   strict past,

identity values, each head alone, through det(I_p - Cov(W_Q u, g)). phi is -log|det J_i|, two-sided and not bounded
below, so train with a weight prior (decay); or `one_sided_penalty`, zero where the margin is wide enough. Watch the
share of negative signs: a step can jump the wall.

The blocked sweep finds the gradient with the value. It does not cover capped logits: their layers take the reference,
position by position, whose weights and covariances are made again in the backward pass.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from prob_transformer._dtypes import in_common_type
from prob_transformer._validation import require_choice, require_key, require_positive
from prob_transformer.attention import Attention, Past, require_layer
from prob_transformer.barrier import one_sided_penalty
from prob_transformer.change_of_variables import residual_and_log_det, residual_and_log_det_at
from prob_transformer.kernels.barrier import BarrierPenalty, mean_barrier, subsampled_barrier
from prob_transformer.kernels.log_det import log_det
from prob_transformer.kernels.moments import LogDet
from prob_transformer.kernels.projections import Projections
from prob_transformer.kernels.sharding import (
    over_mesh,
    require_equal_shards,
    sharded_mean_barrier,
    sharded_subsampled_barrier,
)
from prob_transformer.kernels.tiling import DEFAULT_TILING, Tiling
from prob_transformer.margins import Values

Form = Literal["two-sided", "one-sided"]
# Positions a step of the reference.
_BLOCK = 32


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


def _penalty(form: Form, threshold: Float[Array, ""] | float, values: LogDet) -> BarrierPenalty:
    each = -values.log_det if form == "two-sided" else one_sided_penalty(*values, threshold)
    mean = each.mean()
    return BarrierPenalty(mean, (values.sign <= 0).mean(dtype=mean.dtype), jnp.zeros_like(mean))


def _spec(leading: tuple[int, ...]) -> PartitionSpec:
    """Sequences over "data" and heads, where there are several, over "heads", for the axes ([b,] H)."""
    heads = "heads" if leading[-1] > 1 else None
    return PartitionSpec("data", heads) if len(leading) > 1 else PartitionSpec(heads)


def _of_cells(
    cells: Projections,
    form: Form,
    threshold: Float[Array, ""] | float,
    share: float,
    mesh: Mesh | None,
    tiling: Tiling,
    key: PRNGKeyArray | None,
) -> BarrierPenalty:
    """Over cells (L, [b,] H, 1, p, n) of layers that are alike."""
    spec = PartitionSpec(None, *_spec(cells.queries.shape[1:-3]))
    if form == "one-sided":

        def values(cells: Projections) -> LogDet:
            found = log_det(cells.flat(), tiling)
            return LogDet(*(x.reshape(*cells.queries.shape[:-3], -1) for x in found))

        return _penalty(form, threshold, (values if mesh is None else over_mesh(values, mesh, spec, spec))(cells))
    if share < 1:
        assert key is not None
        if mesh is None:
            return subsampled_barrier(key, cells, share, tiling)
        return sharded_subsampled_barrier(key, cells, share, mesh, spec, tiling)
    if mesh is None:
        return mean_barrier(cells, tiling)
    return sharded_mean_barrier(cells, mesh, spec, tiling)


def barrier_penalty(
    layers: Iterable[tuple[Attention, Float[Array, "... _n _d"]]],
    *,
    form: Form = "two-sided",
    threshold: Float[Array, ""] | float = 0.5,
    values: Values = "identity",
    share: float = 1.0,
    key: PRNGKeyArray | None = None,
    mesh: Mesh | None = None,
    tiling: Tiling = DEFAULT_TILING,
) -> BarrierPenalty:
    """Mean barrier of all heads of the layers, each with its normalised inputs (..., n, d), to be added to a loss.

    Differentiable in reverse mode in weights and inputs, under jit too; the gradient is not defined where det J_i = 0.
    With a `share` below 1 mean and gradient are unbiased estimates from that share of heads and sequences, drawn by
    `key` for every block of positions. On a `mesh` with the axes "data" and "heads" every device sweeps its own.
    Layers and inputs in bfloat16 or float16 are worked on in float32, which the mean has; gradients keep their dtypes.
    The strict past; with `values` "identity" each head alone, and value maps that a layer has are not used; with "own"
    the heads of a layer jointly with its value maps, one determinant a position. Raises ValueError for inputs that do
    not fit, naming the layer, for no layers, and for arguments that do not go together.
    Equation: the module docstring; docs/own_model.md.
    """
    require_choice("form", form, get_args(Form))
    require_choice("values", values, get_args(Values))
    if values == "own" and (share < 1 or mesh is not None):
        raise ValueError("values: 'own' has no share and no mesh; leave share and mesh out.")
    require_positive("threshold", threshold)
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}; pass a share of the heads and sequences greater than 0 and at most 1.")
    if share < 1 and form == "one-sided":
        raise ValueError(f"share: got {share}; the one-sided penalty is taken over all heads and sequences.")
    if share < 1:
        require_key("key", key)
    # `jax.make_mesh` types its axes "explicit", which asks for inputs that are spread already; the sweep spreads them.
    mesh = None if mesh is None else Mesh(mesh.devices, mesh.axis_names)
    alike = defaultdict[Any, list[Projections]](list)
    found: list[tuple[int, BarrierPenalty]] = []
    for index, pair in enumerate(layers):
        try:
            layer, inputs = require_layer(pair)
            if inputs.size == 0:
                raise ValueError(f"inputs: has shape {inputs.shape}; pass at least one sequence.")
            if layer.cap is not None and (share < 1 or mesh is not None):
                raise ValueError("a layer with a cap has no share and no mesh; leave share and mesh out.")
            layer, inputs = in_common_type((layer, inputs))
            if inputs.ndim > 3:
                inputs = inputs.reshape(-1, *inputs.shape[-2:])
            if mesh is not None:
                leading = (*inputs.shape[:-2], layer.heads)
                require_equal_shards("sequences and heads", leading, mesh, _spec(leading))
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from None
        if values == "own":
            density = residual_and_log_det(layer, inputs, implementation="reference" if layer.cap else "blocked")
            found.append((inputs[..., 0].size, _penalty(form, threshold, LogDet(density.sign, density.log_det))))
            continue
        if layer.cap is not None:
            found.append((inputs[..., 0].size * layer.heads, _penalty(form, threshold, _reference(layer, inputs))))
            continue
        cells = Projections.of_heads_alone(layer, inputs)
        shapes = tuple(x.shape for x in jax.tree.leaves(cells))
        alike[jax.tree.structure(cells), shapes].append(cells)
    # Layers of one shape are one sweep: compiled once, whatever the depth.
    for number, several in enumerate(alike.values()):
        cells = jax.tree.map(lambda *x: jnp.stack(x), *several)
        own = None if key is None else jax.random.fold_in(key, number)
        found.append((cells.queries[..., 0, 0, :].size, _of_cells(cells, form, threshold, share, mesh, tiling, own)))
    if not found:
        raise ValueError("layers: got none; pass at least one attention layer with its inputs.")
    places = sum(count for count, _ in found)
    mean, negative_share = (
        jnp.stack([count * part[index] for count, part in found]).sum() / places for index in (0, 1)
    )
    variance = jnp.stack([count**2 * part.variance for count, part in found]).sum() / places**2
    return BarrierPenalty(mean, negative_share, variance)
