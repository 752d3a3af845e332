"""Integrals of densities in up to four dimensions with error estimates, and the expected number of roots.

The two answer the same question in different ways: the mass of N(e(u)) |det J(u)| needs the determinant, the expected
number of roots of e(u) = eps needs only e.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import cubature
from scipy.optimize import minimize_scalar
from scipy.special import ndtr

# Nodes of a Gauss-Kronrod pair in one dimension: SciPy asks for the 15, and for them with the 7 to estimate the error.
_KRONROD, _WITH_GAUSS = 15, 22
# Subdivisions allowed, by dimension: several times what the density of a right process needs. A wrong one may jump
# along a surface, where refining would go on for hours; its error then says that the tolerance was not reached.
_SUBDIVISIONS = {1: 1000, 2: 800, 3: 100, 4: 40}
# Points a call: compiled functions want one shape, and more at a time would not fit a cache.
_BATCH = 4096


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
    confirm: bool = True,
    max_subdivisions: int | None = None,
) -> Integral:
    """Adaptive Gauss-Kronrod integral over the box [lower, upper] in D dimensions of a function (m, D) -> (m, k).

    The error says whether `tolerance` was reached. A kink closer to the edge of a box than its outermost node goes
    unseen by both rules, so `confirm` integrates again with every first box cut elsewhere, and counts the difference as
    error; without it the integrand must be smooth. `function` always receives the same number of points, so that it
    compiles once. Raises ValueError for a box that is empty or not finite.
    """
    low, high = np.atleast_1d(np.asarray(lower, float)), np.atleast_1d(np.asarray(upper, float))
    if low.shape != high.shape or not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError(f"lower, upper: got {low.tolist()} and {high.tolist()}; pass a finite box with lower < upper.")
    evaluated = 0
    batch = min(_WITH_GAUSS**low.size, _BATCH)

    def in_batches(inputs: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal evaluated
        evaluated += len(inputs)
        outputs = []
        for start in range(0, len(inputs), batch):
            chunk = inputs[start : start + batch]
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], batch - len(chunk), axis=0)])
            outputs.append(np.asarray(function(padded), np.float64).reshape(batch, -1)[: len(chunk)])
        return np.concatenate(outputs)

    def once(cut: float) -> Integral:
        options = {
            "rule": "gk15",
            "rtol": 0.0,
            "atol": tolerance,
            "max_subdivisions": max_subdivisions or _SUBDIVISIONS[low.size],
        }
        found = cubature(in_batches, low, high, points=[low + cut * (high - low)] if cut else None, **options)
        return Integral(np.atleast_1d(found.estimate), np.atleast_1d(found.error), evaluated)

    first = once(0.0)
    if not confirm:
        return first
    second = once(0.381966)
    error = np.maximum(np.maximum(first.error, second.error), np.abs(first.value - second.value))
    return Integral(second.value, error, evaluated)


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


def expected_roots_plane(
    residual: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    scale: float,
    lower: ArrayLike,
    upper: ArrayLike,
    grid: int = 1601,
) -> tuple[float, float, float]:
    """E[number of roots u of residual(u) = eps], eps ~ N(0, scale^2 I), in the plane; its error; E[degree].

    The box [lower, upper] is cut into triangles, and `residual` (m, 2) -> (m, 2) replaced by the map that is linear on
    each. A noise vector has one root for every image triangle that holds it, so the expectation is the sum of their
    probabilities: no derivative is taken. Once from every vertex and once from every second one: the error of a
    linear piece falls with its size squared, so the two are extrapolated, and their distance is the error. With
    the orientation of each image as sign the sum is the expected degree, which has to be 1.
    """
    low, high = np.asarray(lower, float), np.asarray(upper, float)
    axes = [np.linspace(low[k], high[k], grid) for k in range(2)]
    vertices = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    images = residual(vertices.reshape(-1, 2)).reshape(vertices.shape) / scale
    fine, coarse = _triangle_probabilities(images), _triangle_probabilities(images[::2, ::2])
    value, degree = (4 * fine - coarse) / 3
    return float(value), float(np.abs(fine - coarse).max()), float(degree)


def _triangle_probabilities(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over triangles of their probability under N(0, I), unsigned and with the sign of their orientation."""
    corner, right, up, far = images[:-1, :-1], images[1:, :-1], images[:-1, 1:], images[1:, 1:]
    total = np.zeros(2)
    for a, b, c in ((corner, right, up), (far, up, right)):
        area = 0.5 * ((b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0])
        # The density at the midpoints of the edges: exact for quadratics, so the area is what limits the error.
        middles = (np.exp(-0.125 * np.square(x + y).sum(-1)) for x, y in ((a, b), (b, c), (c, a)))
        mass = area * sum(middles) / (3 * 2 * np.pi)
        total += np.abs(mass).sum(), mass.sum()
    return total
