"""Laplace's approximation at the weights of a trained run, for the head alone or for every linear map.

The data are N characters of training text in windows spread evenly over it, not all that the run was trained on: they
are what the evidence is of, and the posterior is that of N characters. The weights are taken as the mode.

    last-layer    the head, with its whole Gauss-Newton matrix                       (last_layer.py)
    kronecker     every linear map, with Kronecker factors of its Gauss-Newton block (linear_maps.py)
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from models import corpus
from models.char_gpt import checkpoint, last_layer, linear_maps
from models.char_gpt.config import Config
from models.char_gpt.evaluation import evaluation_windows
from models.char_gpt.evidence import Evidence, tuned_prior_precision
from models.char_gpt.loss import cross_entropy
from models.char_gpt.model import CharGPT
from models.char_gpt.train import initial_state
from prob_transformer.inference.laplace.kfac import Positions, combinations, kronecker_factors
from prob_transformer.inference.laplace.kronecker import KroneckerPrecision, kronecker_precision

Structure = Literal["last-layer", "kronecker"]
Precision = last_layer.HeadPrecision | KroneckerPrecision


class Curvature(NamedTuple):
    """Of the log-likelihood: P at a prior precision tau, log det P - k log tau in nats, and the latter roughly."""

    at: Callable[[float], Precision]
    log_det_ratio: Callable[[float], float]
    rough_log_det_ratio: Callable[[float], float]


def curvature(
    model: CharGPT, windows: Int[Array, "W n+1"], structure: Structure, positions: Positions = "signs", seed: int = 0
) -> Curvature:
    """The curvature at the weights of a model over windows of training text.

    `positions` and `seed` are those of the Kronecker factors (kfac.py). Raises ValueError for another structure.
    """
    if structure not in get_args(Structure):
        raise ValueError(f"--structure: got {structure!r}; pass one of {', '.join(get_args(Structure))}.")
    characters = windows[:, :-1]
    if structure == "last-layer":
        inputs, logits = last_layer.head_inputs(model, characters)
        matrix = last_layer.gauss_newton(inputs, logits)
        # Every tau costs a Cholesky factor of several hundred megabytes: the last one is kept, and where to look is
        # first found with Kronecker factors.
        at = functools.lru_cache(maxsize=1)(lambda tau: last_layer.HeadPrecision(matrix, tau))
        rough = _ratio(kronecker_precision([last_layer.kronecker_factors_of_head(inputs, logits)], 1.0))
        return Curvature(at, lambda tau: at(tau).log_det - len(matrix) * float(np.log(tau)), rough)
    rows = combinations(positions, jax.random.key(seed), *characters.shape)
    factors = kronecker_factors(linear_maps.network, model, characters, rows)
    precision = kronecker_precision([factors[name] for name in linear_maps.names(model)], 1.0)
    ratio = _ratio(precision)
    return Curvature(precision.with_prior_precision, ratio, ratio)


def _ratio(precision: KroneckerPrecision) -> Callable[[float], float]:
    values = np.asarray(precision.curvature_eigenvalues(), np.float64)
    return lambda tau: float(np.log1p(values / tau).sum())


def covered(model: CharGPT, structure: Structure) -> linear_maps.Matrices:
    """The matrices that a structure takes as uncertain."""
    return linear_maps.matrices(model, ("head",) if structure == "last-layer" else linear_maps.names(model))


@jax.jit
def _losses(model: CharGPT, windows: Int[Array, "W n+1"]) -> Float[Array, " W"]:
    return jax.lax.map(lambda window: cross_entropy(model(window[:-1]), window[1:]).sum(), windows, batch_size=64)


def evidence_of(
    model: CharGPT,
    windows: Int[Array, "W n+1"],
    at: linear_maps.Matrices,
    log_det_ratio: Callable[[float], float],
) -> Callable[[float], Evidence]:
    """The parts of the evidence of the windows as a function of the prior precision."""
    log_likelihood = -float(np.asarray(_losses(model, windows), np.float64).sum())
    square = float(np.square(np.asarray(linear_maps.flat(at), np.float64)).sum())
    return lambda tau: Evidence(log_likelihood, log_det_ratio(tau), tau * square)


def tuned(model: CharGPT, windows: Int[Array, "W n+1"], at: linear_maps.Matrices, found: Curvature) -> float:
    """The prior precision of the largest evidence. Raises ValueError if there is none in the range of evidence.py."""
    rough = evidence_of(model, windows, at, found.rough_log_det_ratio)
    near = tuned_prior_precision(lambda tau: rough(tau).total)
    if found.rough_log_det_ratio is found.log_det_ratio:
        return near
    whole = evidence_of(model, windows, at, found.log_det_ratio)
    return tuned_prior_precision(lambda tau: whole(tau).total, near)


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
        config = checkpoint.configuration_of(run)
        text = corpus.load(text_path, config.context + 1)
        state, _, _ = checkpoint.load(path, None, text.sha256, initial_state(config, len(text.vocabulary)))
    except ValueError as error:
        raise ValueError(str(error).replace("--out:", "--run:", 1)) from None
    return state.model, config, text
