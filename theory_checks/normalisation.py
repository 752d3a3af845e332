"""Claim: the signed mass is always 1, and the mass of the density is the expected number of roots."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from prob_transformer import Attention, EmbeddingProcess, residual_and_log_det
from theory_checks.check import Check, Outcome
from theory_checks.compiling import quick_jit
from theory_checks.quadrature import Integral, expected_roots, integrate

TOLERANCE = 1e-6
# The error that quadrature is asked for; what it reaches is reported, and must leave room below TOLERANCE.
QUADRATURE_1D, QUADRATURE_2D = 1e-10, 1e-7
PAST = (-1.0, 1.0, 0.3)
NOISE_SCALE = 0.5
STRENGTHS = (-3.0, -1.0, 0.0, 0.5, 1.0, 1.3, 1.5, 2.0, 3.0, 4.0, 6.0)
OTHER_PASTS = ((-0.4, 1.7), (2.0, 2.0, -1.0, 0.1))
# Masses of the worked example in docs/theory.md section 3, to its four decimals.
WORKED_EXAMPLE = {1.5: 1.0313, 4.0: 2.1239}
# Standard deviations of noise beyond which no mass is left at double precision.
TAIL = 9.0

Signed = Callable[[Attention, ArrayLike, NDArray[np.float64]], jax.Array]


def scalar_attention(strength: float) -> Attention:
    """d = 1, one head, identity values, A = strength."""
    return Attention(jnp.full((1, 1, 1), strength), jnp.ones((1, 1, 1)))


def interaction_attention(interaction: NDArray[np.float64]) -> Attention:
    """One head with identity values and the given interaction A (d, d): W_K = I, p = d."""
    width = interaction.shape[0]
    return Attention(jnp.asarray(np.sqrt(width) * interaction)[None], jnp.eye(width)[None])


def signed_density(noise_scale: float) -> Signed:
    """Compiled p(u | past) of the last position with and without the sign of det J: (attention, past, u) -> (m, 2)."""

    @quick_jit
    def density(attention: Attention, past: Any, last: Any) -> jax.Array:
        def one(embedding):
            embeddings = jnp.concatenate([past, embedding[None]])
            process = EmbeddingProcess(attention, embeddings.shape[0], noise_scale)
            absolute = jnp.exp(process.position_log_prob(embeddings)[-1])
            return jnp.stack([absolute, residual_and_log_det(attention, embeddings).sign[-1] * absolute])

        return jax.vmap(one)(last)

    return density


def masses(
    density: Signed, attention: Attention, past: ArrayLike, noise_scale: float, tolerance: float = QUADRATURE_1D
) -> Integral:
    """Mass and signed mass of the next position given the past (m, d), identity values."""
    past = np.asarray(past, float)
    # mu is a mean of the past, so |e| exceeds TAIL standard deviations outside this box.
    low, high = past.min(axis=0) - TAIL * noise_scale, past.max(axis=0) + TAIL * noise_scale
    return integrate(lambda u: density(attention, past, u), low, high, tolerance=tolerance)


def scalar_residual(strength: float, past: ArrayLike, u: NDArray[np.float64]) -> NDArray[np.float64]:
    """e(u) = u - sum_s softmax_s(strength u_s u) u_s for d = 1 in plain NumPy, no library code."""
    past = np.asarray(past, float)
    logits = strength * np.outer(u, past)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return u - (weights @ past) / weights.sum(axis=1)


def roots(strength: float, past: ArrayLike, noise_scale: float) -> float:
    """Expected number of roots of the next position for d = 1."""
    low, high = float(np.min(past)) - TAIL * noise_scale, float(np.max(past)) + TAIL * noise_scale
    return expected_roots(lambda u: scalar_residual(strength, past, u), noise_scale, low, high)


def _one_dimension() -> tuple[list[dict[str, Any]], float]:
    rows, worst = [], 0.0
    for noise_scale in (NOISE_SCALE, 0.2):
        density = signed_density(noise_scale)
        for past in (PAST, *OTHER_PASTS):
            for strength in STRENGTHS:
                column = np.array(past)[:, None]
                (mass, signed), error, _ = masses(density, scalar_attention(strength), column, noise_scale)
                expected = roots(strength, past, noise_scale)
                worst = max(worst, abs(mass - expected), abs(signed - 1), float(error.max()))
                rows.append(
                    {
                        "strength": strength,
                        "past": list(past),
                        "noise_scale": noise_scale,
                        "mass": float(mass),
                        "signed_mass": float(signed),
                        "expected_roots": expected,
                        "quadrature_error": float(error.max()),
                    }
                )
    return rows, worst


def _two_dimensions() -> tuple[list[dict[str, Any]], float]:
    """Inside both sufficient conditions the mass is 1; d = 2, identity values."""
    rng = np.random.default_rng(0)
    density = signed_density(NOISE_SCALE)
    rows, worst = [], 0.0
    for condition in ("negative semidefinite", "contraction"):
        past = rng.normal(size=(3, 2))
        factor = rng.normal(size=(2, 2))
        if condition == "negative semidefinite":
            interaction = -factor @ factor.T + 1.5 * np.array([[0.0, 1.0], [-1.0, 0.0]])
        else:
            diameter = max(np.linalg.norm(x - y) for x in past for y in past)
            interaction = factor * 0.95 / (np.linalg.norm(factor, ord=2) * diameter**2 / 4)
        attention = interaction_attention(interaction)
        (mass, signed), error, points = masses(density, attention, past, NOISE_SCALE, QUADRATURE_2D)
        worst = max(worst, abs(mass - 1), abs(signed - 1), float(error.max()))
        rows.append(
            {
                "condition": condition,
                "mass": float(mass),
                "signed_mass": float(signed),
                "quadrature_error": float(error.max()),
                "points": points,
            }
        )
    return rows, worst


def run(cases: int | None = None) -> Outcome:
    """Integrate the density of the next position over fixed grids; `cases` is ignored."""
    scalar_rows, scalar_worst = _one_dimension()
    plane_rows, plane_worst = _two_dimensions()
    example = {
        row["strength"]: row["mass"]
        for row in scalar_rows
        if row["past"] == list(PAST) and row["noise_scale"] == NOISE_SCALE
    }
    worked = max(abs(example[strength] - mass) for strength, mass in WORKED_EXAMPLE.items())
    excess = min(example[strength] for strength in WORKED_EXAMPLE) - 1
    worst = max(scalar_worst, plane_worst)
    return Outcome(
        cases=len(scalar_rows) + len(plane_rows),
        figure=worst,
        holds=bool(worst < TOLERANCE and worked < 6e-5),
        counterexample_figure=float(excess),
        counterexample_fails=bool(excess > 1e3 * TOLERANCE),
        details={
            "worked_example_mass": {str(strength): example[strength] for strength in WORKED_EXAMPLE},
            "worked_example_largest_difference": float(worked),
            "one_dimension": scalar_rows,
            "two_dimensions": plane_rows,
        },
    )


CHECK = Check(
    id="normalisation",
    claim="signed mass 1; mass of the density = expected number of roots",
    statement=(
        "int N(e) det J du = 1, int N(e) |det J| du = E[number of roots u of e(u) = eps], for the next position given "
        "its past."
    ),
    mark="derived",
    regime=(
        "Every parameter value: d = 1 over a from -3 to 6, on both sides of the boundary; d = 2 inside the two "
        "sufficient conditions, where the number of roots is 1."
    ),
    counterexample="Past the boundary the mass is not 1: d = 1, past (-1, 1, 0.3), sigma 0.5, a = 1.5 and a = 4.",
    tolerance=TOLERANCE,
    tolerance_reason="Required; the estimated error of the quadrature is part of the figure.",
    figure_name="largest difference of masses, or quadrature error",
    run=run,
)
