"""The commands `python -m models.char_gpt {train,resume,generate,laplace}`.

A run leaves DIR/checkpoint.eqx, DIR/margins.npz and, last of all, DIR/metrics.json.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from models import corpus
from models.char_gpt import checkpoint, device_mesh, generate, laplace
from models.char_gpt.config import CHOICES, Config, in_names_of_today
from models.char_gpt.evaluation import evaluate
from models.char_gpt.train import Method, TrainingDivergedError, full_configuration, train_model
from models.char_gpt.training_record import as_metrics, ends
from prob_transformer.files import atomic_path, provenance, write_json
from prob_transformer.transformer.network import parameter_count

METRICS, MARGINS = "metrics.json", "margins.npz"
_HELP = {
    "objective": "ce: plain cross-entropy; margin: plus the barrier; map: plus the full embedding prior",
    "barrier_site": "embedding: one prior head over the input embeddings; layers: the heads of every layer",
    "barrier_form": "two-sided: -log|det J|; one-sided: 0 from the threshold on",
    "barrier_threshold": "the det J from which the one-sided barrier is zero",
    "barrier_weight": "lambda, the weight of the barrier (margin) or of the embedding prior (map)",
    "weight_prior_scale": "standard deviation of the normal prior on all weights, shared by all objectives",
    "watch_every": "steps between measurements of sign(det J) at both sites",
    "backtrack": "how often a step may be halved when it makes determinants negative; 0 turns it off",
    "noise_scale": "sigma of the embedding process, for map",
    "first_scale": "sigma_1 of the embedding process, for map",
    "evaluation_windows": "validation windows that are evaluated",
    "implementation": "which one of the density trains and measures margins; both give the same numbers",
    "barrier_share": "share of sequences, heads and layers whose barrier enters a step (margin, blocked)",
    "product_dtype": "type of the large matrix products of the blocked implementation; determinants stay float32",
    "remat": "blocks: recompute every layer in the backward pass instead of storing it",
}


def finished(out: Path, configuration: dict[str, Any], corpus_sha256: str) -> dict[str, Any] | None:
    """The metrics in `out` if they are of this very run, else None. Raises ValueError if they cannot be read."""
    path = out / METRICS
    if not path.is_file():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        saved, text = metrics["provenance"]["configuration"], metrics["corpus"]["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--out: {path} is not the metrics of a run; delete it, or pass another folder.") from None
    return metrics if (in_names_of_today(saved), text) == (configuration, corpus_sha256) else None


def run(
    config: Config,
    text: corpus.Corpus,
    out: Path,
    mesh: Mesh | None = None,
    method: Method | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Train (going on from a checkpoint in `out`), evaluate, write the files and return the metrics.

    `steps` extends the run to so many steps in all, at its final learning rate. A mesh spreads the training; every
    process then evaluates the whole model on its first device.
    """
    configuration = full_configuration(config, method)
    done = finished(out, configuration, text.sha256)
    if done is not None and steps is None and not (out / checkpoint.NAME).exists():
        return done
    # Taken before training, so that a commit made meanwhile is not taken for the one that ran.
    record_of_origin = provenance(config.seed, configuration)
    state, record = train_model(config, text, out, method, steps=steps, mesh=mesh)
    # Otherwise the metrics are of fewer steps, because the run was extended since.
    if done is not None and done.get("extensions", []) == record["extensions"]:
        return done
    measured, determinants = evaluate(state.model, text, config)
    metrics = {
        "provenance": record_of_origin,
        "method": config.method if method is None else method.name,
        "parameters": parameter_count(state.model),
        "corpus": text.describe(),
        **measured,
        "extensions": record["extensions"],
        **as_metrics(record, ends(config, record)[-1], int(state.halvings)),
    }
    if jax.process_index() == 0:
        with atomic_path(out / MARGINS) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, embedding=determinants["embedding"], layers=determinants["layers"])
        write_json(out / METRICS, metrics)
    return metrics


def add_configuration(parser: argparse.ArgumentParser, left_out: tuple[str, ...] = ()) -> None:
    """An option for every field of a configuration."""
    for field in dataclasses.fields(Config):
        if field.name not in left_out:
            parser.add_argument(
                "--" + field.name.replace("_", "-"),
                type=field.type if field.type in (int, float) else str,
                choices=CHOICES.get(field.name),
                default=field.default,
                help=f"{_HELP.get(field.name, field.name.replace('_', ' '))} (default: %(default)s)",
            )


