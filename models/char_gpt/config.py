"""Everything a run depends on: its result is a function of this configuration and the corpus."""

import dataclasses
import math
from typing import Any, Literal, get_args

from prob_transformer._implementation import Implementation
from prob_transformer._validation import require_seed

Objective = Literal["ce", "margin", "map"]
Site = Literal["embedding", "layers"]
SITES: tuple[Site, ...] = get_args(Site)
BarrierForm = Literal["two-sided", "one-sided", "trace", "frobenius"]
Regulariser = Literal["none", "dropout", "weight-decay", "embedding-noise", "jacobian", "spectral"]
ProductDtype = Literal["float32", "bfloat16"]
Rematerialise = Literal["none", "blocks"]
CHOICES: dict[str, tuple[str, ...]] = {
    "objective": get_args(Objective),
    "barrier_site": SITES,
    "barrier_form": get_args(BarrierForm),
    "regulariser": get_args(Regulariser),
    "implementation": get_args(Implementation),
    "product_dtype": get_args(ProductDtype),
    "rematerialise": get_args(Rematerialise),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run. Raises ValueError naming the option, what was given and the remedy."""

    objective: Objective = "ce"
    barrier_site: Site = "embedding"
    barrier_weight: float = 0.05
    barrier_form: BarrierForm = "two-sided"
    barrier_threshold: float = 0.5
    regulariser: Regulariser = "none"
    regulariser_strength: float = 0.0
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
    rematerialise: Rematerialise = "none"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{_option(name)}: got {getattr(self, name)!r}; pass one of {', '.join(choices)}.")
        smallest = {"seed": 0, "backtrack": 0, "context": 4}
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            if field.type is int and value < smallest.get(name, 1):
                raise ValueError(f"{_option(name)}: got {value}; pass an integer of at least {smallest.get(name, 1)}.")
            if field.type is float and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{_option(name)}: got {value}; pass a finite number of at least 0.")
        require_seed("--seed", self.seed, "a run")
        for name in ("learning_rate", "weight_prior_scale", "noise_scale", "first_scale", "barrier_threshold"):
            if getattr(self, name) == 0:
                raise ValueError(f"{_option(name)}: got 0; pass a number greater than 0.")
        if not 0 < self.barrier_share <= 1:
            raise ValueError(f"--barrier-share: got {self.barrier_share}; pass a share greater than 0 and at most 1.")
        if self.barrier_share < 1 and (self.implementation, self.objective) != ("blocked", "margin"):
            raise ValueError("--barrier-share: below 1 needs --implementation blocked and --objective margin.")
        if self.barrier_form != "two-sided" and self.objective != "margin":
            raise ValueError(f"--barrier-form: {self.barrier_form} needs --objective margin, got {self.objective}.")
        if self.barrier_share < 1 and self.barrier_form != "two-sided":
            raise ValueError("--barrier-share: below 1 needs --barrier-form two-sided.")
        if self.regulariser != "none" and self.objective != "ce":
            raise ValueError(f"--regulariser: {self.regulariser} needs --objective ce, got {self.objective}.")
        if self.regulariser == "dropout" and self.regulariser_strength >= 1:
            raise ValueError(
                f"--regulariser-strength: got {self.regulariser_strength} for dropout; pass a share below 1."
            )
        if self.product_dtype != "float32" and self.implementation != "blocked":
            raise ValueError(
                f"--product-dtype: got {self.product_dtype}; narrower products need --implementation blocked."
            )
        if self.width % self.heads:
            raise ValueError(f"--heads: got {self.heads}; pass a divisor of --width, {self.width}.")

    @property
    def method(self) -> str:
        """What the run is called in tables and figures: regulariser, or objective or barrier form and its site."""
        if self.objective == "ce":
            return "ce" if self.regulariser == "none" else self.regulariser
        form = self.objective if self.barrier_form == "two-sided" else self.barrier_form
        return f"{form}@{self.barrier_site}"

    @property
    def strength(self) -> float:
        """The one number of the method: lambda of a barrier, the strength of a regulariser, 0 for plain training."""
        if self.objective != "ce":
            return self.barrier_weight
        return 0.0 if self.regulariser == "none" else self.regulariser_strength

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def made(self, saved: Any) -> bool:
        """Whether a saved configuration is this one, in the names of today or of version 0.1."""
        return renamed(saved) == self.as_dict()


def renamed(saved: Any) -> Any:
    """A saved configuration in the names of today: `path` "accelerated" is now `implementation` "blocked"."""
    if not isinstance(saved, dict) or "path" not in saved:
        return saved
    implementation = {"accelerated": "blocked"}.get(saved["path"], saved["path"])
    return {key: value for key, value in saved.items() if key != "path"} | {"implementation": implementation}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
