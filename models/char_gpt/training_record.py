"""What is noted of a run beside its state: crossings and quantiles of det J by layer, the loss, and seconds."""

from typing import Any, NamedTuple, TypedDict

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from models.char_gpt.config import SITES, Config, Site
from models.char_gpt.evaluation import finite
from models.char_gpt.loss import forward, site_signs
from prob_transformer._implementation import Implementation
from prob_transformer.transformer.network import Transformer

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95)


class BatchMargins(NamedTuple):
    """Of each layer (l,), one at the embedding site: non-positive det J, smallest det J, mean b_i in nats, quantiles.

    The first two positions, whose determinant is 1 by definition, are left out.
    """

    negatives: Int[Array, " l"]
    positions: Int[Array, ""]
    smallest: Float[Array, " l"]
    barrier: Float[Array, " l"]
    quantiles: Float[Array, "l q"]


def batch_margins(
    model: Transformer,
    windows: Int[Array, "B n+1"],
    implementation: Implementation = "reference",
    mesh: Mesh | None = None,
) -> dict[Site, BatchMargins]:
    """The margins of both sites on a batch of windows."""
    _, embeddings, attended = forward(model, windows[:, :-1])
    found: dict[Site, BatchMargins] = {}
    for site in SITES:
        signs = site_signs(model, site, embeddings, attended, implementation, mesh)
        layers = 1 if site == "embedding" else len(model.blocks)
        sign, log_det = (x.reshape(layers, -1) for x in signs)
        determinants = sign * jnp.exp(log_det)
        found[site] = BatchMargins(
            (sign <= 0).sum(-1),
            jnp.asarray(sign.size),
            determinants.min(-1),
            -log_det.mean(-1),
            jnp.quantile(determinants, jnp.asarray(QUANTILES, determinants.dtype), axis=-1).T,
        )
    return found


class Extension(TypedDict):
    """The steps from `from_step` to `to_step` - 1, taken beyond those of the configuration at one learning rate."""

    from_step: int
    to_step: int
    learning_rate: float


class Record(TypedDict):
    """What is noted of a run.

    `starts` counts how often the run was started or resumed, `starting_seconds` is the time of the first step of each,
    which compiles it.
    """

    crossings: dict[Site, dict[str, int]]
    watch: list[dict[str, Any]]
    history: list[dict[str, float]]
    wall_seconds: float
    starting_seconds: float
    starts: int
    extensions: list[Extension]


def new_record() -> Record:
    """A record with nothing noted yet."""
    counts = ("steps_watched", "steps_with_crossing", "positions_watched", "positions_negative")
    return {
        "crossings": {site: dict.fromkeys(counts, 0) for site in SITES},
        "watch": [],
        "history": [],
        "wall_seconds": 0.0,
        "starting_seconds": 0.0,
        "starts": 0,
        "extensions": [],
    }


def ends(config: Config, record: Record) -> list[int]:
    """The numbers of steps after which the run of the configuration, and then each of its extensions, ends."""
    return [config.steps, *(extension["to_step"] for extension in record["extensions"])]


def note(record: Record, step: int, margins: dict[Site, BatchMargins]) -> None:
    """Add the margins of a batch to the crossings and the history of margins of a run's record."""
    entry: dict[str, Any] = {"step": step}
    for site, found in margins.items():
        negatives, positions = np.asarray(found.negatives), int(found.positions)
        count = (1, int(negatives.any()), positions, int(negatives.sum()))
        crossings = record["crossings"][site]
        record["crossings"][site] = {
            name: before + more for (name, before), more in zip(crossings.items(), count, strict=True)
        }
        numbers = (finite(found.smallest), finite(found.barrier), map(finite, np.asarray(found.quantiles)))
        layers = [
            {
                "negative_share": int(negative) * len(negatives) / positions,
                "smallest": smallest,
                "barrier": barrier,
                "quantiles": quantiles,
            }
            for negative, smallest, barrier, quantiles in zip(negatives, *numbers, strict=True)
        ]
        entry[site] = layers if site == "layers" else layers[0]
    record["watch"].append(entry)


def seconds_per_step(record: Record, steps: int) -> float | None:
    """Seconds of a step, without those in which a start compiled it; None if there were no others."""
    timed = steps - record["starts"]
    return (record["wall_seconds"] - record["starting_seconds"]) / timed if timed > 0 else None


def as_metrics(record: Record, steps: int, halvings: int) -> dict[str, Any]:
    """The record as a finished run gives it, ready for JSON."""
    return {
        "wall_seconds": record["wall_seconds"],
        "seconds_per_step": seconds_per_step(record, steps),
        "watch": record["watch"],
        "crossings": record["crossings"],
        "halved_steps": halvings,
        "training": record["history"],
    }
