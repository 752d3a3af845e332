"""What a trained model is measured by on text it was not trained on: loss, clean and under noise, and margins.

Noise is Gaussian, added to the input embeddings: of a standard deviation, or of one relative to their root mean square.
A window holds the n characters a model reads and what came next, which stays the target. What is drawn depends on the
kind of perturbation and the window's number alone: every model and every level has the same draws, so losses are
compared pairwise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from models.char_gpt.config import SITES, Config, Site
from models.char_gpt.loss import attentions_of_heads, cross_entropy, forward, site_density
from models.corpus import Corpus
from prob_transformer import stability_margin
from prob_transformer.transformer.network import Hook, Transformer

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NOISE_SEED = 20_260_222
_CHUNK = 32
_LEVEL_QUANTILES = tuple(np.linspace(0, 1, 41))
_MARGIN_WINDOWS = 32
# sigma_min needs a full d x d singular value decomposition a position, head and layer.
_CONDITIONING_WINDOWS = 4

# Compiled once here; a fresh wrapper a call would compile again every time.
compiled_forward = eqx.filter_jit(forward)
_site_density = eqx.filter_jit(site_density)
_sigma_min = eqx.filter_jit(lambda attention, embeddings: stability_margin(attention, embeddings, "conditioning"))

AtLevel = Callable[[Float[Array, ""]], Float[Array, ""]]


class Perturbation(NamedTuple):
    """The loss of (model, window, key, RMS of the streams) as a function of the level, and the levels to measure at.

    `draws` numbers the stream of random numbers, so that a kind added later leaves the draws of the others as they are.
    Relative levels are multiples of the root mean square of the embeddings.
    """

    at: Callable[..., AtLevel]
    draws: int
    levels: tuple[float, ...]
    is_relative: bool = False


def finite(values: ArrayLike) -> list[float | None]:
    """Numbers for JSON, which has no infinities: None in place of one."""
    return [float(value) if np.isfinite(value) else None for value in np.asarray(values)]


def evaluation_windows(
    characters: Int[np.ndarray, " N"], config: Config, spare: int = 0, share: float = 1.0
) -> Int[np.ndarray, "W m"]:
    """Windows of context + 1 + spare characters spread evenly over a text, not overlapping.

    There are at most `evaluation_windows` times `share` of them. Raises ValueError for a text shorter than one.
    """
    length = config.context + 1 + spare
    available = len(characters) // length
    if available == 0:
        raise ValueError(
            f"--corpus: a part to be evaluated on has {len(characters)} characters and a window needs {length}; pass a "
            "longer text or a smaller --context."
        )
    wanted = max(1, round(share * config.evaluation_windows))
    chosen = np.linspace(0, available - 1, min(wanted, available)).round().astype(int)
    return np.stack([characters[i * length : (i + 1) * length] for i in chosen])


def loss_at(
    model: Transformer, embeddings: Float[Array, "n d"], targets: Int[Array, " n"], hook: Hook | None = None
) -> Float[Array, ""]:
    """Mean cross-entropy of a window in nats, from its input embeddings."""
    decoded = model.decode(embeddings) if hook is None else model.decode(embeddings, hook=hook)
    return cross_entropy(decoded[0], targets).mean()


def _embedding_noise(model: Transformer, window: Array, key: Array, rms: Array) -> AtLevel:
    embeddings, targets = model.embed(window[: model.context]), window[1 : model.context + 1]
    noise = jax.random.normal(key, embeddings.shape, jnp.float32)
    return lambda level: loss_at(model, embeddings + level * noise, targets)


EMBEDDING_NOISE = Perturbation(_embedding_noise, 0, (0.05, 0.1, 0.2, 0.4, 0.8))
RELATIVE_EMBEDDING_NOISE = Perturbation(_embedding_noise, 0, (0.25, 0.5, 1.0, 1.5, 2.0), is_relative=True)


# Compiled once for a kind and a number of levels, whatever the levels are.
@eqx.filter_jit
def _chunk_losses(
    at: Callable[..., AtLevel],
    draws: int,
    model: Transformer,
    windows: Array,
    numbers: Array,
    levels: Array,
    rms: Array,
) -> Float[Array, "K B"]:
    key = jax.random.fold_in(jax.random.key(NOISE_SEED), draws)

    def one_window(window: Array, number: Array) -> Array:
        return jax.lax.map(at(model, window, jax.random.fold_in(key, number), rms), levels)

    return jax.vmap(one_window, out_axes=1)(windows, numbers)


@eqx.filter_jit
def _chunk_squares(model: Transformer, windows: Array) -> Float[Array, "B L"]:
    def one_window(characters: Array) -> Array:
        squares: list[Array] = []

        def hook(name: str, inputs: Array, outputs: Array) -> Array:
            if name.endswith(".stream"):
                squares.append(jnp.square(inputs).mean())
            return outputs

        model.decode(model.embed(characters), hook=hook)
        return jnp.stack(squares)

    return jax.vmap(one_window)(windows[:, : model.context])


def _by_chunks(function: Callable[[Array, Array], Array], windows: Int[np.ndarray, "W m"]) -> list[np.ndarray]:
    """`function(windows, their numbers)` for equal parts of the windows, the last filled up with its last window."""
    starts = np.arange(0, len(windows), _CHUNK, dtype=np.int32)
    parts = np.minimum(starts[:, None] + np.arange(_CHUNK, dtype=np.int32), len(windows) - 1)
    return [np.asarray(function(jnp.asarray(windows[part]), jnp.asarray(part)), np.float64) for part in parts]


def stream_rms(model: Transformer, windows: Int[np.ndarray, "W m"]) -> Float[np.ndarray, " L"]:
    """Root mean square of every layer's input stream over clean windows; the first is that of the embeddings."""
    squares = np.concatenate(_by_chunks(lambda chunk, _: _chunk_squares(model, chunk), windows))
    return np.sqrt(squares[: len(windows)].mean(0))


