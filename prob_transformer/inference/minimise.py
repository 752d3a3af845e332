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
from typing import Any, NamedTuple

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
    """Where the search ended, its `MapStatus` code, the steps made, and how many of them were cut short at a wall.

    `predicted_decrease` is g.H g / 2 at the end, in nats, infinite where steps were still long; `at_rounding` says that
    rounding, and not the tolerance, ended the search.
    """

    iterate: Iterate
    status: Int[Array, ""]
    steps: Int[Array, ""]
    crossings: Int[Array, ""]
    predicted_decrease: Float[Array, ""]
    at_rounding: Bool[Array, ""]


class _Search(NamedTuple):
    best: Iterate
    step: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    trials: Int[Array, ""]
    done: Bool[Array, ""]
    crossed: Bool[Array, ""]
    not_finite: Bool[Array, ""]


class _Candidate(NamedTuple):
    """A point and the decrease predicted there."""

    iterate: Iterate
    predicted: Float[Array, ""]


class _State(NamedTuple):
    iterate: Iterate
    memory: Any
    status: Int[Array, ""]
    steps: Int[Array, ""]
    crossings: Int[Array, ""]
    # Of the points whose predicted decrease is below the rounding of the value, that with the smallest.
    best: _Candidate
    waited: Int[Array, ""]
    at_rounding: Bool[Array, ""]


def _is_finite(iterate: Iterate) -> Bool[Array, ""]:
    return jnp.isfinite(iterate.value) & jnp.isfinite(iterate.gradient).all()


def _line_search(
    evaluate: Callable[[Float[Array, " k"]], Iterate],
    here: Iterate,
    direction: Float[Array, " k"],
    skip: Bool[Array, ""],
) -> _Search:
    slope = here.gradient @ direction
    slack = _ROUNDING * jnp.finfo(here.point.dtype).eps * jnp.abs(here.value)

    def trial(search: _Search) -> _Search:
        there = evaluate(here.point + search.step * direction)
        crosses = (there.signs != here.signs).any()
        low_enough = there.value <= here.value + _ARMIJO * search.step * slope + slack
        accepted = ~crosses & _is_finite(there) & low_enough
        too_short = there.gradient @ direction < _WOLFE * slope
        low = jnp.where(accepted, search.step, search.low)
        high = jnp.where(accepted, search.high, search.step)
        return _Search(
            best=jax.tree.map(lambda new, old: jnp.where(accepted, new, old), there, search.best),
            step=jnp.where(jnp.isinf(high), 2 * search.step, 0.5 * (low + high)),
            low=low,
            high=high,
            trials=search.trials + 1,
            done=accepted & ~too_short,
            crossed=search.crossed | crosses,
            not_finite=~crosses & ~_is_finite(there),
        )

    one, no = jnp.ones((), here.point.dtype), jnp.zeros((), bool)
    start = _Search(here, one, 0 * one, jnp.inf * one, jnp.zeros((), jnp.int32), skip, no, no)
    return jax.lax.while_loop(lambda search: ~search.done & (search.trials < _TRIALS), trial, start)


