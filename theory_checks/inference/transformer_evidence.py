"""Section "evidence": Laplace's evidence of a transformer with few free weights, next to importance sampling."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import multivariate_normal
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.infer import Predictive

from benchmarks.result_tables import Column, Section
from prob_transformer.inference.laplace import laplace
from prob_transformer.inference.laplace.result import LaplaceResult
from prob_transformer.transformer.weight_sites import PREFIX
from theory_checks.inference.small_transformer import Sizes, searched, task

# How much wider than Laplace's Gaussian the proposal of importance sampling is.
WIDENED = 1.2


class Evidence(NamedTuple):
    """log p(y) in nats, its standard error, and the effective sample size as a share of the draws."""

    log_evidence: float
    standard_error: float
    ess_share: float


def importance_evidence(fit: LaplaceResult, key: PRNGKeyArray, draws: int) -> Evidence:
    """log p(y) by importance sampling from an even mixture of the prior and Laplace's Gaussian made wider.

    A weight is at most 2 p(y | z), because half of the mixture is the prior: no mode is without draws.
    """
    centre, _ = ravel_pytree(fit.mean)
    prior_key, gaussian_key = jax.random.split(key)
    half = draws // 2
    prior = Predictive(fit.mode.model, num_samples=half, return_sites=list(fit.sites))
    drawn = prior(prior_key, *fit.mode.model_args, **fit.mode.model_kwargs)
    wide = centre + WIDENED * fit.precision.sample(gaussian_key, half)
    z = jnp.concatenate([jax.vmap(lambda one: ravel_pytree(one)[0])(drawn), wide])

    def potentials(z: Float[Array, " k"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return fit.potential.value(z), fit.potential.value(z, likelihood=False)

    of_joint, of_prior = jax.jit(lambda z: jax.lax.map(potentials, z, batch_size=100))(z)
    gaussian = multivariate_normal.logpdf(z, centre, WIDENED**2 * fit.covariance())
    proposal = jnp.logaddexp(gaussian, -of_prior) - jnp.log(2)
    log_weights = np.asarray(-of_joint - proposal, np.float64)
    relative = np.exp(log_weights - log_weights.max())
    error = relative.std(ddof=1) / np.sqrt(len(relative)) / relative.mean()
    share = relative.mean() ** 2 / np.square(relative).mean()
    return Evidence(float(log_weights.max() + np.log(relative.mean())), float(error), float(share))


def run_evidence(sizes: Sizes) -> dict[str, Any]:
    """Laplace's evidence of models with few free weights, next to importance sampling."""
    one, rows = task(sizes.seed, sizes.sequences, sizes.held_out), []
    for index, (name, free) in enumerate((
        ("head", ["head"]),
        ("query of both layers", ["blocks[0].query", "blocks[1].query"]),
        ("query and key of layer 0", ["blocks[0].query", "blocks[0].key"]),
    )):  # fmt: skip
        few = one.with_free([f"{PREFIX}/{site}" for site in free])
        fit = laplace(searched(few, sizes)[0])
        found = importance_evidence(fit, jax.random.key(sizes.seed + index), sizes.importance_draws)
        difference = float(fit.log_evidence - found.log_evidence)
        laplaces = {"weights": fit.precision.size, "laplace": float(fit.log_evidence), "difference": difference}
        rows.append({"free": name, **laplaces, **found._asdict()})
    return {
        "setting": f"{sizes.importance_draws:,} draws; all other weights are those that drew the texts",
        "rows": rows,
        "targets": [],
        "notes": [],
    }


SECTION = Section(
    "evidence",
    "Evidence with few free weights",
    "Importance sampling draws half from the prior and half from Laplace's Gaussian made "
    f"{WIDENED:g} times as wide, so that no mode is without draws. Its effective sample size is a share of the draws.",
    (
        Column("free", "free weights", "text"),
        Column("weights", "how many", "count"),
        Column("laplace", "Laplace, nats", "number"),
        Column("log_evidence", "importance sampling, nats", "number"),
        Column("standard_error", "standard error", "number"),
        Column("ess_share", "effective sample size", "share"),
        Column("difference", "Laplace less importance sampling", "number"),
    ),
    run_evidence,
)
