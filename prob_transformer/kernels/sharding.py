"""Cells spread over devices: every device sweeps its own, and only means and gradients of shared arrays are exchanged.

The mean over all cells is the mean over K equal shards of their own means, so no device needs the cells of another. A
`jax.sharding.PartitionSpec` over the leading axes says which cells are whose. Left to itself the compiler does not
find this: it cannot cut the loop over groups of cells, and gathers all of them on every device.

A subsampled barrier draws in every shard, with the key folded by the shard's number. Each shard's estimate is unbiased,
so their mean is; the draws are independent, so variances add:

    estimate = (1/K) sum_k estimate_k,      variance = (1/K^2) sum_k variance_k

Every shard draws two of its cells at least, so many small shards see more than the share asked for. The draw, not what
it estimates, depends on K.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PRNGKeyArray

from prob_transformer._dtypes import Result
from prob_transformer._validation import require_count
from prob_transformer.kernels.barrier import BarrierPenalty, mean_barrier, subsampled_barrier
from prob_transformer.kernels.projections import Projections
from prob_transformer.kernels.tiling import DEFAULT_TILING, Tiling


def mesh(data: int, heads: int) -> Mesh:
    """All devices, of all processes, as a data x heads mesh with axes "data" and "heads".

    Raises ValueError unless data * heads is the number of devices.
    """
    require_count("data", data, 1, "it counts devices along the sequences")
    require_count("heads", heads, 1, "it counts devices along the heads")
    devices = jax.devices()
    if data * heads != len(devices):
        raise ValueError(
            f"data, heads: got {data} * {heads} = {data * heads} for {len(devices)} devices; pass a product of "
            f"{len(devices)}, or start JAX with {data * heads} devices (virtual ones on a CPU: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={data * heads})."
        )
    return Mesh(np.asarray(devices).reshape(data, heads), ("data", "heads"))


def _named(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes over which a spec spreads."""
    return tuple(axis for entry in spec for axis in _named(entry))


def require_equal_shards(name: str, leading: tuple[int, ...], mesh: Mesh, spec: PartitionSpec) -> None:
    """Raises ValueError unless `spec` names axes of the mesh that divide the leading axes of an array evenly."""
    if len(spec) > len(leading):
        raise ValueError(f"spec: got {spec}; pass at most one entry for each of the leading axes {leading} of {name}.")
    for number, (length, entry) in enumerate(zip(leading, spec, strict=False)):
        unknown = [axis for axis in _named(entry) if axis not in mesh.axis_names]
        if unknown:
            raise ValueError(f"spec: names {', '.join(unknown)}; pass axes of the mesh: {', '.join(mesh.axis_names)}.")
        parts = math.prod(mesh.shape[axis] for axis in _named(entry))
        if length % parts:
            raise ValueError(
                f"{name}: axis {number} has length {length} for {parts} devices along {', '.join(_named(entry))}; "
                f"pass a multiple of {parts}, or another mesh."
            )


def over_mesh(
    function: Callable[..., Result],
    mesh: Mesh,
    in_specs: PartitionSpec | tuple[PartitionSpec, ...],
    out_specs: PartitionSpec,
) -> Callable[..., Result]:
    """`function` on every device's own part, as `in_specs` and `out_specs` say."""
    # Unchecked, because the loops of the sweep start from constants, which the checker takes for equal on all devices.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@partial(jax.jit, static_argnums=(1, 2, 3))
def sharded_mean_barrier(
    cells: Projections, mesh: Mesh, spec: PartitionSpec, tiling: Tiling = DEFAULT_TILING
) -> BarrierPenalty:
    """`mean_barrier` of cells (..., H, p, n) whose leading axes are spread over the mesh as `spec` says.

    Shards are of equal size (`require_equal_shards`). Mesh axes that the spec does not name repeat the work.
    """

    def one_shard(cells: Projections) -> BarrierPenalty:
        return lax.pmean(mean_barrier(cells, tiling), _axes(spec))

    return over_mesh(one_shard, mesh, spec, PartitionSpec())(cells)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def sharded_subsampled_barrier(
    key: PRNGKeyArray,
    cells: Projections,
    share: float,
    mesh: Mesh,
    spec: PartitionSpec,
    tiling: Tiling = DEFAULT_TILING,
) -> BarrierPenalty:
    """`subsampled_barrier` with a draw of its own in every shard: unbiased, and the variance is that of all draws.

    Shards as in `sharded_mean_barrier`. Equations: module docstring.
    """
    axes = _axes(spec)
    shards = math.prod(mesh.shape[axis] for axis in axes)

    def one_shard(key: PRNGKeyArray, cells: Projections) -> BarrierPenalty:
        own = jax.random.fold_in(key, lax.axis_index(axes))
        found = lax.pmean(subsampled_barrier(own, cells, share, tiling), axes)
        return found._replace(variance=found.variance / shards)

    return over_mesh(one_shard, mesh, (PartitionSpec(), spec), PartitionSpec())(key, cells)
