"""Claim: on the central path the multipliers lambda / m_i settle on the support tokens, as dual variables would."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import approx_fprime, minimize, nnls

from prob_transformer import Attention, barrier, stability_margin, support_tokens
from theory_checks.check import Check, Outcome, Plan, Worst, quick_jit
from theory_checks.drawn_cases import Array
from theory_checks.truth.transformer import jacobian_blocks

TOLERANCE = 1e-3
LENGTH, WIDTH = 8, 2
LAMBDAS = tuple(10.0**-power for power in range(9))
# A constraint is active if its multiplier is above this share of the largest one.
ACTIVE = 1e-3
# Share of all multipliers that the support tokens have to carry at the end of the path.
CONCENTRATED = 0.999


def margins(interaction: Array, embeddings: Array) -> Array:
    """det J_i (n - 2,) from the third position on, for identity values, in plain NumPy."""
    width = embeddings.shape[1]
    query, key = np.sqrt(width) * interaction[None], np.eye(width)[None]
    return np.linalg.det(jacobian_blocks(query, key, None, embeddings)[2:])


def problem(seed: int) -> tuple[Array, Array]:
    """Embeddings (n, d), and a target interaction (d, d) under which some position is well past the boundary."""
    rng = np.random.default_rng(seed)
    embeddings, target = rng.normal(size=(LENGTH, WIDTH)), rng.normal(size=(WIDTH, WIDTH))
    # One direction of attraction, or no strength would lead past the boundary.
    direction = rng.normal(size=WIDTH)
    target = 0.3 * target + np.outer(direction, direction) / (direction @ direction)
    while margins(target, embeddings).min() > -0.5:
        target = 1.2 * target
        if np.abs(target).max() > 1e3:
            return problem(seed + 1_000_000)
    return embeddings, target


def _attention(flat: Any) -> Attention:
    interaction = flat.reshape(WIDTH, WIDTH)
    return Attention(np.sqrt(WIDTH) * interaction[None], jnp.eye(WIDTH)[None])


def _objective(flat: Any, embeddings: Any, target: Any, weight: Any) -> jax.Array:
    """|A - target|^2 / 2 + weight sum_i b_i at A (d^2,)."""
    return 0.5 * jnp.square(flat - target.ravel()).sum() + weight * barrier(_attention(flat), embeddings).sum()


@quick_jit
def _feasible_objective(flat: Any, embeddings: Any, target: Any, weight: Any) -> jax.Array:
    # The barrier itself is finite past the wall: infeasible points are refused here.
    is_feasible = (stability_margin(_attention(flat), embeddings) > 0).all()
    return jnp.where(is_feasible, _objective(flat, embeddings, target, weight), jnp.inf)


_gradient = quick_jit(jax.grad(_objective))
_hessian = quick_jit(jax.hessian(_objective))
_margins = quick_jit(lambda flat, embeddings: stability_margin(_attention(flat), embeddings))
_support = quick_jit(lambda flat, embeddings: support_tokens(_attention(flat), embeddings, LENGTH).positions)


def central_path(embeddings: Array, target: Array) -> tuple[Array, list[Array]]:
    """Minimisers of |A - target|^2 / 2 + lambda sum_i b_i for falling lambda: the last A, and each one's margins."""
    interaction, path = np.zeros_like(target), []
    for weight in LAMBDAS:
        found = minimize(
            _feasible_objective,
            interaction.ravel(),
            (embeddings, target, weight),
            jac=_gradient,
            hess=_hessian,
            method="trust-exact",
            options={"gtol": 1e-11, "initial_trust_radius": 1e-2, "maxiter": 2000},
        )
        interaction = found.x.reshape(target.shape)
        path.append(np.asarray(_margins(found.x, embeddings)))
    return interaction, path


