"""Laplace's approximation: the Gaussian with the mode and the curvature of the posterior in coordinates z.

    p(z | y) ~ N(z; z*, P^-1),      P = d^2 U / dz^2  or its Gauss-Newton part, at z* = argmin U
    log p(y) ~ -U(z*) + k/2 log 2 pi - 1/2 log det P

U is NumPyro's potential, the negative log joint in unconstrained coordinates. Both are exact where U is quadratic. What
each structure keeps of P:

    full         all of it, O(k^2) memory and O(k^3) time
    diagonal     its diagonal, exactly; correlations are left out, so variances are too small
    kronecker    one Kronecker product a site, or a linear map of a network, beside the prior (kronecker)
    low-rank     the diagonal of the prior and the largest directions of the rest, without forming a matrix (low_rank)
    last-layer   of a network: all of it for the head, nothing for the other maps (last_layer)
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args, overload

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from prob_transformer._validation import require_choice, require_count
from prob_transformer.inference.gauge import REMEDY, gauges
from prob_transformer.inference.joint import key_and_seed
from prob_transformer.inference.laplace.curvature import (
    Curvature,
    Potential,
    curvature_diagonal,
    curvature_matrix,
)
from prob_transformer.inference.laplace.kronecker import Positions, sites_precision
from prob_transformer.inference.laplace.low_rank import DiagonalPrecision, low_rank_precision
from prob_transformer.inference.laplace.network import (
    NetworkLaplace,
    NetworkStructure,
    TrainedNetwork,
    network_laplace,
)
from prob_transformer.inference.laplace.precision import (
    DensePrecision,
    FlatDirectionsError,
    IndefiniteCurvatureError,
    Precision,
)
from prob_transformer.inference.laplace.result import LaplaceResult, require_small
from prob_transformer.inference.map import MapResult

Structure = Literal["full", "diagonal", "low-rank", "kronecker", "last-layer"]

# Powers of the rounding, as shares of the largest eigenvalue, below which the smallest may be that of a flat direction.
# At a mode found to a tolerance the Hessian's is of the size of the gradient; the prior's part of the other is exact.
_SUSPICIOUS: dict[Curvature, float] = {"hessian": 0.25, "ggn": 0.5}
_OF_A_MODEL = ("full", "diagonal", "low-rank", "kronecker")


def _require_mode(mode: MapResult) -> None:
    if not isinstance(mode, MapResult):
        raise ValueError(f"mode: got {type(mode).__name__}; pass the result of find_map, or a TrainedNetwork.")
    if not mode.converged:
        raise ValueError(
            f"mode: the search ended as {mode.status.name.lower()}, so this is no mode; mode.to_datatree() names the "
            "remedy."
        )
    if mode.space != "unconstrained":
        raise ValueError(
            f"mode: is one of the density in {mode.space} coordinates; call find_map with space='unconstrained', the "
            "coordinates in which the posterior is approximated."
        )


def _require_rank(rank: int | None, structure: Structure, size: int) -> None:
    if structure == "low-rank":
        require_count("rank", rank, 1, "structure='low-rank' keeps this many directions")
    elif rank is not None:
        raise ValueError(f"rank: got {rank} for structure {structure!r}; leave it out, or use 'low-rank'.")
    if rank is not None and rank > size:
        raise ValueError(f"rank: got {rank} for {size} parameters; pass at most that.")
    if structure == "full" or rank == size:
        require_small("structure", size)


@eqx.filter_jit
def _at_the_mean(potential: Potential) -> Float[Array, ""]:
    return potential.value(potential.centre())


def _require_identified(potential: Potential) -> None:
    """Refuse a curvature with directions that a rotation of two sites makes flat, in which no Gaussian exists."""
    pairs = gauges(
        lambda p: _at_the_mean(dataclasses.replace(potential, mean=dict(p))), potential.mean, potential.sites
    )
    found = [gauge for gauge in pairs if gauge.directions]
    if found:
        count = sum(gauge.directions for gauge in found)
        raise FlatDirectionsError(
            f"precision: not positive definite, with {count} flat directions, so the evidence is infinite: "
            f"{', '.join(map(str, found))}: {REMEDY}. Or hold one of the sites at the mode, by `sites`.",
            count,
        )


def _precision(potential: Potential, structure: Structure, curvature: Curvature, rank: int | None) -> Precision:
    if structure == "full":
        return DensePrecision(curvature_matrix(potential, curvature))
    if structure == "diagonal":
        return DiagonalPrecision(curvature_diagonal(potential, curvature))
    if structure == "kronecker":
        return sites_precision(potential, curvature)
    assert rank is not None
    return low_rank_precision(potential, curvature, rank)


@overload
def laplace(
    mode: MapResult,
    *,
    structure: Structure = ...,
    sites: Sequence[str] | None = ...,
    curvature: Curvature = ...,
    rank: int | None = ...,
    key: PRNGKeyArray | int | None = ...,
    draws: int = ...,
) -> LaplaceResult: ...


@overload
def laplace(
    mode: TrainedNetwork,
    *,
    structure: NetworkStructure,
    positions: Positions = ...,
    prior_precision: float | None = ...,
    key: PRNGKeyArray | int | None = ...,
) -> NetworkLaplace: ...


def laplace(
    mode: MapResult | TrainedNetwork,
    *,
    structure: Structure = "full",
    sites: Sequence[str] | None = None,
    curvature: Curvature = "hessian",
    rank: int | None = None,
    positions: Positions = "signs",
    prior_precision: float | None = None,
    key: PRNGKeyArray | int | None = None,
    draws: int = 1000,
) -> LaplaceResult | NetworkLaplace:
    """The Gaussian approximation of a posterior at its mode, with its log-evidence in nats.

    `mode` is what `find_map` returned in the unconstrained space: it has the model and its arguments. `sites` are those
    that are approximated, all by default; the others are held at the mode, and the evidence is then of the data
    together with their values, p(y, held). `rank` is for structure "low-rank" alone. The precision is factorised once;
    the model is compiled once for each structure, curvature and shapes: pass the same function, not a new closure.
    `key`, a JAX random key or an integer seed, and `draws` are those of the result's posterior and tree.

    Of a `TrainedNetwork` the structures are "last-layer" and "kronecker", and the curvature is Gauss-Newton.
    `prior_precision` is that of all weights, by default the one of the largest evidence; `positions` and `key`, by
    default 0, are those of the Kronecker factors (kronecker.py).

    Raises ValueError for a mode that did not converge or is of another space, and for unknown names, and
    IndefiniteCurvatureError, with the smallest eigenvalue and a remedy, for a precision that is not positive definite;
    FlatDirectionsError, one of these, names and counts the directions that are flat because two sites, W_Q and W_K,
    enter only up to a common rotation. "diagonal" and "kronecker" see no more of it than their entries or blocks.
    """
    of_network = isinstance(mode, TrainedNetwork)
    foreign = {"sites": sites, "rank": rank} if of_network else {"prior_precision": prior_precision}
    for option, given in foreign.items():
        if given is not None:
            raise ValueError(f"{option}: is no option for a {type(mode).__name__}; leave it out.")
    require_choice("structure", structure, get_args(NetworkStructure) if of_network else _OF_A_MODEL)
    require_choice("curvature", curvature, get_args(Curvature))
    if isinstance(mode, TrainedNetwork):
        random_key, _ = key_and_seed(0 if key is None else key, "the signs")
        return network_laplace(mode, structure, positions, prior_precision, random_key)
    _require_mode(mode)
    require_count("draws", draws, 1, "the number of draws")
    if key is not None:
        key_and_seed(key, "the draws")
    point = mode.unconstrained
    names = list(point) if sites is None else sites
    if not isinstance(names, (list, tuple)) or not names or len([x for x in point if x in names]) != len(names):
        raise ValueError(f"sites: got {sites!r}; pass different names out of the latent sites {sorted(point)}.")
    mean, held = {name: point[name] for name in names}, {name: point[name] for name in point if name not in names}
    potential = Potential(mode.model, mode.model_args, mode.model_kwargs, mean, held)
    size = potential.centre().shape[0]
    _require_rank(rank, structure, size)
    try:
        precision = _precision(potential, structure, curvature, rank)
    except IndefiniteCurvatureError:
        _require_identified(potential)
        raise
    spectrum = getattr(precision, "eigenvalues", getattr(precision, "ratios", None))
    if spectrum is not None and spectrum.size == size:
        smallest = jnp.finfo(spectrum.dtype).eps ** _SUSPICIOUS[curvature]
        if spectrum.min() <= smallest * spectrum.max():
            _require_identified(potential)
    log_evidence = -mode.objective + 0.5 * size * np.log(2 * np.pi) - 0.5 * float(precision.log_det)
    return LaplaceResult(mode, potential, precision, log_evidence, structure, curvature, rank, key, draws)
