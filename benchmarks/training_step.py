"""Sections "training-step" and "subsampling": a step of the character model with the barrier on every layer and head.

The second says how far estimates of the mean barrier lie from it, and what deviation they report.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.problem_sizes import Sizes
from benchmarks.result_tables import Column, Section, at_most
from benchmarks.timing import paired_rounds, ratio, spread
from models.char_gpt.config import Config
from models.char_gpt.loss import LossTerms
from models.char_gpt.train import State, StepData, initial_state, train_step

PLAIN, EXACT, SUBSAMPLED = "plain cross-entropy", "exact barrier, fast", "subsampled barrier, fast"
BFLOAT16, REFERENCE = "exact barrier, fast, bfloat16 products", "exact barrier, the library's reference"
CHARACTERS = 100_000


def configurations(sizes: Sizes) -> dict[str, Config]:
    """The same model and batch, by what the step adds to the cross-entropy."""
    model: dict[str, Any] = {
        "barrier_site": "layers",
        "layers": sizes.layers,
        "width": sizes.width,
        "heads": sizes.heads,
        "context": sizes.length,
        "batch": sizes.batch,
        "seed": sizes.seed,
    }
    barrier = {**model, "objective": "margin", "implementation": "blocked"}
    return {
        PLAIN: Config(**model),
        EXACT: Config(**barrier),
        SUBSAMPLED: Config(**barrier, barrier_share=sizes.share),
        BFLOAT16: Config(**barrier, product_dtype="bfloat16"),
        REFERENCE: Config(**{**barrier, "implementation": "reference"}),
    }


Step = Callable[[int], tuple[State, LossTerms]]


def prepare(sizes: Sizes, config: Config) -> Step:
    """Model and data, and the step of a given number from the model's first state; nothing is carried over."""
    rng = np.random.default_rng(sizes.seed)
    # Time does not depend on what the characters are.
    characters = jnp.asarray(rng.integers(0, sizes.vocabulary, CHARACTERS, dtype=np.int32))
    state = initial_state(config, sizes.vocabulary)
    jax.block_until_ready((characters, state))
    return lambda step: jax.block_until_ready(train_step(StepData.of(characters, config, step), state, config))


def run_steps(sizes: Sizes) -> dict[str, Any]:
    """Times and ratios to the plain step."""
    steps = {name: partial(prepare(sizes, config), 0) for name, config in configurations(sizes).items()}
    seconds = paired_rounds(steps, sizes.rounds, "training-step")
    rows = [
        {"name": name, "seconds": of_rounds, "time": spread(of_rounds), "to_plain": ratio(of_rounds, seconds[PLAIN])}
        for name, of_rounds in seconds.items()
    ]
    exact, sampled = (ratio(seconds[name], seconds[PLAIN])["median"] for name in (EXACT, SUBSAMPLED))
    return {
        "setting": f"{describe(sizes)}; subsampled: share {sizes.share:g}",
        "rows": rows,
        "targets": [
            at_most("training step, exact barrier / plain", exact, 2.5),
            at_most(f"training step, barrier subsampled at {sizes.share:g} / plain", sampled, 1.15),
        ],
        "notes": [],
    }


def describe(sizes: Sizes) -> str:
    return (
        f"character GPT, batch {sizes.batch}, length {sizes.length}, width {sizes.width}, {sizes.heads} heads of "
        f"{sizes.head_size}, {sizes.layers} layers, {sizes.vocabulary} characters drawn at random, float32"
    )


SECTION = Section(
    "training-step",
    "Training step",
    "Forward and backward pass, Adam, and the barrier on every layer, head and position, from the first state of the "
    "model. The reference centres every covariance at its own position, in arrays of (n, n, p) under vmap.",
    (
        Column("name", "", "text"),
        Column("time", "time", "seconds"),
        Column("to_plain", "this / plain", "ratio"),
    ),
    run_steps,
)


def summary(exact: list[float], estimates: list[float], variances: list[float]) -> dict[str, float]:
    """Mean barrier, reported deviation (root of the mean variance), and root mean square and mean of the errors."""
    difference = np.asarray(estimates) - np.asarray(exact)
    return {
        "mean": float(np.mean(exact)),
        "reported_deviation": math.sqrt(np.mean(variances)),
        "error": math.sqrt(np.mean(difference**2)),
        "mean_error": float(difference.mean()),
    }


def run_subsampling(sizes: Sizes) -> dict[str, Any]:
    """Estimates in the training step against the exact mean of the same batch, over several batches and draws."""
    configs = configurations(sizes)
    exact_step, sampled_step = (prepare(sizes, configs[name]) for name in (EXACT, SUBSAMPLED))
    exact, estimates, variances = [], [], []
    for index in tqdm(range(sizes.draws), desc="subsampling", unit="batch", leave=False):
        exact.append(float(exact_step(index)[1].penalty))
        terms = sampled_step(index)[1]
        estimates.append(float(terms.penalty))
        variances.append(float(terms.penalty_variance))
    row = {"share": sizes.share, "draws": sizes.draws, **summary(exact, estimates, variances)}
    raw = {"exact": exact, "estimates": estimates, "variances": variances}
    return {"setting": describe(sizes), "rows": [{**row, **raw}], "targets": [], "notes": []}


SUBSAMPLING_SECTION = Section(
    "subsampling",
    "The subsampled barrier: spread of its estimate",
    "Each batch has an exact mean barrier and one estimate of it. The reported deviation is the root of the mean of "
    "the variances that the estimates carry; the actual one is the root mean square of estimate - exact. The estimate "
    "is unbiased, so the mean error shrinks with the number of batches.",
    (
        Column("share", "share", "number"),
        Column("draws", "batches", "count"),
        Column("mean", "mean barrier, nats", "number"),
        Column("reported_deviation", "reported deviation, nats", "number"),
        Column("error", "actual deviation, nats", "number"),
        Column("mean_error", "mean error, nats", "number"),
    ),
    run_subsampling,
)
