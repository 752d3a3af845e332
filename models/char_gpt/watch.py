"""What is seen of the margins while a model trains: at every look, crossings and quantiles of det J, by layer."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from models.char_gpt.config import SITES, Site
from models.char_gpt.lines import finite_or_none
from models.char_gpt.model import CharGPT
from models.char_gpt.penalty import forward, site_signs
from prob_transformer._implementation import Implementation

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95)


class Look(NamedTuple):
    """Of each layer (l,), one at the embedding site: non-positive det J, smallest det J, mean b_i in nats, quantiles.

    The first two positions, whose determinant is 1 by definition, are left out.
    """

    negatives: Int[Array, " l"]
    positions: Int[Array, ""]
    smallest: Float[Array, " l"]
    barrier: Float[Array, " l"]
    quantiles: Float[Array, "l q"]


def look(
    model: CharGPT, windows: Int[Array, "B n+1"], implementation: Implementation = "reference", mesh: Mesh | None = None
) -> dict[Site, Look]:
    """Both sites on a batch of windows."""
    _, embeddings, attended = forward(model, windows[:, :-1])
    return {
        site: _of_site(*site_signs(model, site, embeddings, attended, implementation, mesh), site) for site in SITES
    }


def _of_site(sign: Float[Array, "..."], log_det: Float[Array, "..."], site: Site) -> Look:
    layers = 1 if site == "embedding" else sign.shape[0]
    sign, log_det = (x.reshape(layers, -1) for x in (sign, log_det))
    determinants = sign * jnp.exp(log_det)
    return Look(
        (sign <= 0).sum(-1),
        jnp.asarray(sign.size),
        determinants.min(-1),
        -log_det.mean(-1),
        jnp.quantile(determinants, jnp.asarray(QUANTILES, determinants.dtype), axis=-1).T,
    )


def new_crossings() -> dict[str, dict[str, int]]:
    """No look taken yet."""
    fields = ("steps_watched", "steps_with_crossing", "positions_watched", "positions_negative")
    return {site: dict.fromkeys(fields, 0) for site in SITES}


def note(record: dict[str, Any], step: int, seen: dict[Site, Look]) -> None:
    """Add a look to the crossings and the history of margins of a run's record."""
    entry: dict[str, Any] = {"step": step}
    for site, found in seen.items():
        negatives = int(np.sum(found.negatives))
        crossings = record["crossings"][site]
        crossings["steps_watched"] += 1
        crossings["steps_with_crossing"] += int(negatives > 0)
        crossings["positions_watched"] += int(found.positions)
        crossings["positions_negative"] += negatives
        layers = [_as_json(found, index) for index in range(len(found.smallest))]
        entry[site] = layers if site == "layers" else layers[0]
    record["watch"].append(entry)


def _as_json(found: Look, index: int) -> dict[str, Any]:
    return {
        "negative_share": int(found.negatives[index]) * len(found.smallest) / int(found.positions),
        "smallest": finite_or_none(found.smallest[index]),
        "barrier": finite_or_none(found.barrier[index]),
        "quantiles": [finite_or_none(value) for value in np.asarray(found.quantiles[index])],
    }