def perturbed_losses(
    model: Transformer,
    windows: Int[np.ndarray, "W m"],
    perturbation: Perturbation,
    levels: tuple[float, ...],
    rms: Float[np.ndarray, " L"],
) -> Float[np.ndarray, "K W"]:
    """Nats per character of every window at every level, `rms` being that of `stream_rms`."""
    unit = rms[0] if perturbation.is_relative else 1.0
    scaled, streams = jnp.asarray(np.asarray(levels) * unit, jnp.float32), jnp.asarray(rms, jnp.float32)

    def losses(chunk: Array, numbers: Array) -> Array:
        return _chunk_losses(perturbation.at, perturbation.draws, model, chunk, numbers, scaled, streams)

    return np.concatenate(_by_chunks(losses, windows), axis=1)[:, : len(windows)]


def clean_losses(model: Transformer, windows: Int[np.ndarray, "W m"]) -> Float[np.ndarray, " W"]:
    """Nats per character of every window as it is."""
    return perturbed_losses(model, windows, EMBEDDING_NOISE, (0.0,), np.ones(len(model.blocks)))[0]


def standard_error(losses: Float[np.ndarray, " W"]) -> float | None:
    """Standard error of the mean over windows; None for one window, which says nothing of the spread."""
    return float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else None


def clean_summary(losses: Float[np.ndarray, " W"], config: Config) -> dict[str, Any]:
    """Mean loss in nats per character, its standard error, and the characters it is over; ready for JSON."""
    spread = standard_error(losses)
    characters = len(losses) * config.context
    return {"nats_per_character": float(losses.mean()), "standard_error": spread, "characters": characters}


