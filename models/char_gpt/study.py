"""What the sweep trains: methods, their strengths, seeds and sizes.

Every method has one strength and as many values of it to choose from. All share data, steps, batches by seed, the
weight prior and the optimiser; what tells them apart is what their name says.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from models.char_gpt.config import Config

BASELINE = "ce"
LAMBDAS = (0.01, 0.02, 0.05, 0.1, 0.3, 1.0)


class Method(NamedTuple):
    """Options that make the method, the option its strength is given by, and the strengths it may choose from."""

    options: Mapping[str, Any]
    strength_option: str = "barrier_weight"
    strengths: tuple[float, ...] = LAMBDAS


def _barrier(objective: str, site: str, form: str = "two-sided") -> Method:
    return Method({"objective": objective, "barrier_site": site, "barrier_form": form})


def _regulariser(name: str, *strengths: float) -> Method:
    return Method({"objective": "ce", "regulariser": name}, "regulariser_strength", strengths)


BARRIERS = {
    "margin@embedding": _barrier("margin", "embedding"),
    "margin@layers": _barrier("margin", "layers"),
    "map@embedding": _barrier("map", "embedding"),
    "map@layers": _barrier("map", "layers"),
    "one-sided@embedding": _barrier("margin", "embedding", "one-sided"),
    "one-sided@layers": _barrier("margin", "layers", "one-sided"),
}
# The first order of the barrier -log det(I - R L_i), and the size of its matrix R L_i.
CONTROLS = {
    "trace@layers": _barrier("margin", "layers", "trace")._replace(strengths=(0.001, 0.003, 0.004, 0.005, 0.006, 0.01)),
    "frobenius@layers": _barrier("margin", "layers", "frobenius")._replace(
        strengths=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    ),
}
# Ranges laid by single runs with seed 100, which no profile uses, so that clean loss suffers by 0 to some 10 %.
COMPETITORS = {
    "dropout": _regulariser("dropout", 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    "weight-decay": _regulariser("weight-decay", 0.1, 0.3, 1.0, 2.0, 3.0, 5.0),
    "embedding-noise": _regulariser("embedding-noise", 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
    "jacobian": _regulariser("jacobian", 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
    "spectral": _regulariser("spectral", 0.03, 0.1, 0.2, 0.3, 0.5, 1.0),
}
# Plain cross-entropy has no strength to choose.
METHODS = {
    BASELINE: Method({"objective": "ce"}, "regulariser_strength", (0.0,)),
    **BARRIERS,
    **COMPETITORS,
    **CONTROLS,
}


class Profile(NamedTuple):
    """How large a sweep is: seeds, which strengths of a method by their place, and what all runs share."""

    seeds: tuple[int, ...]
    places: tuple[int, ...]
    base: Config


_SHARED: dict[str, Any] = {"implementation": "blocked", "checkpoint_every": 250}
PROFILES = {
    "smoke": Profile(
        (0, 1),
        (3,),
        Config(
            steps=10, layers=2, width=16, heads=2, context=16, batch=4, watch_every=5, evaluation_windows=16, **_SHARED
        ),
    ),
    "quick": Profile((0, 1, 2), (2, 4), Config(steps=100, batch=8, watch_every=10, evaluation_windows=64, **_SHARED)),
    "full": Profile((0, 1, 2, 3, 4), tuple(range(6)), Config(steps=500, watch_every=25, **_SHARED)),
}


def strengths_of(method: Method, profile: Profile) -> tuple[float, ...]:
    """The strengths a profile tries of a method."""
    if len(method.strengths) == 1:
        return method.strengths
    return tuple(method.strengths[place] for place in profile.places)


def configurations(profile: Profile) -> list[Config]:
    """Every run of a profile: seeds outermost, so that a sweep cut short holds whole seeds; then methods, strengths."""
    return [
        _configured(profile.base, seed, {**method.options, method.strength_option: strength})
        for seed in profile.seeds
        for method in METHODS.values()
        for strength in strengths_of(method, profile)
    ]


def _configured(base: Config, seed: int, options: dict[str, Any]) -> Config:
    return dataclasses.replace(base, seed=seed, **options)


def run_name(config: Config) -> str:
    return f"{config.method}-strength{config.strength:g}-seed{config.seed}"
