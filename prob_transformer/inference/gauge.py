"""Pairs of sites that the joint density only depends on up to a rotation of both: W_Q and W_K of an attention.

    W_Q -> G W_Q,  W_K -> G W_K  with G orthogonal, (p, p),  leaves A = W_K^T W_Q / sqrt(p) as it is

and with it the likelihood; a normal prior that is the same for every row is left as it is too. So p (p - 1) / 2
directions a head are flat, the posterior is constant along them, and W_Q and W_K are not identified, while A is. Such
pairs are recognised by the density itself, not by their names: two sites of one shape (..., p, d) whose potential is
the same after random rotations of both, one for every head. The rotations are tried a little away from the mode,
because every rotation leaves a weight alone that is 0 there.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_ROTATIONS = 2
# Standard deviations of the noise added to every site, tried in order until the potential is finite.
_MOVES = (0.3, 0.03, 0.0)


class Gauge(NamedTuple):
    """Two sites that rotate together, and how many directions at the point looked at are flat because of it."""

    sites: tuple[str, str]
    directions: int

    def __str__(self) -> str:
        return f"{self.sites[0]!r} and {self.sites[1]!r} ({self.directions} flat directions)"


REMEDY = (
    "the density is the same after any rotation of the rows of both, so they are not identified, and their interaction "
    "W_K^T W_Q / sqrt(p) is: record it with numpyro.deterministic('interaction', attention.interaction), as "
    "sampled_attention does, or give the interaction A itself a prior, with "
    "Attention(sqrt(d) * A[None], jnp.eye(d)[None])"
)


def _directions(query: Float[np.ndarray, "... p d"], key: Float[np.ndarray, "... p d"]) -> int:
    """The dimension of the orbit of (W_Q, W_K) under rotations, over all heads.

    Where a head's [W_Q W_K] has rank r, rotations of the other p - r dimensions leave it as it is: p (p - 1) / 2 less
    (p - r) (p - r - 1) / 2 directions are left.
    """
    stacked = np.concatenate([query, key], -1).astype(float)
    size, largest = stacked.shape[-2], np.abs(stacked).max((-2, -1))
    # What an optimiser leaves of a 0: beside larger weights single precision at most, and where all are 0 the root of a
    # rounding, because the potential is flat to second order there.
    zero = max(1e-6, float(jnp.finfo(query.dtype).eps) ** 0.5)
    kept = size - np.linalg.matrix_rank(stacked, tol=np.maximum(1e-4 * largest, zero))
    return int((size * (size - 1) // 2 - kept * (kept - 1) // 2).sum())


def gauges(
    potential: Callable[[Mapping[str, Float[Array, "..."]]], Float[Array, ""]],
    point: Mapping[str, Float[Array, "..."]],
    sites: tuple[str, ...],
) -> tuple[Gauge, ...]:
    """Pairs out of `sites` that rotate together, judged by the potential in nats at the unconstrained `point`."""
    candidates = sorted(name for name in sites if jnp.ndim(point[name]) >= 2)
    pairs = [pair for pair in combinations(candidates, 2) if point[pair[0]].shape == point[pair[1]].shape]
    if not pairs:
        return ()
    rng = np.random.default_rng(0)
    noise = {name: rng.normal(size=jnp.shape(value)) for name, value in point.items()}
    for size in _MOVES:
        moved = {name: jnp.asarray(value + size * noise[name], value.dtype) for name, value in point.items()}
        here = float(potential(moved))
        if np.isfinite(here):
            break

    def rotate_together(pair: tuple[str, str]) -> bool:
        allowed = float(jnp.finfo(moved[pair[0]].dtype).eps) ** 0.75 * (1 + abs(here))
        *batch, size, _ = moved[pair[0]].shape
        drawn = [np.random.default_rng(seed).normal(size=(*batch, size, size)) for seed in range(_ROTATIONS)]
        # Random orthogonal matrices for every head: reflections where p is 1.
        turns = [np.linalg.qr(each).Q if size > 1 else -np.ones_like(each) for each in drawn]
        turned = [{name: jnp.asarray(turn @ moved[name], moved[name].dtype) for name in pair} for turn in turns]
        return all(abs(float(potential({**moved, **sites})) - here) <= allowed for sites in turned)

    together = filter(rotate_together, pairs)
    return tuple(Gauge(pair, _directions(*(np.asarray(point[name]) for name in pair))) for pair in together)
