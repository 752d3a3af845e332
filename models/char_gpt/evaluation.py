"""What a trained model is measured by: clean loss, loss when perturbed, and margins.

The loss is taken on validation, test and news windows; margins and the root mean square of the streams, which some
noise is measured in, on validation windows alone. Strengths are chosen on clean validation loss, so nothing is
perturbed there.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.char_gpt.config import SITES, Config
from models.char_gpt.lines import finite_or_none
from models.char_gpt.model import CharGPT
from models.char_gpt.penalty import forward, site_density
from models.char_gpt.perturbations import LEVELS, clean_losses, perturbed_losses, spare_characters, stream_rms
from models.corpus import Corpus
from prob_transformer import Attention, stability_margin

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_LEVEL_QUANTILES = np.linspace(0, 1, 41)
_MARGIN_WINDOWS = 32
# sigma_min needs a full d x d singular value decomposition a position, head and layer.
_CONDITIONING_WINDOWS = 4
_PASSAGE_WINDOWS = 3
# A second corpus needs no more precision than its standard error over windows gives, and half of the time is saved.
_NEWS_SHARE = 0.5

# Compiled once here; a fresh wrapper a call would compile again every time.
_forward = eqx.filter_jit(forward)
_site_density = eqx.filter_jit(site_density)
_sigma_min = eqx.filter_jit(lambda attention, embeddings: stability_margin(attention, embeddings, "conditioning"))


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


def standard_error(losses: Float[np.ndarray, " W"]) -> float | None:
    """Standard error of the mean over windows; None for one window, which says nothing of the spread."""
    return float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else None


def _loss_summary(losses: Float[np.ndarray, " W"]) -> dict[str, Any]:
    return {"nats_per_character": float(losses.mean()), "standard_error": standard_error(losses)}


def _clean_summary(losses: Float[np.ndarray, " W"], config: Config) -> dict[str, Any]:
    return {**_loss_summary(losses), "characters": len(losses) * config.context}


def perturbed_rows(
    model: CharGPT,
    windows: Int[np.ndarray, "W m"],
    clean: Float[np.ndarray, " W"],
    rms: Float[np.ndarray, " L"],
    kinds: tuple[str, ...] = tuple(LEVELS),
) -> list[dict[str, Any]]:
    """Loss at every level of the kinds, in nats per character; `increase` over the clean losses is paired by window."""
    rows = []
    for kind in kinds:
        found = perturbed_losses(model, windows, kind, LEVELS[kind], rms)
        for level, losses in zip(LEVELS[kind], found, strict=True):
            change = _loss_summary(losses - clean)
            increase = {"increase": change["nats_per_character"], "increase_standard_error": change["standard_error"]}
            rows.append({"kind": kind, "level": level, **_loss_summary(losses), **increase})
    return rows


def _quantiles(values: Float[np.ndarray, "..."]) -> dict[str, float | None]:
    """Quantiles by name; None where one is not finite or next to a value that is not, for that is not JSON."""
    # NumPy interpolates from a value to its neighbour even when it needs none of it: NaN beside an infinity.
    with np.errstate(invalid="ignore"):
        levels = np.quantile(values, QUANTILES)
    return {f"{q:.2f}": value for q, value in zip(QUANTILES, _finite(levels), strict=True)}


def _levels(determinants: Float[np.ndarray, "..."]) -> list[float | None]:
    """Quantiles at 0, 0.025, ..., 1, from which a distribution is drawn; None where one is not finite."""
    with np.errstate(invalid="ignore"):
        return _finite(np.quantile(determinants, _LEVEL_QUANTILES))


def _finite(values: Float[np.ndarray, " n"]) -> list[float | None]:
    return [finite_or_none(value) for value in values]


def _determinants(sign: Float[Any, "..."], log_det: Float[Any, "..."]) -> Float[np.ndarray, "..."]:
    with np.errstate(over="ignore"):
        return (np.asarray(sign) * np.exp(np.asarray(log_det, np.float64))).astype(np.float32)


def margins(
    model: CharGPT, windows: Int[np.ndarray, "W n+1"]
) -> tuple[dict[str, dict[str, Any]], dict[str, Float[np.ndarray, "..."]]]:
    """Margin summary by site, and the determinant margins themselves: (W, n-2), and (L, H, W, n-2) for the layers.

    The first two positions are left out, their determinant being 1 by definition.
    """
    chosen = jnp.asarray(windows[:_MARGIN_WINDOWS, :-1])
    _, embeddings, (inputs, _, _) = _forward(model, chosen)
    summary: dict[str, dict[str, Any]] = {}
    determinants: dict[str, np.ndarray] = {}
    for site in SITES:
        _, sign, log_det = (np.asarray(x) for x in _site_density(model, site, embeddings, inputs))
        sign, log_det = sign[..., 2:], log_det[..., 2:].astype(np.float64)
        determinants[site] = _determinants(sign, log_det)
        summary[site] = {
            "positions": int(sign.size),
            "negative_share": float((sign <= 0).mean()),
            "determinant_quantiles": _quantiles(determinants[site]),
            "log_det_quantiles": _quantiles(log_det),
            "conditioning_quantiles": _quantiles(_conditioning(model, site, embeddings, inputs)),
        }
    summary["embedding"]["determinant_levels"] = _levels(determinants["embedding"])
    summary["layers"]["determinant_levels"] = [_levels(layer) for layer in determinants["layers"]]
    summary["layers"]["negative_share_per_layer_head"] = (determinants["layers"] <= 0).mean(axis=(2, 3)).tolist()
    return summary, determinants


def _conditioning(model: CharGPT, site: str, embeddings: Array, inputs: Array) -> Float[np.ndarray, "..."]:
    """sigma_min(J_i) at a few windows of a site."""
    few = slice(0, _CONDITIONING_WINDOWS)
    if site == "embedding":
        return np.asarray(_sigma_min(model.prior_stage, embeddings[few]))[..., 2:]
    found = [
        np.asarray(_sigma_min(Attention(block.query[h : h + 1], block.key[h : h + 1]), attended[few]))[..., 2:]
        for block, attended in zip(model.blocks, inputs, strict=True)
        for h in range(block.query.shape[0])
    ]
    return np.stack(found)


def passage(model: CharGPT, corpus: Corpus, config: Config) -> dict[str, Any]:
    """How the validation text begins, with its margins, window by window; ready for JSON.

    det J of every character at the embedding site, and of every layer the smallest over its heads; None for the first
    two characters of a window, where it is 1 by definition, and where it is not finite.
    """
    count = min(_PASSAGE_WINDOWS, len(corpus.validation) // config.context)
    windows = corpus.validation[: count * config.context].reshape(count, config.context)
    _, embeddings, (inputs, _, _) = _forward(model, jnp.asarray(windows))
    found = {}
    for site in SITES:
        _, sign, log_det = _site_density(model, site, embeddings, inputs)
        found[site] = _determinants(sign, log_det)
        found[site][..., :2] = np.nan
    return {
        "text": "".join(corpus.vocabulary[i] for i in windows.ravel()),
        "margins": [_finite(layer.min(0).ravel()) for layer in found["layers"]],
        "embedding": _finite(found["embedding"].ravel()),
    }


def measure(model: CharGPT, corpus: Corpus, config: Config, *, with_passage: bool) -> dict[str, Any]:
    """The "embedding_rms", "splits", "margins" and "passage" of a run, ready for JSON.

    Clean loss on validation, test and, where the corpus has them, news windows; loss under every perturbation on the
    latter two. "passage" is None unless asked for.
    """
    windows = evaluation_windows(corpus.validation, config)
    rms = stream_rms(model, windows)
    splits: dict[str, dict[str, Any]] = {
        "validation": {
            "name": corpus.name_of("validation"),
            "clean": _clean_summary(clean_losses(model, windows), config),
            "perturbed": [],
        }
    }
    unseen = [("test", corpus.test, 1.0)]
    if corpus.news is not None:
        unseen.append(("news", corpus.news, _NEWS_SHARE))
    for split, characters, share in unseen:
        longer = evaluation_windows(characters, config, spare_characters(config.context), share)
        clean = clean_losses(model, longer)
        splits[split] = {
            "name": corpus.name_of(split),
            "clean": _clean_summary(clean, config),
            "perturbed": perturbed_rows(model, longer, clean, rms),
        }
    return {
        "embedding_rms": float(rms[0]),
        "splits": splits,
        "margins": margins(model, windows)[0],
        "passage": passage(model, corpus, config) if with_passage else None,
    }


def evaluate(model: CharGPT, corpus: Corpus, config: Config) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics of a model on the validation split, ready for JSON, and its determinant margins by site.

    The noise on embeddings is named "absolute" or "relative" here, and its level "sigma".
    """
    windows = evaluation_windows(corpus.validation, config)
    rms = stream_rms(model, windows)
    clean = clean_losses(model, windows)
    summary, determinants = margins(model, windows)
    names = {"embedding-noise": "absolute", "relative-embedding-noise": "relative"}
    noise = [
        {"kind": names[row.pop("kind")], "sigma": row.pop("level"), **row}
        for row in perturbed_rows(model, windows, clean, rms, tuple(names))
    ]
    metrics = {
        "clean_loss": {"split": "validation", **_clean_summary(clean, config)},
        "embedding_rms": float(rms[0]),
        "noise": noise,
        "margins": summary,
    }
    return metrics, determinants
