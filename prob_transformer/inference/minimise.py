"""Limited-memory BFGS whose steps never cross a wall, as one compiled loop.

    d = -H g,    x <- x + t d,    f(x + t d) <= f(x) + 1e-4 t g.d    and    g(x + t d).d >= 0.9 g.d

H is optax's approximation of the inverse Hessian. The step length t starts at 1 and is bisected until these weak Wolfe
conditions hold (Lewis and Overton 2013), which keep H positive definite: too long a step halves the bracket, too short
a one doubles or bisects upwards. A step to a point where any of the watched signs differs from those of the current
iterate counts as too long, and so does one to a point where the value or its gradient is not finite. Only the ends of
a step are looked at: one that crosses two walls of the same determinant is not noticed.

A vanishing gradient does not make a minimum: that of exp(x) vanishes as x -> -inf. So the end must also be curved: with
the change of the gradient D_i = |g(x + s) - g(x)|_i / |s_i| over a short random s, every |g_i| <= 0.1 D_i. A g_i that
is nothing but rounding changes by about |g_i| over any s, so D_i is then about 100 |g_i|, and it is not called flat.

Rounding bounds what a search can reach: a sum over many terms in float32 never has a gradient of 1e-6. The rounding of
the value and of each g_i is measured by their changes R and r_i when every x_i moves by a unit of its last digit. A
point at which the search stands still is CONVERGED where |g_i| <= 4 r_i (or the tolerance) for all i, and the decrease
that H predicts, g.H g / 2, is at most 10 R: no step could show a lower value.
"""

import enum
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

_ARMIJO, _WOLFE = 1e-4, 0.9
_TRIALS = 50
_MEMORY = 10
# The value is only known to a few units of its last digit; without this slack the last steps would be refused.
_ROUNDING = 10
_LARGEST_FINAL_STEP = 1e-2
# The look around the end: two random steps of about this length, so that no cancellation between coordinates misleads.
_PROBES, _PROBE = 2, 1e-2
_LARGEST_NEWTON_STEP = 0.1
# Multiples of the largest of a few measured changes, within which a gradient is nothing but rounding.
_GRADIENT_ROUNDING, _ROUNDING_PROBES = 4, 4
# Steps without a smaller predicted decrease, all of them below the rounding of the value, before the end is judged.
_PATIENCE = 10
_RUNNING, _STALLED = -1, -2

Tree = TypeVar("Tree")


