"""Section "calibration": ranks of what a dataset was drawn with among posterior draws of NUTS, Laplace, particles."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from scipy.stats import binom, chisquare, norm
from tqdm import tqdm

from benchmarks.result_tables import Column, Section, at_least
from models.scalar.dataset import decoder, parameter_model
from models.scalar.density import scalar_attention
from prob_transformer import EmbeddingProcess
from prob_transformer.inference import ParticleStatus, find_map, nuts, particle_filter, smooth
from prob_transformer.inference.calibration import ranks, uniformity
from prob_transformer.inference.laplace import laplace
from theory_checks.check import Check
from theory_checks.inference.inferred_models import CALIBRATION_PRIORS, TRUE_A, TRUE_NOISE_SCALE, Sizes, judged

SITES = CALIBRATION_PRIORS._fields
# Five in a hundred that a correct method misses it, over all the quantities that are ranked for it.
LEVEL = 0.05
BINS = 20
# Standard deviations of a posterior as a share of the right ones, for which the power of the test is given.
TOO_NARROW = (0.9, 0.85, 0.8)
_SIMULATED_STUDIES = 20_000
# Share of studies in which posteriors much too narrow have to be noticed.
ASKED_POWER = 0.9


def rank_law(width: float, draws: int) -> Float[np.ndarray, " bins"]:
    """Probabilities of the bins of a rank where the posterior is normal and its draws have `width` times its deviation.

    The truth is z ~ N(0, 1) about the posterior mean, and a draw lies below it with probability Phi(z / width).
    """
    z, weights = np.polynomial.hermite_e.hermegauss(200)
    of_ranks = binom.pmf(np.arange(draws + 1)[:, None], draws, norm.cdf(z / width)) @ (weights / weights.sum())
    return of_ranks.reshape(BINS, -1).sum(1)


def power(width: float, replicates: int, draws: int, level: float) -> float:
    """Share of simulated studies whose chi-square test at `level` rejects draws `width` times as wide as right."""
    law = rank_law(width, draws)
    counts = np.random.default_rng(0).multinomial(replicates, law / law.sum(), _SIMULATED_STUDIES)
    return float((chisquare(counts, axis=1).pvalue < level).mean())


def simulate(key: PRNGKeyArray, sizes: Sizes) -> tuple[Float[np.ndarray, "R 2"], Float[Array, "R S n 1"]]:
    """Parameters from the prior, and embeddings from the process with each of them."""

    @jax.jit
    @jax.vmap
    def one(key: PRNGKeyArray) -> tuple[Float[Array, " 2"], Float[Array, "S n 1"]]:
        keys = jax.random.split(key, 3)
        b, noise_scale = (
            jnp.exp(mean + deviation * jax.random.normal(k))
            for (mean, deviation), k in zip(CALIBRATION_PRIORS, keys, strict=False)
        )
        process = EmbeddingProcess(scalar_attention(-b), sizes.calibration_positions, noise_scale)
        return jnp.stack([b, noise_scale]), process.sample(keys[2], (sizes.calibration_sequences,))

    truths, embeddings = one(jax.random.split(key, sizes.replicates))
    return np.asarray(truths), embeddings


def _nuts_draws(embeddings: Float[Array, "S n 1"], seed: int, sizes: Sizes) -> tuple[Float[np.ndarray, "L 2"], str]:
    count = (sizes.ranked_draws + 1) * sizes.thinning
    found = nuts(
        jax.random.key(seed),
        parameter_model,
        model_args=(embeddings, CALIBRATION_PRIORS),
        warmup=sizes.warmup,
        draws=count,
        chains=1,
        predictive=False,
    )
    kept = slice(sizes.thinning - 1, count - 1, sizes.thinning)
    return np.stack([np.asarray(found.posterior[site])[0, kept] for site in SITES], -1), found.status.name.lower()


def _laplace_draws(embeddings: Float[Array, "S n 1"], seed: int, sizes: Sizes) -> tuple[Float[np.ndarray, "L 2"], str]:
    start_key, draw_key = jax.random.split(jax.random.key(seed))
    mode = find_map(parameter_model, model_args=(embeddings, CALIBRATION_PRIORS), space="unconstrained", key=start_key)
    drawn = laplace(mode).sample(draw_key, sizes.ranked_draws)
    return np.stack([np.asarray(drawn[site]) for site in SITES], -1), mode.status.name.lower()


def _parameter_rows(sizes: Sizes) -> Iterator[dict[str, Any]]:
    truths, embeddings = simulate(jax.random.key(sizes.seed), sizes)
    for name, method in (("NUTS", _nuts_draws), ("Laplace", _laplace_draws)):
        draws, statuses = [], dict[str, int]()
        for replicate in tqdm(range(sizes.replicates), desc=f"calibration, {name}", unit="dataset", leave=False):
            drawn, status = method(embeddings[replicate], sizes.seed + replicate, sizes)
            draws.append(drawn)
            statuses[status] = statuses.get(status, 0) + 1
        found = ranks(truths, np.array(draws))
        yield from (_row(name, site, found[:, k], sizes, statuses) for k, site in enumerate(SITES))


def _particle_rows(sizes: Sizes) -> Iterator[dict[str, Any]]:
    attention, length = scalar_attention(TRUE_A), sizes.calibration_positions
    process = EmbeddingProcess(attention, length, TRUE_NOISE_SCALE)

    @jax.jit
    @jax.vmap
    def one(key: PRNGKeyArray) -> tuple[Float[Array, " n"], Float[Array, "L n"], Int[Array, ""]]:
        data_key, token_key, filter_key, smooth_key = jax.random.split(key, 4)
        truth = process.sample(data_key)
        tokens: Int[Array, " n"] = jax.random.categorical(token_key, decoder()(truth))
        found = particle_filter(
            filter_key, attention, decoder(), tokens, sizes.calibration_particles, noise_scale=TRUE_NOISE_SCALE
        )
        return truth[:, 0], smooth(smooth_key, found, sizes.ranked_draws)[..., 0], found.status

    keys = jax.random.split(jax.random.key(sizes.seed + 1), sizes.replicates)
    # In parts, so that the caches of all particles of all datasets are not alive at once.
    parts = [one(part) for part in tqdm(np.array_split(keys, 10), desc="calibration, particles", leave=False)]
    truths, draws, status = (np.concatenate([np.asarray(part[k]) for part in parts]) for k in range(3))
    statuses = {ParticleStatus(code).name.lower(): int((status == code).sum()) for code in np.unique(status)}
    found = ranks(truths, draws)
    yield from (_row("particles", f"u_{i + 1}", found[:, i], sizes, statuses) for i in range(length))


def _row(
    method: str, quantity: str, found: Int[np.ndarray, " R"], sizes: Sizes, statuses: dict[str, int]
) -> dict[str, Any]:
    seen = uniformity(found, sizes.ranked_draws, BINS)
    return {
        "method": method,
        "quantity": quantity,
        "replicates": len(found),
        "p_value": seen.p_value,
        "shift": seen.shift,
        "width": seen.width,
        "status": ", ".join(f"{name} {count}" for name, count in sorted(statuses.items())),
        "counts": seen.counts.tolist(),
    }


def run_calibration(sizes: Sizes) -> dict[str, Any]:
    """All three methods; every replicate counts, whatever its status."""
    rows = [*_parameter_rows(sizes), *_particle_rows(sizes)]
    targets, notes, noticed = [], [], []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row["p_value"] for row in rows if row["method"] == method]
        smallest = min(1.0, len(own) * min(own))
        powers = {w: power(w, sizes.replicates, sizes.ranked_draws, LEVEL / len(own)) for w in TOO_NARROW}
        noticed.append(power(sizes.much_too_narrow, sizes.replicates, sizes.ranked_draws, LEVEL / len(own)))
        found = ", ".join(f"{1 - width:.0%} too small with power {share:.2f}" for width, share in powers.items())
        notes.append(f"{method}: where the posterior is normal, the test of one quantity finds a deviation {found}.")
        targets.append(at_least(f"calibration, {method}: smallest p-value times their number", smallest, LEVEL))
    return {
        "setting": (
            f"{sizes.replicates} datasets, ranks among {sizes.ranked_draws} draws in {BINS} bins; parameters: "
            f"{sizes.calibration_sequences} sequences of {sizes.calibration_positions} embeddings, NUTS thinned by "
            f"{sizes.thinning}; particles: {sizes.calibration_positions} tokens, {sizes.calibration_particles} "
            "particles, smoothed paths"
        ),
        "rows": rows,
        "targets": targets,
        "notes": notes,
        "counterexample": min(noticed) / ASKED_POWER,
    }


SECTION = Section(
    "calibration",
    "Simulation-based calibration",
    "Parameters drawn from the prior, a dataset drawn with them, and their rank among posterior draws: uniform if "
    "the posterior is right (Talts et al. 2018). p is that of a chi-square test in 20 bins. Shift and width are in "
    "standard errors: a shift above 0 means posterior draws too small, a width above 0 a posterior too narrow. Every "
    "dataset counts, whatever the status of the method on it.",
    (
        Column("method", "method", "text"),
        Column("quantity", "quantity", "text"),
        Column("replicates", "datasets", "count"),
        Column("p_value", "p", "number"),
        Column("shift", "shift", "number"),
        Column("width", "width", "number"),
        Column("status", "status", "text"),
    ),
    run_calibration,
)

CHECK = Check(
    id=SECTION.name,
    claim="posteriors are calibrated",
    statement="The rank of what a dataset was drawn with among its posterior draws is uniform (Talts et al. 2018).",
    mark="ours",
    regime="Parameters by NUTS and by Laplace, embeddings by particles, inside the safe region; every dataset counts.",
    counterexample=(
        f"Posteriors 20 % too narrow: the power of the same test, in units of {ASKED_POWER:g}, smallest of the methods."
    ),
    tolerance=1.0,
    tolerance_reason=f"A right method is rejected with probability {LEVEL:g} over all its quantities (Bonferroni).",
    figure_name=f"{LEVEL:g} over the smallest p-value times the number of quantities",
    run=partial(judged, compare=run_calibration),
)
