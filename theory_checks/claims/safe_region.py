"""Claim: two sufficient conditions keep det J_i away from zero for every u_i, and how much they leave unused."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prob_transformer import Attention, stability_margin
from theory_checks.check import Check, Outcome, Plan, Worst, quick_jit
from theory_checks.claims.normalisation import PAST, interaction_attention, scalar_attention
from theory_checks.drawn_cases import (
    MODERATE_KINDS,
    Array,
    Case,
    Shape,
    draw_problem,
    drawn,
    make_case,
    semidefinite_interaction,
)

TOLERANCE = 1e-9
# The search: random starts over scales of u, the best of them moved by random steps that shrink.
_STARTS, _KEPT, _STEPS, _ROUNDS = 128, 4, 16, 20
_IDENTITY = tuple(Shape(1, d, d, n, False) for d, n in ((1, 4), (2, 5), (3, 6)))
_GENERAL = (
    Shape(1, 1, 1, 3, False),
    Shape(1, 2, 2, 4, False),
    Shape(2, 1, 2, 3, True),
    Shape(3, 2, 3, 5, True),
)


@quick_jit
def smallest_determinant(attention: Attention, past: Any, key: Any) -> tuple[jax.Array, jax.Array]:
    """The smallest det J found over the next embedding u, and that u (d,), by a derivative-free search."""
    width = past.shape[-1]
    slopes = jnp.linalg.norm(attention.interaction, axis=(1, 2)).max()
    spread = jnp.linalg.norm(past - past.mean(axis=0), axis=-1).max()
    # The logits differ by one unit at about this |u|: weights go from uniform to one-hot around it.
    unit = 1.0 / (slopes * spread + 1e-12)

    def determinant(u: jax.Array) -> jax.Array:
        return stability_margin(attention, jnp.concatenate([past, u[None]]))[-1]

    start_key, scale_key, step_key = jax.random.split(key, 3)
    scales = unit * 10.0 ** jax.random.uniform(scale_key, (_STARTS, 1), minval=-2.0, maxval=2.0)
    starts = (scales * jax.random.normal(start_key, (_STARTS, width))).at[0].set(0.0)
    found = jax.vmap(determinant)(starts)
    best = jnp.argsort(found)[:_KEPT]
    points, values = starts[best], found[best]

    def search(carry: tuple[Any, ...], round_key: jax.Array) -> tuple[tuple[Any, ...], None]:
        points, values, radius = carry
        directions = jax.random.normal(round_key, (_KEPT, _STEPS, width))
        reach = radius * (unit + jnp.linalg.norm(points, axis=-1))[:, None, None]
        trials = points[:, None] + reach * directions
        found = jax.vmap(jax.vmap(determinant))(trials)
        index = jnp.argmin(found, axis=1)
        rows = jnp.arange(_KEPT)
        better = found[rows, index] < values
        points = jnp.where(better[:, None], trials[rows, index], points)
        return (points, jnp.where(better, found[rows, index], values), 0.7 * radius), None

    (points, values, _), _ = jax.lax.scan(search, (points, values, 0.5), jax.random.split(step_key, _ROUNDS))
    winner = jnp.argmin(values)
    return values[winner], points[winner]


def negative_semidefinite(shape: Shape, kind: str, seed: int, strength: float) -> tuple[Attention, Array]:
    """A = -(positive semidefinite) + (antisymmetric) with identity values, and a past (n - 1, d)."""
    past = make_case(shape, kind, seed).embeddings[:-1]
    interaction = strength * semidefinite_interaction(np.random.default_rng(seed), shape.width)
    return interaction_attention(interaction), past


def contraction(shape: Shape, kind: str, seed: int, constant: float) -> tuple[Case, float]:
    """Any attention scaled so that sum_h |V_h| |A_h| diam^2 / 4 of its past is `constant`, and what this sum is."""
    case = make_case(shape, kind, seed)
    past = case.embeddings[:-1]
    diameter = max(float(np.linalg.norm(one - other)) for one in past for other in past)
    values = np.eye(shape.width)[None] if case.value is None else case.value
    norms = np.linalg.norm(values, ord=2, axis=(1, 2)) * np.linalg.norm(case.interaction, ord=2, axis=(1, 2))
    reached = float(norms.sum()) * diameter**2 / 4
    if reached == 0:
        # A past of identical tokens has no covariance: any attention satisfies the condition with constant 0.
        return case, 0.0
    return replace(case, query=case.query * (constant / reached)), constant


def run(plan: Plan) -> Outcome:
    """Search for the smallest determinant over u_i in drawn problems of each of the two safe regions."""
    cases = plan.count(200, 30)
    semidefinite, popoviciu = Worst(-np.inf), Worst(-np.inf)
    slacks: dict[int, list[float]] = {}

    identity, general = plan.pick((_IDENTITY, _GENERAL), (_IDENTITY[:1], _IDENTITY[:1]))
    for problem in drawn(draw_problem, cases, plan.seed, shapes=identity, kinds=MODERATE_KINDS, low=-2.0, high=2.0):
        shape, kind, seed, exponent = problem
        attention, past = negative_semidefinite(shape, kind, seed, 10.0**exponent)
        found, _ = smallest_determinant(attention, past, jax.random.key(seed))
        semidefinite.see(1 - float(found), problem)
    for problem in drawn(draw_problem, cases, plan.seed, shapes=general, kinds=MODERATE_KINDS, low=0.01, high=0.99):
        shape, _, seed, _ = problem
        case, reached = contraction(*problem)
        found, _ = smallest_determinant(case.attention, case.embeddings[:-1], jax.random.key(seed))
        slack = float(found) / (1 - reached) ** shape.width - 1
        if reached > 0:
            slacks.setdefault(shape.width, []).append(slack)
        popoviciu.see(-slack, problem)

    past = np.array(PAST)[:, None]
    outside, where = smallest_determinant(scalar_attention(4.0), past, jax.random.key(0))
    figure = max(semidefinite.figure, popoviciu.figure)
    return Outcome(
        cases=2 * cases,
        figure=figure,
        holds=bool(figure <= TOLERANCE),
        counterexample_figure=float(outside),
        counterexample_fails=bool(outside < 0),
        details={
            "negative_semidefinite_smallest_slack": {"figure": -semidefinite.figure, "case": semidefinite.case},
            "contraction_smallest_relative_slack": {"figure": -popoviciu.figure, "case": popoviciu.case},
            "contraction_slack_by_width": {
                width: {"cases": len(found), "smallest": min(found), "median": float(np.median(found))}
                for width, found in sorted(slacks.items())
            },
            "counterexample_at_u": float(where[0]),
        },
    )


CHECK = Check(
    id="safe-region",
    claim="det J_i is bounded below in both safe regions",
    statement=(
        "If the symmetric part of A is negative semidefinite and values are the identity, det J_i >= 1. If c = "
        "sum_h |V_h|_2 |A_h|_2 diam(past)^2 / 4 < 1, det J_i >= (1 - c)^d. Both for every u_i."
    ),
    mark="derived",
    regime=(
        "The two conditions, |A| from 0.01 to 100 in the first and c from 0.01 to 0.99 in the second; pasts with "
        "ties, near-duplicates and collinear tokens; u_i found by a search that minimises det J_i."
    ),
    counterexample="d = 1, a = 4, past (-1, 1, 0.3) meets neither condition: the same search finds det J_i < 0.",
    tolerance=TOLERANCE,
    tolerance_reason="Float64 rounding of a determinant; the bounds themselves are exact inequalities.",
    figure_name="largest shortfall of det J_i below its bound, relative",
    run=run,
)
