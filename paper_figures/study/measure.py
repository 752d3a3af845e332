"""What a run of the study is measured by: clean loss, loss when perturbed, margins, and margins on a passage.

The loss is taken on validation, test and news windows; margins and the root mean square of the streams, which some
noise is measured in, on validation windows alone. Strengths are chosen on clean validation loss, so nothing is
perturbed there.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from models.char_gpt.config import SITES, Config
from models.char_gpt.evaluation import (
    Perturbation,
    clean_losses,
    clean_summary,
    compiled_forward,
    determinants_at,
    evaluation_windows,
    finite,
    margins,
    perturbed_rows,
    stream_rms,
)
from models.char_gpt.model import CharGPT
from models.corpus import Corpus
from paper_figures.study.perturbations import KINDS, spare_characters

_PASSAGE_WINDOWS = 3
# A second corpus needs no more precision than its standard error over windows gives, and half of the time is saved.
_NEWS_SHARE = 0.5


def measured(model: CharGPT, corpus: Corpus, config: Config, *, with_passage: bool) -> dict[str, Any]:
    """The "embedding_rms", "splits", "margins" and "passage" of a run, ready for JSON.

    Clean loss on validation, test and, where the corpus has them, news windows; loss under every perturbation on the
    latter two. "passage" is None unless asked for.
    """
    windows = evaluation_windows(corpus.validation, config)
    rms = stream_rms(model, windows)
    parts: dict[str, tuple[np.ndarray, dict[str, Perturbation]]] = {"validation": (windows, {})}
    for split, characters, share in (("test", corpus.test, 1.0), ("news", corpus.news, _NEWS_SHARE)):
        if characters is not None:
            spare = spare_characters(config.context)
            parts[split] = evaluation_windows(characters, config, spare, share), KINDS
    splits = {}
    for split, (chosen, kinds) in parts.items():
        clean = clean_losses(model, chosen)
        splits[split] = {
            "name": corpus.name_of(split),
            "clean": clean_summary(clean, config),
            "perturbed": perturbed_rows(model, chosen, clean, rms, kinds),
        }
    return {
        "embedding_rms": float(rms[0]),
        "splits": splits,
        "margins": margins(model, windows)[0],
        "passage": passage(model, corpus, config) if with_passage else None,
    }


def passage(model: CharGPT, corpus: Corpus, config: Config) -> dict[str, Any]:
    """How the validation text begins, with its margins, window by window; ready for JSON.

    det J of every character at the embedding site, and of every layer the smallest over its heads; None for the first
    two characters of a window, where it is 1 by definition, and where it is not finite.
    """
    count = min(_PASSAGE_WINDOWS, len(corpus.validation) // config.context)
    windows = corpus.validation[: count * config.context].reshape(count, config.context)
    _, embeddings, (inputs, _, _) = compiled_forward(model, jnp.asarray(windows))
    embedding, layers = (determinants_at(model, site, embeddings, inputs)[0] for site in SITES)
    for found in (embedding, layers):
        found[..., :2] = np.nan
    return {
        "text": "".join(corpus.vocabulary[i] for i in windows.ravel()),
        "margins": [finite(layer.min(0).ravel()) for layer in layers],
        "embedding": finite(embedding.ravel()),
    }
