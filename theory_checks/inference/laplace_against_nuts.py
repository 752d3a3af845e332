"""Section "laplace-nuts": a Gaussian at the mode against draws from the posterior itself."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.diagnostics import effective_sample_size
from numpyro.infer.util import unconstrain_fn
from scipy.stats import kurtosis, norm, skew

from benchmarks.result_tables import Column, Section, at_most
from prob_transformer.inference import find_map, nuts
from prob_transformer.inference.laplace import laplace
from theory_checks.check import Check
from theory_checks.inference.inferred_models import (
    Problem,
    Sizes,
    judged,
    latent_problem,
    plane_problem,
    scalar_problem,
)

MEAN_BOUND, SD_BOUND = 0.1, 0.15
_BINS = 40


def marginal(
    name: str, coordinate: str, gaussian: tuple[float, float], draws: Float[np.ndarray, "chain draw"]
) -> dict[str, Any]:
    """A row of one coordinate: a Gaussian's (mean, sd) next to the draws of NUTS, their histogram and their shape."""
    mean, sd = gaussian
    flat = draws.ravel()
    true_mean, true_sd = float(flat.mean()), float(flat.std(ddof=1))
    counts, edges = np.histogram(flat, _BINS)
    # The distance of two laws that differ in this coordinate: sup |F - Phi|.
    ordered = norm.cdf(np.sort(flat), mean, sd)
    ranks = np.arange(1, len(flat) + 1) / len(flat)
    return {
        "model": name,
        "coordinate": coordinate,
        "nuts_mean": true_mean,
        "nuts_sd": true_sd,
        "laplace_mean": mean,
        "laplace_sd": sd,
        "mean_difference": abs(mean - true_mean) / true_sd,
        "sd_difference": abs(sd / true_sd - 1),
        "monte_carlo": float(1 / np.sqrt(effective_sample_size(draws))),
        "skewness": float(skew(flat)),
        "kurtosis": float(kurtosis(flat)),
        "distance": float(np.abs(ordered - ranks).max()),
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }


def compare(problem: Problem, sizes: Sizes) -> list[dict[str, Any]]:
    """A row a coordinate. Raises ValueError if the mode was not found or the chains are not fit for use."""
    mode = find_map(problem.model, model_args=problem.data, space="unconstrained", key=sizes.seed)
    approximation = laplace(mode)
    found = nuts(
        jax.random.key(sizes.seed),
        problem.model,
        model_args=problem.data,
        warmup=sizes.warmup,
        draws=sizes.draws,
        chains=sizes.chains,
        predictive=False,
    )
    draws = _flat(problem, {name: found.posterior[name] for name in approximation.sites})
    centre = np.concatenate([np.ravel(approximation.mean[name]) for name in approximation.sites])
    spread = np.sqrt(np.asarray(approximation.precision.variance()))
    names = [
        f"{name}{list(index) if index else ''}"
        for name in approximation.sites
        for index in np.ndindex(np.shape(approximation.mean[name]))
    ]
    return [
        marginal(problem.name, name, (float(centre[k]), float(spread[k])), draws[..., k])
        | {"status": found.status.name.lower()}
        for k, name in enumerate(names)
    ]


def _flat(problem: Problem, draws: dict[str, Any]) -> Float[np.ndarray, "chain draw k"]:
    """Draws in unconstrained coordinates, by the names of the sites, each row by row."""

    def unconstrained(sites: dict[str, Array]) -> Float[Array, " k"]:
        found = unconstrain_fn(problem.model, problem.data, {}, sites)
        return jnp.concatenate([found[name].ravel() for name in sorted(found)])

    return np.asarray(jax.jit(jax.vmap(jax.vmap(unconstrained)))(draws))