class MapStatus(enum.IntEnum):
    """How the search for the maximum ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    LINE_SEARCH_FAILED = 2
    NOT_FINITE = 3
    INFEASIBLE_START = 4
    FLAT = 5


class Iterate(NamedTuple):
    """A point (k,), the value in nats, its gradient (k,), and the watched signs there."""

    point: Float[Array, " k"]
    value: Float[Array, ""]
    gradient: Float[Array, " k"]
    signs: Float[Array, "..."]


class Minimum(NamedTuple):
    """Where a search is, or ended: the point, a `MapStatus` code, the steps made, how many were cut short at a wall.

    `best` is, of the points whose predicted decrease is below the rounding of the value, that with the smallest, and
    `predicted_decrease` is g.H g / 2 there, in nats, infinite where steps were still long; `at_rounding` says that
    rounding, and not the tolerance, ended the search. `waited` counts the steps since `best`, `memory` is optax's.
    """

    iterate: Iterate
    status: Int[Array, ""]
    steps: Int[Array, ""]
    crossings: Int[Array, ""]
    best: Iterate
    predicted_decrease: Float[Array, ""]
    at_rounding: Bool[Array, ""]
    waited: Int[Array, ""]
    memory: Any


class _LineSearch(NamedTuple):
    best: Iterate
    step: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    trials: Int[Array, ""]
    done: Bool[Array, ""]
    crossed: Bool[Array, ""]
    not_finite: Bool[Array, ""]


def _choose(condition: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    return jax.tree.map(partial(jnp.where, condition), new, old)


def _is_finite(iterate: Iterate) -> Bool[Array, ""]:
    return jnp.isfinite(iterate.value) & jnp.isfinite(iterate.gradient).all()


def _line_search(
    evaluate: Callable[[Float[Array, " k"]], Iterate],
    here: Iterate,
    direction: Float[Array, " k"],
    skip: Bool[Array, ""],
) -> _LineSearch:
    slope = here.gradient @ direction
    slack = _ROUNDING * jnp.finfo(here.point.dtype).eps * jnp.abs(here.value)

    def trial(search: _LineSearch) -> _LineSearch:
        there = evaluate(here.point + search.step * direction)
        crosses, finite = (there.signs != here.signs).any(), _is_finite(there)
        accepted = ~crosses & finite & (there.value <= here.value + _ARMIJO * search.step * slope + slack)
        too_short = there.gradient @ direction < _WOLFE * slope
        low = jnp.where(accepted, search.step, search.low)
        high = jnp.where(accepted, search.high, search.step)
        return _LineSearch(
            best=_choose(accepted, there, search.best),
            step=jnp.where(jnp.isinf(high), 2 * search.step, 0.5 * (low + high)),
            low=low,
            high=high,
            trials=search.trials + 1,
            done=accepted & ~too_short,
            crossed=search.crossed | crosses,
            not_finite=~crosses & ~finite,
        )

    one, no = jnp.ones((), here.point.dtype), jnp.zeros((), bool)
    start = _LineSearch(here, one, 0 * one, jnp.inf * one, jnp.zeros((), jnp.int32), skip, no, no)
    return jax.lax.while_loop(lambda search: ~search.done & (search.trials < _TRIALS), trial, start)


def _look_around(
    evaluate: Callable[[Float[Array, " k"]], Iterate],
    here: Iterate,
    predicted: Float[Array, ""],
    tolerance: Float[Array, ""],
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether some coordinate has no curvature to speak of for its gradient, and whether that is only rounding."""
    sign_key, size_key, last_digit_key = jax.random.split(jax.random.key(0), 3)
    size, dtype = here.point.shape, here.point.dtype
    epsilon = jnp.finfo(dtype).eps
    signs = jax.random.rademacher(sign_key, (_PROBES, *size), dtype)
    steps = _PROBE * signs * jax.random.uniform(size_key, signs.shape, dtype, minval=0.5)
    digits = epsilon * jnp.maximum(jnp.abs(here.point), 1.0)
    units = digits * jax.random.rademacher(last_digit_key, (_ROUNDING_PROBES, *size), dtype)
    around = jax.lax.map(evaluate, here.point + jnp.concatenate([steps, units]))
    changes, largest = jnp.abs(around.gradient - here.gradient), jnp.abs(here.gradient)
    gradient_rounding = _GRADIENT_ROUNDING * changes[_PROBES:].max(0)
    value_rounding = jnp.maximum(
        jnp.abs(around.value[_PROBES:] - here.value).max(), epsilon * (1 + jnp.abs(here.value))
    )
    at_rounding = (
        (largest <= jnp.maximum(gradient_rounding, tolerance)).all()
        & (predicted <= _ROUNDING * value_rounding)
        & jnp.isfinite(gradient_rounding).all()
        & jnp.isfinite(value_rounding)
    )
    curvature = (changes[:_PROBES] / jnp.abs(steps)).max(0)
    # The square of the tolerance stands for zero: the gradient may have underflowed.
    flat = (curvature <= jnp.maximum(largest / _LARGEST_NEWTON_STEP, tolerance**2)).any()
    return flat, at_rounding


