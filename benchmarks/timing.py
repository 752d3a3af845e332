"""Paired timings and the rate of a product of matrices, against which they are held.

In every round each contestant is timed once, so that whatever slows the machine slows them alike.

The order is rotated from round to round, and an untimed run of the same contestant comes before every timed one: a step
that follows one of two gigabytes was seen to take a quarter longer than one that follows its like. A ratio is taken
within each round; its median over the rounds is reported with the smallest and the largest.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

# Threads of one library spin for a moment after its last call; the next contestant is to have the cores to itself.
PAUSE_SECONDS = 0.02


def paired_rounds(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, description: str
) -> dict[str, list[float]]:
    """Seconds of every contestant, one entry a round. A contestant has to return only when its results are ready."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    with tqdm(total=rounds * len(contestants), desc=description, unit="run", leave=False, mininterval=1) as bar:
        for index in range(rounds):
            start = index % len(names)
            for name in names[start:] + names[:start]:
                time.sleep(PAUSE_SECONDS)
                # Compiles in the first round, and in all of them gives back the memory of the contestant before.
                contestants[name]()
                started = time.perf_counter()
                contestants[name]()
                seconds[name].append(time.perf_counter() - started)
                bar.update()
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of the rounds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(over: Sequence[float], under: Sequence[float], factor: float = 1.0) -> dict[str, float]:
    """Spread of factor * over / under, taken round by round. Raises ValueError unless both have the same rounds."""
    if len(over) != len(under):
        raise ValueError(f"under: has {len(under)} rounds and over {len(over)}; pass timings of the same rounds.")
    return spread([factor * a / b for a, b in zip(over, under, strict=True)])


def matmul(size: int, dtype: str = "float32") -> Callable[[], Any]:
    """A product of two size x size matrices by JAX, 2 size^3 operations, ready to be timed."""
    left, right = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(left, right))
