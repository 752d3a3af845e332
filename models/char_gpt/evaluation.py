"""What a trained model is measured by: clean loss, loss under embedding noise, margins. Validation text only."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.char_gpt.config import SITES, Config
from models.char_gpt.model import CharGPT
from models.char_gpt.penalty import cross_entropy, forward, site_density
from models.corpus import Corpus
from prob_transformer import Attention, stability_margin

ABSOLUTE_SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8)
RELATIVE_SIGMAS = (0.25, 0.5, 1.0, 1.5, 2.0)
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# The same noise for every model, so that runs are compared pairwise.
NOISE_SEED = 20_260_222
_CHUNK = 32
_MARGIN_WINDOWS = 32
# sigma_min needs a full d x d singular value decomposition a position, head and layer.
_CONDITIONING_WINDOWS = 4

# Compiled once here; a fresh wrapper a call would compile again every time.
_forward = eqx.filter_jit(forward)
_site_density = eqx.filter_jit(site_density)
_sigma_min = eqx.filter_jit(lambda attention, embeddings: stability_margin(attention, embeddings, "conditioning"))


def evaluation_windows(characters: Int[np.ndarray, " N"], config: Config) -> Int[np.ndarray, "W n+1"]:
    """Windows spread evenly over a text, not overlapping, at most `evaluation_windows` of them."""
    length = config.context + 1
    available = len(characters) // length
    chosen = np.linspace(0, available - 1, min(config.evaluation_windows, available)).round().astype(int)
    return np.stack([characters[i * length : (i + 1) * length] for i in chosen])


@eqx.filter_jit
def _window_losses(
    model: CharGPT, windows: Int[Array, "B n+1"], noise: Float[Array, "B n d"], sigma: Float[Array, ""]
) -> Float[Array, " B"]:
    embeddings = jax.vmap(model.embed)(windows[:, :-1])
    logits, _ = jax.vmap(model.decode)(embeddings + sigma * noise)
    return cross_entropy(logits, windows[:, 1:]).mean(-1)


def noisy_losses(model: CharGPT, windows: Int[np.ndarray, "W n+1"], sigma: float) -> Float[np.ndarray, " W"]:
    """Nats per character of every window with noise of standard deviation `sigma` on the input embeddings."""
    losses = []
    for start in range(0, len(windows), _CHUNK):
        chunk = jnp.asarray(windows[start : start + _CHUNK])
        key = jax.random.fold_in(jax.random.key(NOISE_SEED), start)
        shape = (chunk.shape[0], chunk.shape[1] - 1, model.token_embedding.shape[1])
        noise = jax.random.normal(key, shape, jnp.float32)
        losses.append(np.asarray(_window_losses(model, chunk, noise, jnp.float32(sigma)), np.float64))
    return np.concatenate(losses)


def _loss_summary(losses: Float[np.ndarray, " W"]) -> dict[str, float]:
    return {
        "nats_per_character": float(losses.mean()),
        "standard_error": float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else 0.0,
    }


def _increase(differences: Float[np.ndarray, " W"]) -> dict[str, float]:
    summary = _loss_summary(differences)
    return {"increase": summary["nats_per_character"], "increase_standard_error": summary["standard_error"]}


def noise_table(
    model: CharGPT, windows: Int[np.ndarray, "W n+1"], clean: Float[np.ndarray, " W"], embedding_rms: float
) -> list[dict[str, Any]]:
    """Loss at every noise level, absolute and relative to the RMS of the embeddings; `increase` is paired by window."""
    rows = []
    for kind, sigmas, unit in (("absolute", ABSOLUTE_SIGMAS, 1.0), ("relative", RELATIVE_SIGMAS, embedding_rms)):
        for sigma in sigmas:
            losses = noisy_losses(model, windows, sigma * unit)
            rows.append({"kind": kind, "sigma": sigma, **_loss_summary(losses), **_increase(losses - clean)})
    return rows


def _quantiles(values: Float[np.ndarray, "..."]) -> dict[str, float | None]:
    """Quantiles by name; None where one is not finite or next to a value that is not, for that is not JSON."""
    # NumPy interpolates from a value to its neighbour even when it needs none of it: NaN beside an infinity.
    with np.errstate(invalid="ignore"):
        levels = np.quantile(values, QUANTILES)
    return {f"{q:.2f}": float(v) if np.isfinite(v) else None for q, v in zip(QUANTILES, levels, strict=True)}


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
        with np.errstate(over="ignore"):
            determinants[site] = (sign * np.exp(log_det)).astype(np.float32)
        summary[site] = {
            "positions": int(sign.size),
            "negative_share": float((sign <= 0).mean()),
            "determinant_quantiles": _quantiles(determinants[site]),
            "log_det_quantiles": _quantiles(log_det),
            "conditioning_quantiles": _quantiles(_conditioning(model, site, embeddings, inputs)),
        }
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


def evaluate(model: CharGPT, corpus: Corpus, config: Config) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics of a model on the validation split, ready for JSON, and its determinant margins by site."""
    windows = evaluation_windows(corpus.validation, config)
    _, embeddings, _ = _forward(model, jnp.asarray(windows[:_MARGIN_WINDOWS, :-1]))
    embedding_rms = float(jnp.sqrt(jnp.square(embeddings).mean()))
    clean = noisy_losses(model, windows, 0.0)
    summary, determinants = margins(model, windows)
    characters = int(windows.shape[0] * (windows.shape[1] - 1))
    metrics = {
        "clean_loss": {"split": "validation", **_loss_summary(clean), "characters": characters},
        "embedding_rms": embedding_rms,
        "noise": noise_table(model, windows, clean, embedding_rms),
        "margins": summary,
    }
    return metrics, determinants
