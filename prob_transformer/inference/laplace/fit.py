"""Laplace's approximation: the Gaussian with the mode and the curvature of the posterior in coordinates z.

    p(z | y) ~ N(z; z*, P^-1),      P = d^2 U / dz^2  or its Gauss-Newton part, at z* = argmin U
    log p(y) ~ -U(z*) + k/2 log 2 pi - 1/2 log det P

U is NumPyro's potential, the negative log joint in unconstrained coordinates. Both are exact where U is quadratic. What
each structure keeps of P:

    full         all of it, O(k^2) memory and O(k^3) time
    diagonal     its diagonal, exactly; correlations are left out, so variances are too small
    kronecker    one Kronecker product a site, beside the diagonal of the prior (blockwise)
    low-rank     the diagonal of the prior and the largest directions of the rest, without forming a matrix (low_rank)
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prob_transformer._validation import require_count
from prob_transformer.inference.gauge import REMEDY, gauges
from prob_transformer.inference.joint import require_data
from prob_transformer.inference.laplace.blockwise import ScaledKroneckerPrecision, nearest_kronecker
from prob_transformer.inference.laplace.curvature import (
    Curvature,
    block_of,
    curvature_product,
    diagonal_of,
    rest_product,
)
from prob_transformer.inference.laplace.low_rank import LowRankPrecision, largest_eigenpairs
from prob_transformer.inference.laplace.potential import Potential
from prob_transformer.inference.laplace.precision import (
    BlockPrecision,
    DensePrecision,
    DiagonalPrecision,
    FlatDirectionsError,
    IndefiniteCurvatureError,
    Precision,
    require_definite,
)
from prob_transformer.inference.laplace.result import LaplaceResult, require_small
from prob_transformer.inference.map import MapResult

# Powers of the rounding, as shares of the largest eigenvalue, below which the smallest may be that of a flat direction.
# At a mode found to a tolerance the Hessian's is of the size of the gradient; the prior's part of the other is exact.
_SUSPICIOUS: dict[Curvature, float] = {"hessian": 0.25, "ggn": 0.5}

Structure = Literal["full", "diagonal", "low-rank", "kronecker"]


@eqx.filter_jit
def _matrix(potential: Potential, curvature: Curvature) -> Float[Array, "k k"]:
    z = potential.centre()
    return block_of(curvature_product(potential, curvature), z, 0, z.shape[0])


@eqx.filter_jit
def _diagonal(potential: Potential, curvature: Curvature) -> Float[Array, " k"]:
    return diagonal_of(curvature_product(potential, curvature), potential.centre())


@eqx.filter_jit
def _prior_diagonal(potential: Potential) -> Float[Array, " k"]:
    return diagonal_of(rest_product(potential), potential.centre())


@eqx.filter_jit
def _scaled_product(
    potential: Potential, curvature: Curvature, root: Float[Array, " k"], v: Float[Array, " k"]
) -> Float[Array, " k"]:
    return curvature_product(potential, curvature)(v / root) / root - v


@eqx.filter_jit
def _site_blocks(potential: Potential, curvature: Curvature) -> list[Float[Array, "b b"]]:
    product, z = curvature_product(potential, curvature), potential.centre()
    edges = np.cumsum([0, *(potential.mode[name].size for name in potential.sites)]).tolist()
    return [block_of(product, z, low, high) for low, high in pairwise(edges)]


@eqx.filter_jit
def _value(potential: Potential) -> Float[Array, ""]:
    z = potential.centre()
    for name, site in potential.trace(z).items():
        # Products with the Hessian are linear maps here, and JAX cannot make one of the gradient of a blocked sweep.
        if getattr(site.get("fn"), "implementation", None) == "blocked":
            raise ValueError(
                f"model: site {name!r} has implementation='blocked', whose gradient cannot be linearised; pass "
                "implementation='reference', which has the same density, here (not necessarily to find_map)."
            )
    return potential.value(z)


def _finite(array: Float[Array, "..."]) -> Float[Array, "..."]:
    if not np.isfinite(np.asarray(array)).all():
        raise ValueError(
            "curvature: is NaN or inf at the mode, though the potential is finite there; the model has no second "
            "derivative at this point (a kink, or a square root at 0)."
        )
    return array


def _full(potential: Potential, curvature: Curvature, rank: int | None) -> Precision:
    return DensePrecision(_finite(_matrix(potential, curvature)))


def _diagonal_only(potential: Potential, curvature: Curvature, rank: int | None) -> Precision:
    return DiagonalPrecision(_finite(_diagonal(potential, curvature)))


def _low_rank(potential: Potential, curvature: Curvature, rank: int | None) -> Precision:
    base = require_definite(_finite(_prior_diagonal(potential)), "smallest diagonal entry of the prior")
    size, root = base.shape[0], jnp.sqrt(base)
    require_count("rank", rank, 1, "structure='low-rank' keeps this many directions")
    assert rank is not None
    if rank > size:
        raise ValueError(f"rank: got {rank} for {size} parameters; pass at most that.")
    if rank == size:
        remainder = _finite(_matrix(potential, curvature)) / root / root[:, None] - jnp.eye(size, dtype=base.dtype)
        gains, vectors = jnp.linalg.eigh(remainder)
        return LowRankPrecision(base, vectors, gains)

    def product(v: np.ndarray) -> np.ndarray:
        return np.asarray(_finite(_scaled_product(potential, curvature, root, jnp.asarray(v, base.dtype))))

    values, directions = largest_eigenpairs(product, size, rank, base.dtype)
    return LowRankPrecision(base, jnp.asarray(directions, base.dtype), jnp.asarray(values, base.dtype))


def _kronecker(potential: Potential, curvature: Curvature, rank: int | None) -> Precision:
    base = require_definite(_finite(_prior_diagonal(potential)), "smallest diagonal entry of the prior")
    blocks: list[Precision] = []
    start = 0
    for name, block in zip(potential.sites, _site_blocks(potential, curvature), strict=True):
        shape = potential.mode[name].shape
        rows, size = int(np.prod(shape[:-1])), block.shape[0]
        # The nearest product of an indefinite block may be definite: the block itself is what is judged.
        require_definite(jnp.linalg.eigvalsh(_finite(block)), f"smallest eigenvalue at site {name!r}", size=size)
        own = base[start : start + size]
        root = jnp.sqrt(own)
        factors = nearest_kronecker(block / root / root[:, None] - jnp.eye(size, dtype=block.dtype), rows)
        blocks.append(ScaledKroneckerPrecision(own.reshape(rows, size // rows), *factors))
        start += size
    return BlockPrecision(blocks)


_BUILD: dict[Structure, Callable[[Potential, Curvature, int | None], Precision]] = {
    "full": _full,
    "diagonal": _diagonal_only,
    "low-rank": _low_rank,
    "kronecker": _kronecker,
}


def _require_mode(at: MapResult) -> None:
    if not isinstance(at, MapResult):
        raise ValueError(f"at: got {type(at).__name__}; pass the result of find_map.")
    if not at.converged:
        raise ValueError(
            f"at: the search ended as {at.status.name.lower()}, so this is no mode; at.to_datatree() names the remedy."
        )
    if at.space != "unconstrained":
        raise ValueError(
            f"at: is a mode of the density in {at.space} coordinates; call find_map with space='unconstrained', the "
            "coordinates in which the posterior is approximated."
        )


def _require_sites(sites: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    chosen = known if sites is None else sites
    unknown = sorted(set(chosen) - set(known))
    if isinstance(chosen, str) or unknown or not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"sites: got {sites!r}; pass different names out of the latent sites {sorted(known)}.")
    return tuple(sorted(chosen))


def _require_identified(potential: Potential) -> None:
    """Refuse a curvature with directions that a rotation of two sites makes flat, in which no Gaussian exists."""

    def value(point: Mapping[str, Float[Array, "..."]]) -> Float[Array, ""]:
        return _value(eqx.tree_at(lambda p: p.mode, potential, dict(point)))

    found = [gauge for gauge in gauges(value, potential.mode, potential.sites) if gauge.directions]
    if found:
        count = sum(gauge.directions for gauge in found)
        raise FlatDirectionsError(
            f"precision: not positive definite, with {count} flat directions, so the evidence is infinite: "
            f"{', '.join(map(str, found))}: {REMEDY}. Or hold one of the sites at the mode, by `sites`.",
            count,
        )


def laplace(
    model: Callable,
    *args: Any,
    at: MapResult,
    structure: Structure = "full",
    sites: Sequence[str] | None = None,
    curvature: Curvature = "hessian",
    rank: int | None = None,
    **kwargs: Any,
) -> LaplaceResult:
    """The Gaussian approximation of a NumPyro model's posterior at a mode, with its log-evidence in nats.

    `at` is what `find_map` returned in the unconstrained space for the same model, `args` and `kwargs`. `sites` are
    those that are approximated, all by default; the others are held at the mode, and the evidence is then of the data
    together with their values, p(y, held). `rank` is for structure "low-rank" alone. The precision is factorised once;
    the model is compiled once for each structure, curvature and shapes: pass the same function, not a new closure.

    Raises ValueError for a mode that did not converge, is of another space or belongs to other data, for unknown names
    and empty data, and IndefiniteCurvatureError, with the smallest eigenvalue and a remedy, for a precision that is not
    positive definite; FlatDirectionsError, one of these, names and counts the directions that are flat because two
    sites, W_Q and W_K, enter only up to a common rotation. "diagonal" and "kronecker" see no more of it than their
    entries or blocks.
    """
    _require_mode(at)
    for option, given, choices in (("structure", structure, Structure), ("curvature", curvature, Curvature)):
        if given not in get_args(choices):
            raise ValueError(f"{option}: got {given!r}; pass one of {', '.join(get_args(choices))}.")
    if rank is not None and structure != "low-rank":
        raise ValueError(f"rank: got {rank} for structure {structure!r}; leave it out, or use 'low-rank'.")
    require_data(args, kwargs)
    potential = Potential(model, args, kwargs, dict(at.unconstrained), _require_sites(sites, list(at.unconstrained)))
    size = potential.centre().shape[0]
    if structure == "full" or rank == size:
        require_small("structure", size)
    value = _value(potential)
    objective = float(value)
    if not abs(objective - at.objective) <= np.sqrt(jnp.finfo(value.dtype).eps) * (1 + abs(at.objective)):
        raise ValueError(
            f"at: the model is at {objective:.6g} nats there, and {at.objective:.6g} when the mode was found; pass the "
            "same model, arguments and data as to find_map."
        )
    try:
        precision = _BUILD[structure](potential, curvature, rank)
    except IndefiniteCurvatureError:
        _require_identified(potential)
        raise
    spectrum = getattr(precision, "eigenvalues", getattr(precision, "ratios", None))
    if spectrum is not None and spectrum.size == size:
        smallest = jnp.finfo(spectrum.dtype).eps ** _SUSPICIOUS[curvature]
        if spectrum.min() <= smallest * spectrum.max():
            _require_identified(potential)
    log_evidence = -objective + 0.5 * size * np.log(2 * np.pi) - 0.5 * float(precision.log_det)
    return LaplaceResult(
        potential=potential,
        precision=precision,
        log_evidence=log_evidence,
        structure=structure,
        curvature=curvature,
        rank=rank,
        at=at,
    )
