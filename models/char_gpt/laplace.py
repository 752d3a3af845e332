"""`python -m models.char_gpt laplace`: uncertainty of the weights of a trained run, and what it does to predictions.

The data are N characters of training text in windows spread evenly over it, not all that the run was trained on: they
are what the evidence is of, and the posterior is that of N characters.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Column, Table

from models import corpus
from models.char_gpt import checkpoint
from models.char_gpt.config import Config
from models.char_gpt.evaluation import evaluation_windows, standard_error
from models.char_gpt.linear_maps import trained_network
from models.char_gpt.train import initial_state
from prob_transformer._validation import require_count, require_seed
from prob_transformer.files import file_sha256, provenance, require_ending, require_writable
from prob_transformer.inference.laplace import laplace
from prob_transformer.inference.laplace.kronecker import Positions
from prob_transformer.inference.laplace.network import NetworkStructure
from prob_transformer.inference.result_tree import save
from prob_transformer.transformer.network import Transformer

DRAWS, CHARACTERS = 32, 32_768
_BINS = 15


def calibration_error(probabilities: Float[np.ndarray, "N V"], targets: Int[np.ndarray, " N"]) -> float:
    """Mean distance of accuracy from confidence over 15 equal bins of the largest probability, weighted by count."""
    confidence, hit = probabilities.max(-1), probabilities.argmax(-1) == targets
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    return float(np.abs(np.bincount(bins, confidence - hit, _BINS)).sum() / len(targets))


def window_losses(probabilities: Float[Any, "W n V"], targets: Int[np.ndarray, "W n"]) -> Float[np.ndarray, " W"]:
    """The mean loss of every window in nats a character."""
    p = np.asarray(probabilities, np.float64)
    return -np.log(np.take_along_axis(p, targets[..., None], -1))[..., 0].mean(-1)


def score(
    probabilities: Float[Any, "W n V"], targets: Int[np.ndarray, "W n"], of_map: Float[np.ndarray, " W"]
) -> dict[str, float | None]:
    """How well probabilities predict the targets of several windows: the mean loss in nats a character, the expected
    calibration error, and the mean difference from the losses `of_map` on the same windows.

    Standard errors are over windows, None for one window.
    """
    p = np.asarray(probabilities, np.float64)
    losses = window_losses(p, targets)
    return {
        "nats_per_character": float(losses.mean()),
        "standard_error": standard_error(losses),
        "calibration_error": calibration_error(p.reshape(-1, p.shape[-1]), np.ravel(targets)),
        "minus_map": float((losses - of_map).mean()),
        "minus_map_standard_error": standard_error(losses - of_map),
    }


def training_windows(text: corpus.Corpus, config: Config, characters: int) -> Int[np.ndarray, "W n+1"]:
    """Windows of training text with about so many characters to predict. Raises ValueError for too few or too many."""
    available = len(text.train) // (config.context + 1) * config.context
    if not config.context <= characters <= available:
        raise ValueError(
            f"--characters: got {characters}; pass at least {config.context}, one window, and at most {available}."
        )
    chosen = dataclasses.replace(config, evaluation_windows=characters // config.context)
    return evaluation_windows(text.train, chosen)


def run_with_text(run: Path, text_path: Path | None) -> tuple[Transformer, Config, corpus.Corpus]:
    """The trained model of a run, its configuration and its text. Raises ValueError naming --run or --corpus."""
    path = run / checkpoint.NAME
    config = checkpoint.read_header(path, "--run").config
    text = corpus.load(text_path, config.context + 1)
    state, _, _ = checkpoint.load(path, None, text.sha256, initial_state(config, len(text.vocabulary)), "--run")
    return state.model, config, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--structure", choices=get_args(NetworkStructure), required=True)
    parser.add_argument("--prior-precision", type=float, help="tau (default: the one of the largest evidence)")
    parser.add_argument("--characters", type=int, default=CHARACTERS, help="of training text (default: %(default)s)")
    parser.add_argument(
        "--positions",
        choices=get_args(Positions),
        default="signs",
        help="how Kronecker factors combine the positions of a window: apart is exact and slow, signs exact in "
        "expectation, together what laplace-torch computes (default: %(default)s)",
    )
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the predictive (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of signs and draws (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="the text of the run (default: the Wikipedia sample)")
    parser.add_argument("--out", type=Path, required=True, help="the result, a netCDF file (.nc)")


def main(options: argparse.Namespace, console: Console) -> None:
    """Do what the options ask for: print the table and write the DataTree. Raises ValueError for bad options."""
    require_count("--draws", options.draws, 1, "the predictive averages over them")
    require_seed("--seed", options.seed, "signs and draws")
    tau = options.prior_precision
    if tau is not None and not (np.isfinite(tau) and tau > 0):
        raise ValueError(f"--prior-precision: got {tau}; pass a finite number greater than 0.")
    require_ending(f"--out: {options.out}", options.out, (".nc",))
    require_writable(f"--out: {options.out}", options.out)
    model, config, text = run_with_text(options.run, options.corpus)
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    of_weights = file_sha256(options.run / checkpoint.NAME)
    origin = provenance(options.seed, {**asked, "run_configuration": config.as_dict(), "checkpoint_sha256": of_weights})
    network = trained_network(model, jnp.asarray(training_windows(text, config, options.characters)))

    started, key = time.perf_counter(), jax.random.key(options.seed)
    chosen: dict[str, Any] = {"structure": options.structure, "positions": options.positions}
    try:
        fit = laplace(network, **chosen, prior_precision=tau, key=key)
    except ValueError as error:
        raise ValueError(str(error).replace("prior_precision:", "--prior-precision:", 1)) from None
    after_evidence = time.perf_counter()

    validation = evaluation_windows(text.validation, config)
    examples, targets = jnp.asarray(validation[:, :-1]), validation[:, 1:]
    # Apart from the key of the signs in the Kronecker factors.
    found = fit.predictive(jax.random.fold_in(key, 1), options.draws, examples, jnp.asarray(targets))
    predicted: dict[str, Any] = {"MAP": jax.nn.softmax(fit.logits(examples))}
    if options.structure == "last-layer":
        predicted["linearised, probit"] = fit.probit_probabilities(examples)
    predicted[f"linearised, {options.draws} draws"] = found.probabilities
    of_map = window_losses(predicted["MAP"], targets)

    summary = {
        "structure": options.structure,
        "covered": {name: list(matrix.shape) for name, matrix in fit.mean.items()},
        "parameters": fit.precision.size,
        "training_characters": int(network.targets.size),
        "validation_characters": int(targets.size),
        "prior_precision": fit.prior_precision,
        "prior_precision_tuned": tau is None,
        "log_evidence": fit.log_evidence,
        **fit.evidence._asdict(),
        "scores": {name: score(probabilities, targets, of_map) for name, probabilities in predicted.items()},
        "seconds": {
            "curvature_and_evidence": after_evidence - started,
            # After the scores, which wait for what JAX computes.
            "predictive": time.perf_counter() - after_evidence,
        },
    }
    attrs = {**origin, "objective": f"{options.structure} Laplace of {config.method}", "laplace": summary}
    save(fit.to_datatree(found, targets, attrs), options.out)
    _report(console, summary, options.out)


def _report(console: Console, summary: dict[str, Any], out: Path) -> None:
    console.print(
        f"{summary['structure']}: {summary['parameters']:,} parameters in {', '.join(summary['covered'])}; "
        f"embeddings and norms are taken as known. Prior precision {summary['prior_precision']:.4g}"
        f"{' (tuned)' if summary['prior_precision_tuned'] else ''}, log-evidence {summary['log_evidence']:.2f} nats of "
        f"{summary['training_characters']:,} training characters."
    )
    table = Table(
        Column("prediction", no_wrap=True),
        "nats per character",
        "standard error",
        "calibration error",
        "minus MAP",
        "its error",
    )
    for name, value in summary["scores"].items():
        table.add_row(name, *("undefined" if x is None else f"{x:.4f}" for x in value.values()))
    console.print(table)
    seconds = summary["seconds"]
    console.print(
        f"{summary['validation_characters']:,} validation characters; curvature and evidence "
        f"{seconds['curvature_and_evidence']:.1f} s, predictive {seconds['predictive']:.1f} s, compilation included; "
        f"{out}"
    )
