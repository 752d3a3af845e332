"""Everything a run depends on: its result is a function of this configuration and the corpus."""

import dataclasses
import math
from typing import Any, Literal, get_args

Objective = Literal["ce", "margin", "map"]
Site = Literal["embedding", "layers"]
SITES: tuple[Site, ...] = get_args(Site)
Path = Literal["reference", "accelerated"]
ProductDtype = Literal["float32", "bfloat16"]
Rematerialise = Literal["none", "blocks"]
CHOICES: dict[str, tuple[str, ...]] = {
    "objective": get_args(Objective),
    "barrier_site": SITES,
    "path": get_args(Path),
    "product_dtype": get_args(ProductDtype),
    "rematerialise": get_args(Rematerialise),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run. Raises ValueError naming the option, what was given and the remedy."""

    objective: Objective = "ce"
    barrier_site: Site = "embedding"
    barrier_weight: float = 0.05
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
    path: Path = "reference"
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
        for name in ("learning_rate", "weight_prior_scale", "noise_scale", "first_scale"):
            if getattr(self, name) == 0:
                raise ValueError(f"{_option(name)}: got 0; pass a number greater than 0.")
        if not 0 < self.barrier_share <= 1:
            raise ValueError(f"--barrier-share: got {self.barrier_share}; pass a share greater than 0 and at most 1.")
        if self.barrier_share < 1 and (self.path, self.objective) != ("accelerated", "margin"):
            raise ValueError("--barrier-share: below 1 needs --path accelerated and --objective margin.")
        if self.product_dtype != "float32" and self.path != "accelerated":
            raise ValueError(f"--product-dtype: got {self.product_dtype}; narrower products need --path accelerated.")
        if self.width % self.heads:
            raise ValueError(f"--heads: got {self.heads}; pass a divisor of --width, {self.width}.")

    @property
    def method(self) -> str:
        """Objective and where its barrier acts, as tables and figures name it."""
        return method_of(self.objective, self.barrier_site)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def method_of(objective: str, site: str) -> str:
    """The name of a method: its objective, and the site of its barrier if it has one."""
    return objective if objective == "ce" else f"{objective}@{site}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
