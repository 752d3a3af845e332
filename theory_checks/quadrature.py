"""Integrals of densities in one to three dimensions with error estimates, and the expected number of roots in one.

The two answer the same question in different ways: the mass of N(e(u)) |det J(u)| needs the determinant, the expected
number of roots of e(u) = eps needs only e.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import ndtr

# Gauss-Kronrod 7-15 on [-1, 1]: nodes and weights for x >= 0, and the Gauss weights of every second node.
_NODES = (
    0.991455371120812639206854697526329,
    0.949107912342758524526189684047851,
    0.864864423359769072789712788640926,
    0.741531185599394439863864773280788,
    0.586087235467691130294144691693013,
    0.405845151377397166906606412076961,
    0.207784955007898467600689403773245,
    0.0,
)
_KRONROD = (
    0.022935322010529224963732008058970,
    0.063092092629978553290700663189204,
    0.104790010322250183839876322541518,
    0.140653259715525918745189590510238,
    0.169004726639267902826583426598550,
    0.190350578064785409913256402421014,
    0.204432940075298892414161999234649,
    0.209482141084727828012999174891714,
)
_GAUSS = (
    0.129484966168869693270611432679082,
    0.279705391489276667901467771423780,
    0.381830050505118944950369775488975,
    0.417959183673469387755102040816327,
)


def _rule() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    nodes = np.array([-x for x in _NODES[:-1]] + list(reversed(_NODES)))
    kronrod = np.array(_KRONROD[:-1] + tuple(reversed(_KRONROD)))
    gauss = np.zeros(15)
    gauss[1::2] = _GAUSS[:-1] + tuple(reversed(_GAUSS))
    return nodes, kronrod, gauss


class Integral(NamedTuple):
    """Values (k,), their estimated errors (k,), and the number of points evaluated."""

    value: NDArray[np.float64]
    error: NDArray[np.float64]
    points: int


def integrate(
    function: Callable[[NDArray[np.float64]], ArrayLike],
    lower: ArrayLike,
    upper: ArrayLike,
    *,
    tolerance: float = 1e-10,
    initial: int = 8,
    confirm: bool = True,
    batch: int = 4096,
    max_points: int = 4_000_000,
) -> Integral:
    """Adaptive Gauss-Kronrod integral over the box [lower, upper] in D dimensions of a function (m, D) -> (m, k).

    Starts from `initial` ** D boxes and halves, in every dimension, those whose estimated error is above their share,
    until the sum is below `tolerance` or `max_points` is spent; the error says which. A kink closer to the edge of a
    box than its outermost node goes unseen by both rules, so `confirm` integrates again, with its own `max_points`,
    from `initial` + 3 boxes a dimension and counts the difference as error; without it the integrand must be smooth.
    `function` always receives exactly `batch` points, so that it compiles once. Raises ValueError for a box that is
    empty or not finite.
    """
    low, high = np.atleast_1d(np.asarray(lower, float)), np.atleast_1d(np.asarray(upper, float))
    if low.shape != high.shape or not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError(f"lower, upper: got {low.tolist()} and {high.tolist()}; pass a finite box with lower < upper.")
    first = _integrate_once(function, low, high, tolerance, initial, batch, max_points)
    if not confirm:
        return first
    second = _integrate_once(function, low, high, tolerance, initial + 3, batch, max_points)
    error = np.maximum(np.maximum(first.error, second.error), np.abs(first.value - second.value))
    return Integral(second.value, error, first.points + second.points)


def _integrate_once(
    function: Callable[[NDArray[np.float64]], ArrayLike],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    tolerance: float,
    initial: int,
    batch: int,
    max_points: int,
) -> Integral:
    dimension = low.size
    nodes, kronrod, gauss = _rule()
    grid = np.stack(np.meshgrid(*[nodes] * dimension, indexing="ij"), axis=-1).reshape(-1, dimension)
    fine = _outer(kronrod, dimension)
    coarse = _outer(gauss, dimension)

    half = (high - low) / (2 * initial)
    steps = np.stack(np.meshgrid(*[2 * np.arange(initial) + 1] * dimension, indexing="ij"), axis=-1)
    centres = low + half * steps.reshape(-1, dimension)
    halves = np.broadcast_to(half, centres.shape)
    children = np.array(list(itertools.product((-0.5, 0.5), repeat=dimension)))

    settled_value: NDArray[np.float64] = np.zeros(1)
    settled_error: NDArray[np.float64] = np.zeros(1)
    points = 0
    while True:
        inputs = (centres[:, None] + halves[:, None] * grid).reshape(-1, dimension)
        outputs = _in_batches(function, inputs, batch).reshape(len(centres), len(grid), -1)
        points += len(inputs)
        volume = halves.prod(axis=1)[:, None]
        values = np.einsum("bgk,g->bk", outputs, fine) * volume
        errors = np.abs(values - np.einsum("bgk,g->bk", outputs, coarse) * volume)
        total_error = settled_error + errors.sum(axis=0)
        growth = len(children) * len(grid)
        # A box keeps its error if all boxes like it together would meet the tolerance.
        split = errors.max(axis=1) > tolerance / (2 * len(errors))
        if total_error.max() <= tolerance or not split.any() or points + split.sum() * growth > max_points:
            return Integral(settled_value + values.sum(axis=0), total_error, points)
        settled_value = settled_value + values[~split].sum(axis=0)
        settled_error = settled_error + errors[~split].sum(axis=0)
        centres = (centres[split][:, None] + halves[split][:, None] * children).reshape(-1, dimension)
        halves = np.repeat(halves[split] / 2, len(children), axis=0)


def expected_roots(
    residual: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    scale: float,
    lower: float,
    upper: float,
    grid: int = 20_001,
) -> float:
    """E[number of roots u of residual(u) = eps], eps ~ N(0, scale^2), for a vectorised residual of one variable.

    Between consecutive extremes the residual is monotone, so eps has one root there exactly when it lies between the
    two extreme values: the expectation is the sum of |Phi(c_{j+1}) - Phi(c_j)| over those values, -inf and inf
    included. The residual must be below and above every likely eps at `lower` and `upper`, and rise outside.
    Extremes are found from values of the residual alone, on a grid and then refined; a pair closer than a grid step
    may be missed, and is then too shallow to matter.
    """
    points = np.linspace(lower, upper, grid)
    values = residual(points)
    turns = np.flatnonzero(np.diff(np.sign(np.diff(values)))) + 1
    extremes = [-np.inf]
    for turn in turns:
        direction = -1.0 if values[turn] >= values[turn - 1] else 1.0

        def height(u: float, direction: float = direction) -> float:
            return direction * float(residual(np.array([u]))[0])

        found = minimize_scalar(
            height, bounds=(points[turn - 1], points[turn + 1]), method="bounded", options={"xatol": 1e-10}
        )
        extremes.append(direction * found.fun)
    extremes.append(np.inf)
    return float(np.abs(np.diff(ndtr(np.array(extremes) / scale))).sum())


def _outer(weights: NDArray[np.float64], dimension: int) -> NDArray[np.float64]:
    product = np.ones(1)
    for _ in range(dimension):
        product = np.outer(product, weights).ravel()
    return product


def _in_batches(
    function: Callable[[NDArray[np.float64]], ArrayLike], inputs: Float[np.ndarray, "m D"], batch: int
) -> NDArray[np.float64]:
    outputs = []
    for start in range(0, len(inputs), batch):
        chunk = inputs[start : start + batch]
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], batch - len(chunk), axis=0)])
        result = np.asarray(function(padded), np.float64)
        outputs.append(result.reshape(batch, -1)[: len(chunk)])
    return np.concatenate(outputs)