def perturbed_rows(
    model: Transformer,
    windows: Int[np.ndarray, "W m"],
    clean: Float[np.ndarray, " W"],
    rms: Float[np.ndarray, " L"],
    kinds: dict[str, Perturbation],
) -> list[dict[str, Any]]:
    """Loss at every level of the kinds, in nats per character; `increase` over the clean losses is paired by window."""
    return [
        {
            "kind": kind,
            "level": level,
            "nats_per_character": float(losses.mean()),
            "standard_error": standard_error(losses),
            "increase": float((losses - clean).mean()),
            "increase_standard_error": standard_error(losses - clean),
        }
        for kind, perturbation in kinds.items()
        for level, losses in zip(
            perturbation.levels, perturbed_losses(model, windows, perturbation, perturbation.levels, rms), strict=True
        )
    ]


def quantiles(values: Float[np.ndarray, "..."], levels: tuple[float, ...]) -> list[float | None]:
    """Quantiles; None where one is not finite or next to a value that is not, for that is not JSON."""
    # NumPy interpolates from a value to its neighbour even when it needs none of it: NaN beside an infinity.
    with np.errstate(invalid="ignore"):
        return finite(np.quantile(values, levels))


def determinants_at(
    model: Transformer, site: Site, embeddings: Float[Array, "B n d"], inputs: Float[Array, "L B n d"]
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """det J_i in float32, its sign and its logarithm, with the axes of `site_density`."""
    _, sign, log_det = (np.asarray(x) for x in _site_density(model, site, embeddings, inputs))
    with np.errstate(over="ignore"):
        return (sign * np.exp(log_det.astype(np.float64))).astype(np.float32), sign, log_det.astype(np.float64)


def margins(
    model: Transformer, windows: Int[np.ndarray, "W n+1"]
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Summary by site, ready for JSON, and det J_i: (W, n-2) at the embedding site, (L, H, W, n-2) in the layers.

    The first two positions, whose determinant is 1 by definition, are left out.
    """
    _, embeddings, (inputs, _, _) = compiled_forward(model, jnp.asarray(windows[:_MARGIN_WINDOWS, :-1]))
    few = embeddings[:_CONDITIONING_WINDOWS], inputs[:, :_CONDITIONING_WINDOWS]
    summary: dict[str, dict[str, Any]] = {}
    determinants: dict[str, np.ndarray] = {}
    for site in SITES:
        determinants[site], sign, log_det = (x[..., 2:] for x in determinants_at(model, site, embeddings, inputs))
        conditioning = np.stack(
            [np.asarray(_sigma_min(*head))[..., 2:] for head in attentions_of_heads(model, site, *few)]
        )
        figures = {"determinant": determinants[site], "log_det": log_det, "conditioning": conditioning}
        summary[site] = {"positions": int(sign.size), "negative_share": float((sign <= 0).mean())}
        for name, values in figures.items():
            found = zip(QUANTILES, quantiles(values, QUANTILES), strict=True)
            summary[site][f"{name}_quantiles"] = {f"{q:.2f}": value for q, value in found}
    summary["embedding"]["determinant_levels"] = quantiles(determinants["embedding"], _LEVEL_QUANTILES)
    summary["layers"]["determinant_levels"] = [quantiles(x, _LEVEL_QUANTILES) for x in determinants["layers"]]
    summary["layers"]["negative_share_per_layer_head"] = (determinants["layers"] <= 0).mean(axis=(2, 3)).tolist()
    return summary, determinants


def evaluate(model: Transformer, corpus: Corpus, config: Config) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics of a model on the validation split, ready for JSON, and its determinant margins by site.

    The noise on embeddings is named "absolute" or "relative" here, and its level "sigma".
    """
    windows = evaluation_windows(corpus.validation, config)
    rms = stream_rms(model, windows)
    clean = clean_losses(model, windows)
    summary, determinants = margins(model, windows)
    kinds = {"absolute": EMBEDDING_NOISE, "relative": RELATIVE_EMBEDDING_NOISE}
    rows = perturbed_rows(model, windows, clean, rms, kinds)
    metrics = {
        "clean_loss": {"split": "validation", **clean_summary(clean, config)},
        "embedding_rms": float(rms[0]),
        "noise": [{"kind": row.pop("kind"), "sigma": row.pop("level"), **row} for row in rows],
        "margins": summary,
    }
    return metrics, determinants
