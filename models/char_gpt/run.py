"""One run from configuration to files: DIR/checkpoint.eqx, DIR/margins.npz and, last of all, DIR/metrics.json."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh

from models.char_gpt import checkpoint
from models.char_gpt.config import Config, renamed
from models.char_gpt.evaluation import evaluate
from models.char_gpt.model import CharGPT
from models.char_gpt.sharding import is_first_process
from models.char_gpt.training import seconds_per_step, train
from models.corpus import Corpus
from prob_transformer.files import atomic_path, provenance, write_json

METRICS, MARGINS = "metrics.json", "margins.npz"


def finished(out: Path, config: Config, corpus_sha256: str) -> dict[str, Any] | None:
    """The metrics in `out` if they are of this very run, else None. Raises ValueError if they cannot be read."""
    path = out / METRICS
    if not path.is_file():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        configuration, text = metrics["provenance"]["configuration"], metrics["corpus"]["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--out: {path} is not the metrics of a run; delete it, or pass another folder.") from None
    return metrics if config.made(configuration) and text == corpus_sha256 else None


def run(config: Config, corpus: Corpus, out: Path, mesh: Mesh | None = None) -> dict[str, Any]:
    """Train (going on from a checkpoint in `out`), evaluate, write the files and return the metrics.

    A mesh spreads the training; every process then evaluates the whole model on its first device.
    """
    done = finished(out, config, corpus.sha256)
    if done is not None:
        return done
    # Taken before training, so that a commit made meanwhile is not taken for the one that ran.
    record_of_origin = provenance(config.seed, config.as_dict())
    state, record = train(config, corpus, out, mesh=mesh)
    measured, determinants = evaluate(state.model, corpus, config)
    metrics = {
        "provenance": record_of_origin,
        "method": config.method,
        "parameters": parameter_count(state.model),
        "wall_seconds": record["wall_seconds"],
        "seconds_per_step": seconds_per_step(record, config.steps),
        "corpus": corpus.describe(),
        **measured,
        "watch": record["watch"],
        "crossings": record["crossings"],
        "halved_steps": int(state.halvings),
        "training": record["history"],
    }
    if is_first_process():
        with atomic_path(out / MARGINS) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, embedding=determinants["embedding"], layers=determinants["layers"])
        write_json(out / METRICS, metrics)
    return metrics


def parameter_count(model: CharGPT) -> int:
    """How many numbers training changes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


def configuration_of(out: Path) -> Config:
    """The configuration of the run whose checkpoint is in `out`. Raises ValueError if there is none."""
    return Config(**renamed(checkpoint.read_header(out / checkpoint.NAME)["configuration"]))