def minimise(
    evaluate: Callable[[Float[Array, " k"]], Iterate],
    start: Float[Array, " k"],
    tolerance: Float[Array, ""],
    max_steps: Int[Array, ""],
) -> Minimum:
    """Minimise from `start` until the largest entry of the gradient is at most `tolerance` and steps have shortened,
    or until rounding hides every further decrease.

    `evaluate` gives the `Iterate` at a point. Traceable, without exceptions: a start on a wall, a start or steps
    without a finite value and gradient, steps that cannot be shortened enough, and an end where nothing is curved give
    their `MapStatus`. That the end is a minimum and not a saddle is not looked into.
    """
    lbfgs = optax.scale_by_lbfgs(_MEMORY)

    def advance(state: Minimum) -> Minimum:
        here = state.iterate
        downhill, memory = lbfgs.update(here.gradient, state.memory, here.point)
        # A step cut short at a wall may have met negative curvature; what H then proposes can point uphill. Forget it.
        again = here.gradient / jnp.maximum(1.0, jnp.linalg.norm(here.gradient))
        good = here.gradient @ downhill > 0
        direction, memory = _choose(good, (-downhill, memory), (-again, lbfgs.init(here.point)))
        predicted = -0.5 * here.gradient @ direction
        # The first direction is the gradient, which says nothing of the distance to go.
        short = (state.steps > 0) & (jnp.abs(direction).max() <= _LARGEST_FINAL_STEP)
        largest = jnp.abs(here.gradient).max()
        settled = (largest == 0) | ((largest <= tolerance) & short)
        hidden = short & (predicted <= _ROUNDING * jnp.finfo(here.point.dtype).eps * (1 + jnp.abs(here.value)))
        better = settled | (hidden & (predicted < state.predicted_decrease))
        waited = jnp.where(better | ~hidden, 0, state.waited + 1)
        stalled = ~settled & (waited >= _PATIENCE)
        stop = settled | stalled | (state.steps >= max_steps)
        search = _line_search(evaluate, here, direction, stop)
        moved = search.low > 0
        stuck = ~stop & ~moved
        failed = jnp.where(search.not_finite, MapStatus.NOT_FINITE, MapStatus.LINE_SEARCH_FAILED)
        ended = jnp.where(stalled, _STALLED, MapStatus.MAX_STEPS)
        status = jnp.where(settled, MapStatus.CONVERGED, jnp.where(stop, ended, jnp.where(stuck, failed, _RUNNING)))
        # Where the search ends without a point like that, its end is the only candidate, unless it had further to go.
        lone = (stop | stuck) & short & jnp.isinf(state.predicted_decrease)
        best, predicted = _choose(better | lone, (here, predicted), (state.best, state.predicted_decrease))
        return Minimum(
            search.best,
            status.astype(jnp.int32),
            state.steps + moved,
            state.crossings + search.crossed,
            best,
            predicted,
            state.at_rounding,
            waited,
            memory,
        )

    def search_and_judge(state: Minimum) -> Minimum:
        end = jax.lax.while_loop(lambda state: state.status == _RUNNING, advance, state)
        flat, at_rounding = _look_around(evaluate, end.best, end.predicted_decrease, tolerance)
        settled = end.status == MapStatus.CONVERGED
        at_rounding = at_rounding & ~settled & (end.status != MapStatus.NOT_FINITE)
        status = jnp.where(
            settled | at_rounding,
            jnp.where(flat, MapStatus.FLAT, MapStatus.CONVERGED),
            jnp.where(end.status == _STALLED, _RUNNING, end.status),
        )
        return end._replace(
            iterate=_choose(at_rounding, end.best, end.iterate),
            status=status.astype(jnp.int32),
            # What was judged and found wanting is no candidate any more.
            predicted_decrease=jnp.where(status == _RUNNING, jnp.inf, end.predicted_decrease),
            at_rounding=at_rounding,
            waited=0 * end.waited,
        )

    here = evaluate(start)
    on_wall = ~(jnp.abs(here.signs) > 0).all()
    refused = jnp.where(
        on_wall, MapStatus.INFEASIBLE_START, jnp.where(_is_finite(here), _RUNNING, MapStatus.NOT_FINITE)
    )
    none, unknown = jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, here.value.dtype)
    first = Minimum(
        here, refused.astype(jnp.int32), none, none, here, unknown, jnp.zeros((), bool), none, lbfgs.init(start)
    )
    return jax.lax.while_loop(lambda state: state.status == _RUNNING, search_and_judge, first)