def _beyond(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence on the coordinates in which the two differ by more than the bounds, if there are any."""
    beyond = [row for row in rows if row["mean_difference"] > MEAN_BOUND or row["sd_difference"] > SD_BOUND]
    if not beyond:
        return []
    named = "; ".join(
        f"{row['model']}, {row['coordinate']} (skewness {row['skewness']:.2f}, excess kurtosis {row['kurtosis']:.2f})"
        for row in beyond
    )
    return [
        f"Beyond {MEAN_BOUND:g} sd or {SD_BOUND:.0%}: {named}. A Gaussian has neither: these "
        "posteriors are not Gaussian, and their mean is not their mode, where Laplace sits."
    ]


def run_laplace_nuts(sizes: Sizes) -> dict[str, Any]:
    """Few data, many data, and latent embeddings; the bounds are for the last two."""
    few = [
        row for problem in (scalar_problem, plane_problem) for row in compare(problem(sizes, sizes.sequences), sizes)
    ]
    many = [
        row
        for problem in (scalar_problem, plane_problem)
        for row in compare(problem(sizes, sizes.many_sequences), sizes)
    ]
    latent = compare(latent_problem(), sizes)
    targets = []
    for key, what, bound in (
        ("mean_difference", "largest difference of means, posterior sd", MEAN_BOUND),
        ("sd_difference", "largest relative difference of sds", SD_BOUND),
    ):
        for name in dict.fromkeys(row["model"] for row in [*many, *latent]):
            largest = max(row[key] for row in [*many, *latent] if row["model"] == name)
            targets.append(at_most(f"Laplace against NUTS, {name}: {what}", largest, bound))
    return {
        "setting": (
            f"sequences of {sizes.positions} embeddings drawn from the process; NUTS: {sizes.chains} chains of "
            f"{sizes.draws} draws after {sizes.warmup} of warm-up"
        ),
        "rows": [*few, *many, *latent],
        "targets": targets,
        "notes": _beyond([*few, *many, *latent]),
        "counterexample": max(row["mean_difference"] for row in [*few, *latent]) / MEAN_BOUND,
    }


SECTION = Section(
    "laplace-nuts",
    "Laplace against NUTS",
    "Models inside the safe region (A negative definite, identity values). Coordinates are those in which Laplace's "
    "approximation is Gaussian: positive parameters by their logarithm. Monte Carlo error is that of a NUTS mean, in "
    "posterior standard deviations. Skewness and excess kurtosis are those of the draws, 0 for a Gaussian; the "
    "distance is the largest between the two distribution functions.",
    (
        Column("model", "model", "text"),
        Column("coordinate", "coordinate", "text"),
        Column("nuts_mean", "NUTS mean", "number"),
        Column("laplace_mean", "Laplace mean", "number"),
        Column("nuts_sd", "NUTS sd", "number"),
        Column("laplace_sd", "Laplace sd", "number"),
        Column("mean_difference", "means differ by, sd", "number"),
        Column("sd_difference", "sds differ by", "number"),
        Column("monte_carlo", "Monte Carlo error, sd", "number"),
        Column("skewness", "skewness", "number"),
        Column("kurtosis", "excess kurtosis", "number"),
        Column("distance", "distance", "number"),
        Column("status", "NUTS status", "text"),
    ),
    run_laplace_nuts,
)

CHECK = Check(
    id=SECTION.name,
    claim="Laplace's Gaussian has the mean and the deviations of the posterior where data are many",
    statement="The means differ by at most 0.1 posterior deviations, and the deviations by at most 15 %.",
    mark="ours",
    regime="Parameters of the process inside the safe region, from 400 sequences, on the line and in the plane.",
    counterexample=(
        "With 40 sequences, or embeddings of four tokens, the posterior is not Gaussian: largest difference of means."
    ),
    tolerance=1.0,
    tolerance_reason="Asked for; the Monte Carlo error of a NUTS mean is about 0.03 deviations.",
    figure_name="largest difference of means or deviations, in units of its bound",
    run=partial(judged, compare=run_laplace_nuts, unless="latent"),
)