def constrained_optimum(embeddings: Array, target: Array, start: Array) -> tuple[Array, Array]:
    """Optimum of |A - target|^2 / 2 subject to det J_i >= 0 by SLSQP, and its multipliers (n,) by least squares."""

    def constraint(flat: Array) -> Array:
        return margins(flat.reshape(target.shape), embeddings)

    found = minimize(
        lambda flat: 0.5 * np.square(flat - target.ravel()).sum(),
        start.ravel(),
        jac=lambda flat: flat - target.ravel(),
        constraints={"type": "ineq", "fun": constraint},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    slopes = approx_fprime(found.x, constraint, 1e-7)
    active = constraint(found.x) < 1e-6
    multipliers = np.zeros(len(embeddings))
    if active.any():
        multipliers[2:][active] = nnls(slopes[active].T, found.x - target.ravel())[0]
    return found.x.reshape(target.shape), multipliers


def run(plan: Plan) -> Outcome:
    """Follow the central path of drawn problems and compare its end with the constrained optimum."""
    cases = plan.count(24, 4)
    worst, optimum, concentration = Worst(), Worst(), Worst()
    at_random: list[float] = []
    rates: list[float] = []
    active_counts: dict[int, int] = {}
    shares = []
    skipped = 0
    for index in range(cases):
        seed = 1000 * plan.seed + index
        embeddings, target = problem(seed)
        interaction, path = central_path(embeddings, target)
        exact, multipliers = constrained_optimum(embeddings, target, interaction)
        found = LAMBDAS[-1] / path[-1]
        active = multipliers > ACTIVE * multipliers.max(initial=0.0)
        count = int(active.sum())
        if count == 0:
            skipped += 1
            continue
        active_counts[count] = active_counts.get(count, 0) + 1
        worst.see(np.abs(found - multipliers).max() / multipliers.max(), seed)
        optimum.see(np.abs(interaction - exact).max() / np.abs(exact).max(), seed)
        # The support tokens are those of the library at the end of the path, as many as there are active constraints.
        support = np.asarray(_support(interaction.ravel(), embeddings))[:count]
        by_lambda = [
            (weight / row)[support].sum() / (weight / row).sum() for weight, row in zip(LAMBDAS, path, strict=True)
        ]
        shares.append(by_lambda)
        concentration.see(1 - by_lambda[-1], seed)
        # Any `count` of the positions that have a margin at all: their mean share.
        at_random.append(count / (LENGTH - 2))
        inactive = [(weight / row)[~active].sum() for weight, row in zip(LAMBDAS, path, strict=True)]
        # A nearly active constraint lets go late: the rate is that of the last two decades.
        rates.append(float(np.polyfit(np.log(LAMBDAS[6:]), np.log(inactive[6:]), 1)[0]))
    mean_share = np.mean(shares, axis=0) if shares else np.zeros(len(LAMBDAS))
    random_share = float(np.mean(at_random)) if at_random else 1.0
    return Outcome(
        cases=cases - skipped,
        figure=worst.figure,
        holds=bool(
            shares
            and worst.figure <= TOLERANCE
            and optimum.figure <= TOLERANCE
            and concentration.figure <= 1 - CONCENTRATED
            and all(abs(rate - 1) < 0.1 for rate in rates)
        ),
        counterexample_figure=random_share,
        counterexample_fails=random_share < CONCENTRATED,
        details={
            "multiplier_error_relative_to_largest": worst.to_json(),
            "optimum_relative_error": optimum.to_json(),
            "largest_share_off_the_support_tokens": concentration.to_json(),
            "problems_by_number_of_active_positions": active_counts,
            "no_active_position": skipped,
            "lambda": list(LAMBDAS),
            "mean_share_of_support_tokens": mean_share.tolist(),
            "smallest_share_of_support_tokens": np.min(shares, axis=0).tolist() if shares else None,
            "random_positions_share": random_share,
            "rates_of_inactive_multipliers": rates,
        },
    )


CHECK = Check(
    id="support-tokens",
    claim="multipliers of the central path concentrate on the support tokens",
    statement=(
        "For A(lambda) = argmin |A - A*|^2 / 2 - lambda sum_i log m_i the multipliers lambda / m_i tend to those of"
        " min |A - A*|^2 / 2 subject to m_i >= 0, where active gradients are linearly independent: zero, like "
        "lambda, where m_i stays positive."
    ),
    mark="derived",
    regime=(
        "d = 2, identity values, eight fixed embeddings, A free and A* past the boundary; lambda from 1 to 1e-8. "
        "The analogy with support vectors is the paper's; this form of it is derived here."
    ),
    counterexample="As many positions at random carry their number's share of all multipliers, not all of them.",
    tolerance=TOLERANCE,
    tolerance_reason="lambda = 1e-8 divided by the curvature of the constraints, and SLSQP's own accuracy.",
    figure_name="largest error of a multiplier relative to the largest one",
    run=run,
)