def add_text_and_folder(parser: argparse.ArgumentParser) -> None:
    """The options --corpus and --out."""
    parser.add_argument("--corpus", type=Path, help="any UTF-8 text (default: the Wikipedia sample)")
    parser.add_argument("--out", type=Path, required=True, help="folder for what a run or sweep leaves")


def configuration_in(arguments: argparse.Namespace) -> Config:
    """The configuration that the options give."""
    names = (field.name for field in dataclasses.fields(Config))
    return Config(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.char_gpt", description="A small character-level GPT.")
    commands = parser.add_subparsers(dest="command", required=True)
    purposes = {"train": "train one model and measure it", "resume": "continue a run from its checkpoint"}
    training, resumed = (
        commands.add_parser(name, help=purpose, description=purpose) for name, purpose in purposes.items()
    )
    add_configuration(training)
    resumed.add_argument("--steps", type=int, metavar="N", help="go on to N steps in all, at the final learning rate")
    for command in (training, resumed):
        add_text_and_folder(command)
        command.add_argument("--mesh", metavar="data=D,heads=H", help="spread training over all D * H devices")
        command.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 of several listens")
        command.add_argument("--processes", type=int, metavar="N", help="how many processes take part")
        command.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    for name, module, purpose in (
        ("generate", generate, "text of a trained run, with its margins"),
        ("laplace", laplace, "uncertainty of a trained run's weights, and evidence"),
    ):
        module.add_arguments(commands.add_parser(name, help=purpose, description=purpose))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status of the command: 1 if training diverged. Raises ValueError for what is refused."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["sweep"]:
        raise ValueError("sweep: is now python -m paper_figures.study sweep, with the same options.")
    arguments, console = _parser().parse_args(given), Console()
    if arguments.command == "generate":
        # Standard output has the text alone.
        generate.main(arguments, Console(stderr=True))
        return 0
    if arguments.command == "laplace":
        laplace.main(arguments, console)
        return 0
    is_new = arguments.command == "train"
    if is_new and (arguments.out / checkpoint.NAME).exists():
        raise ValueError(f"--out: {arguments.out} already holds a run; resume it, or pass another folder.")
    config = configuration_in(arguments) if is_new else checkpoint.read_header(arguments.out / checkpoint.NAME).config
    steps = None if is_new else arguments.steps
    return run_and_report(config, arguments.corpus, arguments.out, console, _mesh(arguments, config), steps=steps)


def run_and_report(
    config: Config,
    text: Path | None,
    out: Path,
    console: Console,
    mesh: Mesh | None = None,
    method: Method | None = None,
    steps: int | None = None,
) -> int:
    """Run, and print a sentence on the metrics; exit status 1 and one line if the loss stops being finite."""
    try:
        metrics = run(config, corpus.load(text, config.context + 1), out, mesh, method, steps)
    except TrainingDivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if jax.process_index() == 0:
        _report(console, metrics, out)
    return 0


def _mesh(arguments: argparse.Namespace, config: Config) -> Mesh | None:
    """The mesh asked for, after joining the other processes if there are any."""
    several = (arguments.coordinator, arguments.processes, arguments.process_id)
    given = several.count(None) < 3
    if arguments.mesh is None and given:
        raise ValueError("--mesh: not given; pass data=D,heads=H with the devices of all processes.")
    if arguments.mesh is None:
        return None
    shape = device_mesh.parse_mesh(arguments.mesh)
    if given and None in several:
        raise ValueError("--coordinator, --processes, --process-id: pass all three, or none for one process.")
    if given:
        device_mesh.connect(*several)
    return device_mesh.mesh_for(config, *shape)


def _report(console: Console, metrics: dict[str, Any], out: Path) -> None:
    clean, error = metrics["clean_loss"], metrics["clean_loss"]["standard_error"]
    spread = "one window, so no standard error" if error is None else f"standard error over windows {error:.4f}"
    console.print(
        f"{metrics['method']}: {clean['nats_per_character']:.4f} nats per character on {clean['characters']:,} "
        f"validation characters ({spread}); det J <= 0 at "
        f"{metrics['margins']['layers']['negative_share']:.2%} of the layers' positions; {out / METRICS}"
    )
