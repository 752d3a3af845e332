"""What `python -m models.char_gpt laplace` takes of a trained run, and how well and calibrated probabilities predict.

The data are N characters of training text in windows spread evenly over it, not all that the run was trained on: they
are what the evidence is of, and the posterior is that of N characters.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from models import corpus
from models.char_gpt import checkpoint
from models.char_gpt.config import Config
from models.char_gpt.evaluation import evaluation_windows, standard_error
from models.char_gpt.model import CharGPT
from models.char_gpt.run import configuration_of
from models.char_gpt.training import initial_state

_BINS = 15


class Score(NamedTuple):
    """Mean loss in nats a character, its standard error over windows (None for one), and the expected calibration
    error."""

    nats_per_character: float
    standard_error: float | None
    calibration_error: float


def calibration_error(probabilities: Float[np.ndarray, "N V"], targets: Int[np.ndarray, " N"]) -> float:
    """Mean distance of accuracy from confidence over 15 equal bins of the largest probability, weighted by count."""
    confidence, hit = probabilities.max(-1), probabilities.argmax(-1) == targets
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    return float(np.abs(np.bincount(bins, confidence - hit, _BINS)).sum() / len(targets))


def score(probabilities: Float[Any, "W n V"], targets: Int[np.ndarray, "W n"]) -> Score:
    """How well probabilities predict the targets of several windows."""
    p = np.asarray(probabilities, np.float64)
    losses = -np.log(np.take_along_axis(p, targets[..., None], -1))[..., 0].mean(-1)
    error = calibration_error(p.reshape(-1, p.shape[-1]), np.ravel(targets))
    return Score(float(losses.mean()), standard_error(losses), error)


def training_windows(text: corpus.Corpus, config: Config, characters: int) -> Int[np.ndarray, "W n+1"]:
    """Windows of training text with about so many characters to predict. Raises ValueError for too few or too many."""
    available = len(text.train) // (config.context + 1) * config.context
    if not config.context <= characters <= available:
        raise ValueError(
            f"--characters: got {characters}; pass at least {config.context}, one window, and at most {available}."
        )
    chosen = dataclasses.replace(config, evaluation_windows=characters // config.context)
    return evaluation_windows(text.train, chosen)


def load_run(run: Path, text_path: Path | None) -> tuple[CharGPT, Config, corpus.Corpus]:
    """The trained model of a run, its configuration and its text. Raises ValueError naming --run."""
    path = run / checkpoint.NAME
    if not path.is_file():
        raise ValueError(f"--run: no checkpoint at {path}; make one with train, or pass another folder.")
    try:
        config = configuration_of(run)
        text = corpus.load(text_path, config.context + 1)
        state, _, _ = checkpoint.load(path, config, text.sha256, initial_state(config, len(text.vocabulary)))
    except ValueError as error:
        raise ValueError(str(error).replace("--out:", "--run:", 1)) from None
    return state.model, config, text
