"""A runs.jsonl with a known truth, in the format of a sweep: plausible losses and margins, no training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paper_figures.study.design import METHODS
from paper_figures.study.perturbations import KINDS

STRENGTHS = (0.01, 0.1, 1.0)
CONTEXT = 64
_PROBABILITIES = np.linspace(0, 1, 41)


class Truth(NamedTuple):
    """What a method does: share by which increases change, share of clean loss it costs at strength 1, crossings left.

    `kinds` has other changes for some kinds of perturbation; `rescale` multiplies the embeddings.
    """

    effect: float = 0.0
    cost: float = 0.0
    crossings: float = 1.0
    kinds: Mapping[str, float] = {}
    rescale: float = 1.0


def write_runs(
    folder: Path,
    truths: Mapping[str, Truth],
    spread: float = 0.01,
    seeds: int = 5,
    strengths: tuple[float, ...] = STRENGTHS,
) -> Path:
    """DIR/runs.jsonl of the study's methods over seeds; `spread` is the relative noise of increases."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "runs.jsonl").open("w", encoding="utf-8") as stream:
        for seed in range(seeds):
            shared = random.normal()
            for method in METHODS:
                for strength in (0.0,) if method == "ce" else strengths:
                    run = line(method, strength, seed, truths.get(method, Truth()), spread, shared, random)
                    stream.write(json.dumps(run, allow_nan=False) + "\n")
    return folder


def line(
    method: str, strength: float, seed: int, truth: Truth, spread: float, shared: float, random: np.random.Generator
) -> dict[str, Any]:
    """One finished run. `shared` is what all runs of a seed have in common, so that pairing by seed takes it away."""
    cost = 0.0 if method == "ce" else truth.cost * strength
    clean = 2.3 * (1 + 0.01 * shared) * (1 + cost + 0.0002 * random.normal())
    crossings = 0.02 * (1.0 if method == "ce" else truth.crossings)
    return {
        "run": f"{method}-strength{strength:g}-seed{seed}",
        "profile": "synthetic",
        "method": method,
        "strength": strength,
        "seed": seed,
        "status": "finished",
        "provenance": {
            "version": "0.1.0",
            "commit": "0" * 40,
            "command": "python -m paper_figures.study sweep --profile full --out <here>",
            "seed": seed,
            "configuration": {
                "layers": 2,
                "width": 64,
                "heads": 4,
                "context": CONTEXT,
                "steps": 500,
                "batch": 16,
                "barrier_threshold": 0.5,
            },
            "packages": {"jax": "0.10.2"},
            "python": "3.11.7",
            "machine": "Linux x86_64, 2 cores",
        },
        "parameters": 115_456,
        "wall_seconds": 60.0,
        "seconds_per_step": 0.1,
        "corpus": {
            "name": "synthetic text & co",
            "sha256": "0" * 64,
            "characters": {"train": 2_402_977, "validation": 250_609, "test": 234_479, "news": 300_000},
            "vocabulary_size": 81,
        },
        "embedding_rms": 0.15 * truth.rescale,
        "splits": {
            name: _split(name, clean * factor, truth, strength, spread, shared, random)
            for name, factor in (("validation", 1.0), ("test", 1.01), ("news", 1.2))
        },
        "margins": _margins(method, crossings, random),
        "watch": _watch(method, [_levels(method, crossings, random) for _ in range(3)], crossings),
        "crossings": {
            site: {"steps_watched": 21, "steps_with_crossing": 1, "positions_watched": 9, "positions_negative": 1}
            for site in ("embedding", "layers")
        },
        "halved_steps": 0,
        "training": [{"step": 500, "loss": clean, "cross_entropy": clean, "penalty": 0.0}],
        "passage": _passage(method, random) if seed == 0 else None,
    }


def _split(
    name: str, clean: float, truth: Truth, strength: float, spread: float, shared: float, random: np.random.Generator
) -> dict[str, Any]:
    rows = []
    for kind, perturbation in KINDS.items() if name != "validation" else ():
        levels = perturbation.levels
        for level in levels:
            effect = truth.kinds.get(kind, truth.effect)
            full = 0.14 * (level / levels[len(levels) // 2]) ** 1.5 * (1 + 0.1 * shared)
            raised = full * (1 + effect * (0.0 if strength == 0 else 1.0) + spread * random.normal())
            rows.append(
                {
                    "kind": kind,
                    "level": level,
                    "nats_per_character": clean + raised,
                    "standard_error": 0.01,
                    "increase": raised,
                    "increase_standard_error": 0.003,
                }
            )
    clean_row = {"nats_per_character": clean, "standard_error": 0.01, "characters": 16_384}
    return {"name": name, "clean": clean_row, "perturbed": rows}


def _levels(method: str, crossings: float, random: np.random.Generator) -> np.ndarray:
    """det J of one site: mostly below 1 for plain training, pushed up by a two-sided barrier."""
    pushed = {"margin": 20.0, "map": 2.0, "one-sided": 1.1}.get(method.split("@", maxsplit=1)[0], 1.0)
    draws = pushed * np.exp(random.normal(-0.3, 0.5, 4000))
    draws[: round(crossings * len(draws))] *= -0.5
    return np.quantile(draws, _PROBABILITIES)


def _margins(method: str, crossings: float, random: np.random.Generator) -> dict[str, Any]:
    share = max(0.0, crossings * (1 + 0.05 * random.normal()))
    layers = [_levels(method, crossings, random) for _ in range(2)]
    quantiles = {"0.00": float(layers[0][0]), "0.01": float(layers[0][0] / 2), "0.50": float(layers[0][20])}
    summary = {
        "positions": 10_000,
        "negative_share": share,
        "determinant_quantiles": quantiles,
        "log_det_quantiles": quantiles,
        "conditioning_quantiles": quantiles,
    }
    return {
        "embedding": {**summary, "negative_share": 0.0, "determinant_levels": _levels(method, 0.0, random).tolist()},
        "layers": {
            **summary,
            "negative_share_per_layer_head": [[share] * 4] * 2,
            "determinant_levels": [levels.tolist() for levels in layers],
        },
    }


def _watch(method: str, last: list[np.ndarray], crossings: float) -> list[dict[str, Any]]:
    """Looks at every 25th of 500 steps: levels of 1 at first, at the end the given ones of embedding and two layers."""

    def one(step: int, site: int) -> dict[str, Any]:
        levels = 1 + step / 500 * (last[site] - 1)
        return {
            "negative_share": crossings * step / 500,
            "smallest": float(levels[0]),
            "barrier": -float(np.log(np.abs(levels)).mean()),
            "quantiles": [float(levels[place]) for place in (0, 2, 10, 20, 30, 38)],
        }

    seen: list[dict[str, Any]] = [
        {"step": step, "embedding": one(step, 0), "layers": [one(step, 1), one(step, 2)]} for step in range(0, 501, 25)
    ]
    # Where det J is past the largest number, a sweep writes null.
    if method.startswith("margin@layers"):
        seen[-1]["layers"][1]["quantiles"][-1] = None
    return seen


def _passage(method: str, random: np.random.Generator) -> dict[str, Any]:
    text = "Anarchism is a political philosophy & movement <sceptical> of all\njustifications for authority. " * 4
    text = text[: 3 * CONTEXT]

    def margins() -> list[float | None]:
        values: list[float | None] = [float(v) for v in random.choice(_levels(method, 0.02, random), len(text))]
        for start in range(0, len(text), CONTEXT):
            values[start : start + 2] = [None, None]
        return values

    return {"text": text, "margins": [margins(), margins()], "embedding": margins()}
