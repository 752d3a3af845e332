"""What the study trains: methods, their strengths, seeds and sizes.

Every method has one strength and as many values of it to choose from. All share data, steps, batches by seed, the
weight prior and the optimiser; what tells them apart is what their name says.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from models.char_gpt import train
from models.char_gpt.config import Config
from models.char_gpt.loss import Loss, loss_terms
from paper_figures.study.regularisers import LOSSES, decayed
from prob_transformer._validation import require_choice

BASELINE = "ce"
LAMBDAS = (0.01, 0.02, 0.05, 0.1, 0.3, 1.0)


class Method(NamedTuple):
    """The strengths a method may choose from, and what makes it: options of the configuration, or a loss in its place."""

    strengths: tuple[float, ...] = LAMBDAS
    options: Mapping[str, Any] = {}
    loss: Loss | None = None
    update: train.Update | None = None


BARRIERS = {
    f"{name}@{site}": Method(options={"objective": objective, "barrier_form": form, "barrier_site": site})
    for name, objective, form in (
        ("margin", "margin", "two-sided"),
        ("map", "map", "two-sided"),
        ("one-sided", "margin", "one-sided"),
    )
    for site in ("embedding", "layers")
}
# The first order of the barrier -log det(I - R L_i), and the size of its matrix R L_i: neither barriers nor competitors,
# with questions of their own.
FIRST_ORDER, SMALL_MOMENTS = "trace@layers", "frobenius@layers"
CONTROLS = {
    FIRST_ORDER: Method((0.001, 0.003, 0.004, 0.005, 0.006, 0.01), loss=LOSSES["trace"]),
    SMALL_MOMENTS: Method((0.003, 0.01, 0.03, 0.1, 0.3, 1.0), loss=LOSSES["frobenius"]),
}
# Ranges laid by single runs with seed 100, which no profile uses, so that clean loss suffers by 0 to some 10 %.
COMPETITORS = {
    "dropout": Method((0.005, 0.01, 0.02, 0.05, 0.1, 0.2), loss=LOSSES["dropout"]),
    "weight-decay": Method((0.1, 0.3, 1.0, 2.0, 3.0, 5.0), loss=loss_terms, update=decayed),
    "embedding-noise": Method((0.05, 0.1, 0.15, 0.2, 0.3, 0.5), loss=LOSSES["embedding-noise"]),
    "jacobian": Method((0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03), loss=LOSSES["jacobian"]),
    "spectral": Method((0.03, 0.1, 0.2, 0.3, 0.5, 1.0), loss=LOSSES["spectral"]),
}
# Plain cross-entropy has no strength to choose. In the order of figures and tables.
METHODS = {BASELINE: Method((0.0,)), **BARRIERS, **CONTROLS, **COMPETITORS}


@dataclasses.dataclass(frozen=True)
class Design:
    """One run of the study: a method, its strength, and the configuration with seed and sizes.

    Raises ValueError for an unknown method, and for a strength that is none of it.
    """

    method: str
    strength: float
    base: Config

    def __post_init__(self) -> None:
        require_choice("--method", self.method, tuple(METHODS))
        if not 0 <= self.strength < (1 if self.method == "dropout" else float("inf")):
            allowed = "a share below 1" if self.method == "dropout" else "a finite number of at least 0"
            raise ValueError(f"--strength: got {self.strength} for {self.method}; pass {allowed}.")

    @property
    def name(self) -> str:
        return f"{self.method}-strength{self.strength:g}-seed{self.base.seed}"

    @property
    def config(self) -> Config:
        """The base with the options of the method."""
        options = dict(METHODS[self.method].options)
        if options:
            options["barrier_weight"] = self.strength
        return dataclasses.replace(self.base, **options)

    @property
    def loss(self) -> train.Method | None:
        """The loss in place of the configuration's own, if the method has one."""
        _, _, loss, update = METHODS[self.method]
        return None if loss is None else train.Method(self.method, self.strength, loss, update)

    @property
    def configuration(self) -> dict[str, Any]:
        """All that the run depends on but its text, as it is saved."""
        return train.full_configuration(self.config, self.loss)


class Profile(NamedTuple):
    """How large a sweep is: seeds, which strengths of a method by their place, and what all runs share."""

    seeds: tuple[int, ...]
    places: tuple[int, ...]
    base: Config


_SMOKE = Config(
    steps=10, layers=2, width=16, heads=2, context=16, batch=4, watch_every=5, evaluation_windows=16,
    implementation="blocked", checkpoint_every=250,
)  # fmt: skip
_QUICK = Config(steps=100, batch=8, evaluation_windows=64, implementation="blocked", checkpoint_every=250)
_FULL = Config(steps=500, watch_every=25, implementation="blocked", checkpoint_every=250)
PROFILES = {
    "smoke": Profile((0, 1), (3,), _SMOKE),
    "quick": Profile((0, 1, 2), (2, 4), _QUICK),
    "full": Profile((0, 1, 2, 3, 4), tuple(range(6)), _FULL),
}


def designs(profile: Profile) -> list[Design]:
    """Every run of a profile: seeds outermost, so that a sweep cut short holds whole seeds; then methods, strengths."""
    return [
        Design(name, strength, dataclasses.replace(profile.base, seed=seed))
        for seed in profile.seeds
        for name, method in METHODS.items()
        for place, strength in enumerate(method.strengths)
        if place in profile.places or name == BASELINE
    ]
