"""Everything a model trained with ce, margin or map depends on: its result is a function of this and the corpus."""

import dataclasses
import math
from typing import Any, Literal, get_args

from prob_transformer._implementation import Implementation
from prob_transformer._validation import require_seed
from prob_transformer.training_barrier import Form
from prob_transformer.transformer.network import Remat, TransformerConfig
from prob_transformer.transformer.numpyro_model import Site

Objective = Literal["ce", "margin", "map"]
SITES: tuple[Site, ...] = get_args(Site)
ProductDtype = Literal["float32", "bfloat16"]
CHOICES: dict[str, tuple[str, ...]] = {
    "objective": get_args(Objective),
    "barrier_site": SITES,
    "barrier_form": get_args(Form),
    "implementation": get_args(Implementation),
    "product_dtype": get_args(ProductDtype),
    "remat": get_args(Remat),
}
_SMALLEST = {"seed": 0, "backtrack": 0, "context": 4}
_POSITIVE = ("learning_rate", "weight_prior_scale", "noise_scale", "first_scale", "barrier_threshold")


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run. Raises ValueError naming the option, what was given and the remedy."""

    objective: Objective = "ce"
    barrier_site: Site = "embedding"
    barrier_weight: float = 0.05
    barrier_form: Form = "two-sided"
    barrier_threshold: float = 0.5
    seed: int = 0
    steps: int = 500
    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 64
    batch: int = 16
    learning_rate: float = 3e-3
    weight_prior_scale: float = 1.0
    noise_scale: float = 1.0
    first_scale: float = 1.0
    watch_every: int = 10
    backtrack: int = 0
    checkpoint_every: int = 200
    evaluation_windows: int = 256
    implementation: Implementation = "reference"
    barrier_share: float = 1.0
    product_dtype: ProductDtype = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            allowed = ""
            if name in CHOICES and value not in CHOICES[name]:
                allowed = f"one of {', '.join(CHOICES[name])}"
            elif field.type is int and value < _SMALLEST.get(name, 1):
                allowed = f"an integer of at least {_SMALLEST.get(name, 1)}"
            elif field.type is float and not (math.isfinite(value) and value >= 0):
                allowed = "a finite number of at least 0"
            elif name in _POSITIVE and value == 0:
                allowed = "a number greater than 0"
            if allowed:
                raise ValueError(f"--{name.replace('_', '-')}: got {value!r}; pass {allowed}.")
        require_seed("--seed", self.seed, "a run")
        share, narrow = self.barrier_share < 1, self.product_dtype != "float32"
        blocked, margin = self.implementation == "blocked", self.objective == "margin"
        two_sided = self.barrier_form == "two-sided"
        for is_wrong, message in (
            (
                not 0 < self.barrier_share <= 1,
                f"--barrier-share: got {self.barrier_share}; pass a share greater than 0 and at most 1.",
            ),
            (
                share and not (blocked and margin),
                "--barrier-share: below 1 needs --implementation blocked and --objective margin.",
            ),
            (
                not (two_sided or margin),
                f"--barrier-form: {self.barrier_form} needs --objective margin, got {self.objective}.",
            ),
            (share and not two_sided, "--barrier-share: below 1 needs --barrier-form two-sided."),
            (
                narrow and not blocked,
                f"--product-dtype: got {self.product_dtype}; narrower products need --implementation blocked.",
            ),
            (self.width % self.heads, f"--heads: got {self.heads}; pass a divisor of --width, {self.width}."),
        ):
            if is_wrong:
                raise ValueError(message)

    @property
    def method(self) -> str:
        """What the run is called in tables and figures: ce, or the objective or one-sided form and its site."""
        form = self.objective if self.barrier_form == "two-sided" else self.barrier_form
        return "ce" if self.objective == "ce" else f"{form}@{self.barrier_site}"

    @property
    def strength(self) -> float:
        """What multiplies the added loss: lambda of a barrier, 0 for plain training."""
        return 0.0 if self.objective == "ce" else self.barrier_weight

    def transformer(self, vocabulary: int) -> TransformerConfig:
        """The sizes of the model that the run trains."""
        return TransformerConfig(vocabulary, self.context, self.layers, self.width, self.heads)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def in_names_of_today(saved: Any) -> Any:
    """A saved configuration of version 0.1 as it is saved now; one of today, or none at all, is left as it is.

    `path` "accelerated" is now `implementation` "blocked", `rematerialise` is `remat`. A regulariser, and a penalty
    that was a form of the barrier, belong to the study: beside the fields of plain training stand its "method" and
    "strength".
    """
    if not isinstance(saved, dict):
        return saved
    names = {"path": "implementation", "rematerialise": "remat"}
    found = {names.get(key, key): value for key, value in saved.items()}
    if found.get("implementation") == "accelerated":
        found["implementation"] = "blocked"
    regulariser, strength = found.pop("regulariser", "none"), found.pop("regulariser_strength", 0.0)
    if found.get("barrier_form") in ("trace", "frobenius"):
        regulariser, strength = f"{found['barrier_form']}@{found['barrier_site']}", found["barrier_weight"]
        plain = ("objective", "barrier_site", "barrier_weight", "barrier_form")
        found |= {name: value for name, value in Config().as_dict().items() if name in plain}
    return found if regulariser == "none" else {**found, "method": regulariser, "strength": strength}
