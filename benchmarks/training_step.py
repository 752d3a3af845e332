"""Section "training-step": a step of the character model with the barrier on every layer, head and position."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.section import Column, Section, at_most
from benchmarks.sizes import Sizes
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


def _run_of(step: Step) -> Callable[[], Any]:
    return lambda: step(0)


def run_steps(sizes: Sizes) -> dict[str, Any]:
    """Times and ratios to the plain step."""
    steps = {name: prepare(sizes, config) for name, config in configurations(sizes).items()}
    seconds = paired_rounds({name: _run_of(step) for name, step in steps.items()}, sizes.rounds, "training-step")
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
