"""Section "conjugate": without interaction the posterior is Gaussian, and every method has to find it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.diagnostics import effective_sample_size

from benchmarks.result_tables import Column, Section, at_most
from prob_transformer import Attention
from prob_transformer.inference import find_map, nuts, particle_filter
from prob_transformer.inference.laplace import laplace
from theory_checks.check import Check
from theory_checks.inference.inferred_models import OBSERVATION_SCALE, TRUE_NOISE_SCALE, Sizes, conjugate_model, judged
from theory_checks.truth.token_models import BUMPS, SCALES, TOKENS, conjugate_truth, gaussian_posterior

LENGTH, WIDTH = 4, 2
# Of what a closed form is compared with to rounding, and standard errors that chance may leave to draws.
TOLERANCE, MOST_ERRORS = 1e-6, 3.0


def _standard_errors(draws: Float[np.ndarray, "chain draw ..."], truth: Float[np.ndarray, "..."]) -> float:
    """The largest distance of a mean of correlated draws from the truth, in Monte Carlo standard errors."""
    error = draws.std((0, 1), ddof=1) / np.sqrt(effective_sample_size(draws))
    return float(np.abs((draws.mean((0, 1)) - truth) / error).max())


def _particle_row(sizes: Sizes) -> dict[str, Any]:
    evidence, mean, variance = conjugate_truth()
    attention = Attention(jnp.zeros((1, WIDTH, WIDTH)), jnp.eye(WIDTH)[None])

    @jax.jit
    @jax.vmap
    def run(key: PRNGKeyArray) -> tuple[Float[Array, ""], Float[Array, "n d"], Float[Array, "n d"]]:
        found = particle_filter(key, attention, BUMPS, jnp.asarray(TOKENS), sizes.particles, **SCALES)
        weights, u = jnp.exp(found.log_weights)[:, None, None], found.embeddings
        return found.log_evidence, (weights * u).sum(0), (weights * jnp.square(u - mean)).sum(0)

    log_evidences, means, squares = map(np.asarray, run(jax.random.split(jax.random.key(sizes.seed), sizes.repeats)))
    # Z and Z times a weighted mean are unbiased for any number of particles, so nothing is left but chance.
    relative = np.exp(log_evidences - np.log(evidence))

    def deviation(estimates: Float[np.ndarray, "repeats ..."], truth: Float[np.ndarray, "..."] | float) -> float:
        error = estimates.std(0, ddof=1) / np.sqrt(sizes.repeats)
        return float(np.abs((estimates.mean(0) - truth) / error).max())

    of_means = deviation(relative[:, None, None] * means, mean)
    spread = np.broadcast_to(variance[:, None], mean.shape)
    return {
        "method": f"particles, {sizes.repeats} runs of {sizes.particles}",
        "evidence_deviation": deviation(relative[:, None], 1.0),
        "mean_deviation": of_means,
        "spread_deviation": deviation(relative[:, None, None] * squares, spread),
    }


_DEVIATIONS = {"evidence": "evidence_deviation", "means": "mean_deviation", "variances": "spread_deviation"}


def _deviation_target(row: dict[str, Any], what: str) -> dict[str, Any]:
    return at_most(f"conjugate: {row['method']}, {what}, standard errors", row[_DEVIATIONS[what]], MOST_ERRORS)


def run_conjugate(sizes: Sizes) -> dict[str, Any]:
    """MAP and Laplace against the closed form, to rounding; NUTS and particles to Monte Carlo error."""
    seen = np.random.default_rng(sizes.seed).normal(size=(LENGTH, WIDTH)) * 2
    scales = np.array([1.0] + [TRUE_NOISE_SCALE] * (LENGTH - 1))
    truth = gaussian_posterior(seen, scales, OBSERVATION_SCALE)
    mode = find_map(
        conjugate_model, model_args=(jnp.asarray(seen),), space="unconstrained", key=sizes.seed, tolerance=1e-9
    )
    approximation = laplace(mode)
    full = np.kron(truth.covariance, np.eye(WIDTH))
    map_error = float(np.abs(np.asarray(mode.parameters["embeddings"]) - truth.mean).max())
    noisier = gaussian_posterior(seen, scales, 1.1 * OBSERVATION_SCALE)
    covariance_error = float(np.abs(np.asarray(approximation.covariance()) - full).max())
    evidence_error = abs(float(approximation.log_evidence) - truth.log_evidence)
    rows: list[dict[str, Any]] = [
        {"method": "MAP", "mean_error": map_error},
        {
            "method": "Laplace, full",
            "mean_error": map_error,
            "spread_error": covariance_error,
            "evidence_error": evidence_error,
        },
    ]
    targets = [
        at_most("conjugate: MAP, largest error of a coordinate", map_error, TOLERANCE),
        at_most("conjugate: Laplace, largest error of a covariance", covariance_error, TOLERANCE),
        at_most("conjugate: Laplace, error of the log-evidence, nats", evidence_error, TOLERANCE),
    ]
    for embeddings in ("direct", "noise"):
        found = nuts(
            jax.random.key(sizes.seed),
            conjugate_model,
            model_args=(jnp.asarray(seen),),
            warmup=sizes.warmup,
            draws=sizes.draws,
            chains=sizes.chains,
            predictive=False,
            embeddings=embeddings,
        )
        draws = np.asarray(found.posterior["embeddings"])
        variances = np.broadcast_to(np.diag(truth.covariance)[:, None], truth.mean.shape)
        row: dict[str, Any] = {
            "method": f"NUTS, embeddings sampled {'directly' if embeddings == 'direct' else 'through their noise'}",
            "status": found.status.name.lower(),
            "mean_deviation": _standard_errors(draws, truth.mean),
            "spread_deviation": _standard_errors(np.square(draws - truth.mean), variances),
        }
        rows.append(row)
        targets += [_deviation_target(row, what) for what in ("means", "variances")]
    rows.append(_particle_row(sizes))
    targets += [_deviation_target(rows[-1] | {"method": "particles"}, what) for what in _DEVIATIONS]
    return {
        "setting": f"{LENGTH} embeddings of width {WIDTH} (particles: 3), A = 0, float64",
        "rows": rows,
        "targets": targets,
        "notes": [],
        "counterexample": float(np.abs(np.asarray(mode.parameters["embeddings"]) - noisier.mean).max()) / TOLERANCE,
    }


SECTION = Section(
    "conjugate",
    "The conjugate Gaussian",
    "Without interaction (A = 0) every embedding is the plain mean of its past plus noise, and with Gaussian "
    "observations the posterior is Gaussian: mean, covariance and evidence by linear algebra in NumPy. Particles see "
    "tokens, whose probabilities are Gaussian bumps of the embedding, which is conjugate as well. Errors are the "
    "largest over all coordinates; deviations are in Monte Carlo standard errors, the largest of eight coordinates "
    "(particles: six).",
    (
        Column("method", "method", "text"),
        Column("mean_error", "error of the mean", "error"),
        Column("spread_error", "error of the covariance", "error"),
        Column("evidence_error", "error of the log-evidence", "error"),
        Column("mean_deviation", "means, standard errors", "number"),
        Column("spread_deviation", "variances, standard errors", "number"),
        Column("evidence_deviation", "evidence, standard errors", "number"),
        Column("status", "status", "text"),
    ),
    run_conjugate,
)

CHECK = Check(
    id=SECTION.name,
    claim="every method finds the posterior of the conjugate Gaussian",
    statement="With A = 0 and Gaussian observations MAP, Laplace, NUTS and particles give the closed form.",
    mark="ours",
    regime="A = 0; MAP and Laplace to rounding, NUTS (both coordinates) and particles to Monte Carlo error.",
    counterexample="The mode is not that of the closed form with observations 10 % noisier.",
    tolerance=1.0,
    tolerance_reason=f"{TOLERANCE:g} where nothing is drawn, {MOST_ERRORS:g} standard errors where something is.",
    figure_name="largest error in units of its bound",
    run=partial(judged, compare=run_conjugate),
)