def _look_around(
    evaluate: Callable[[Float[Array, " k"]], Iterate], end: _Candidate, tolerance: Float[Array, ""]
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether some coordinate has no curvature to speak of for its gradient, and whether that is only rounding."""
    here = end.iterate
    sign_key, size_key, last_digit_key = jax.random.split(jax.random.key(0), 3)
    size, dtype = here.point.shape, here.point.dtype
    signs = jax.random.rademacher(sign_key, (_PROBES, *size), dtype)
    steps = _PROBE * signs * jax.random.uniform(size_key, signs.shape, dtype, minval=0.5)
    digits = jnp.finfo(dtype).eps * jnp.maximum(jnp.abs(here.point), 1.0)
    units = digits * jax.random.rademacher(last_digit_key, (_ROUNDING_PROBES, *size), dtype)
    around = jax.lax.map(lambda step: evaluate(here.point + step), jnp.concatenate([steps, units]))
    changes = jnp.abs(around.gradient - here.gradient)
    gradient_rounding = _GRADIENT_ROUNDING * changes[_PROBES:].max(0)
    value_rounding = jnp.maximum(
        jnp.abs(around.value[_PROBES:] - here.value).max(), jnp.finfo(dtype).eps * (1 + jnp.abs(here.value))
    )
    largest = jnp.abs(here.gradient)
    at_rounding = (
        (largest <= jnp.maximum(gradient_rounding, tolerance)).all()
        & (end.predicted <= _ROUNDING * value_rounding)
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

    def direction_at(here: Iterate, memory: Any) -> tuple[Float[Array, " k"], Any]:
        downhill, kept = lbfgs.update(here.gradient, memory, here.point)
        # A step cut short at a wall may have met negative curvature; what H then proposes can point uphill. Forget it.
        again = here.gradient / jnp.maximum(1.0, jnp.linalg.norm(here.gradient))
        good = here.gradient @ downhill > 0
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), (-downhill, kept), (-again, lbfgs.init(here.point)))

    def advance(state: _State) -> _State:
        here = state.iterate
        direction, memory = direction_at(here, state.memory)
        predicted = -0.5 * here.gradient @ direction
        # The first direction is the gradient, which says nothing of the distance to go.
        short = (state.steps > 0) & (jnp.abs(direction).max() <= _LARGEST_FINAL_STEP)
        largest = jnp.abs(here.gradient).max()
        settled = (largest == 0) | ((largest <= tolerance) & short)
        hidden = short & (predicted <= _ROUNDING * jnp.finfo(here.point.dtype).eps * (1 + jnp.abs(here.value)))
        better = settled | (hidden & (predicted < state.best.predicted))
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), _Candidate(here, predicted), state.best)
        waited = jnp.where(better | ~hidden, 0, state.waited + 1)
        stalled = ~settled & (waited >= _PATIENCE)
        stop = settled | stalled | (state.steps >= max_steps)
        search = _line_search(evaluate, here, direction, stop)
        moved = search.low > 0
        failed = jnp.where(search.not_finite, MapStatus.NOT_FINITE, MapStatus.LINE_SEARCH_FAILED)
        stuck = ~stop & ~moved
        searched = jnp.where(stuck, failed, _RUNNING)
        ended = jnp.where(stalled, _STALLED, MapStatus.MAX_STEPS)
        status = jnp.where(settled, MapStatus.CONVERGED, jnp.where(stop, ended, searched))
        # Where the search ends without a point like that, its end is the only candidate, unless it had further to go.
        lone = (stop | stuck) & short & jnp.isinf(best.predicted)
        return _State(
            search.best,
            memory,
            status.astype(jnp.int32),
            state.steps + moved,
            state.crossings + search.crossed,
            jax.tree.map(lambda new, old: jnp.where(lone, new, old), _Candidate(here, predicted), best),
            waited,
            state.at_rounding,
        )

    def search_and_judge(state: _State) -> _State:
        end = jax.lax.while_loop(lambda state: state.status == _RUNNING, advance, state)
        flat, at_rounding = _look_around(evaluate, end.best, tolerance)
        settled, stalled = end.status == MapStatus.CONVERGED, end.status == _STALLED
        at_rounding = at_rounding & ~settled & (end.status != MapStatus.NOT_FINITE)
        status = jnp.where(
            settled | at_rounding,
            jnp.where(flat, MapStatus.FLAT, MapStatus.CONVERGED),
            jnp.where(stalled, _RUNNING, end.status),
        )
        iterate = jax.tree.map(lambda new, old: jnp.where(at_rounding, new, old), end.best.iterate, end.iterate)
        # What was judged and found wanting is no candidate any more.
        again = end.best._replace(predicted=jnp.where(status == _RUNNING, jnp.inf, end.best.predicted))
        return end._replace(
            iterate=iterate, status=status.astype(jnp.int32), best=again, waited=0 * end.waited, at_rounding=at_rounding
        )

    here = evaluate(start)
    on_wall = ~(jnp.abs(here.signs) > 0).all()
    refused = jnp.where(
        on_wall, MapStatus.INFEASIBLE_START, jnp.where(_is_finite(here), _RUNNING, MapStatus.NOT_FINITE)
    )
    none, unknown = jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, here.value.dtype)
    first = _State(
        here,
        lbfgs.init(start),
        refused.astype(jnp.int32),
        none,
        none,
        _Candidate(here, unknown),
        none,
        jnp.zeros((), bool),
    )
    last = jax.lax.while_loop(lambda state: state.status == _RUNNING, search_and_judge, first)
    return Minimum(last.iterate, last.status, last.steps, last.crossings, last.best.predicted, last.at_rounding)
