"""`python -m models.char_gpt {train,resume,sweep,laplace}`."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from models import cli, corpus
from models.char_gpt import checkpoint, laplace, sharding
from models.char_gpt.config import CHOICES, Config
from models.char_gpt.run import METRICS, configuration_of, run
from models.char_gpt.study import PROFILES
from models.char_gpt.sweep import sweep
from models.char_gpt.training import TrainingDivergedError

_HELP = {
    "objective": "ce: plain cross-entropy; margin: plus the barrier; map: plus the full embedding prior",
    "barrier_site": "embedding: one prior head over the input embeddings; layers: the heads of every layer",
    "barrier_form": "two-sided: -log|det J|; one-sided: 0 from the threshold on; trace: tr M; frobenius: |RL|^2",
    "barrier_threshold": "the det J from which the one-sided barrier is zero",
    "regulariser": "what stands in for the barrier, with ce",
    "regulariser_strength": "the strength of that regulariser (see models/char_gpt/regularisers.py)",
    "barrier_weight": "lambda, the weight of the barrier (margin) or of the embedding prior (map)",
    "weight_prior_scale": "standard deviation of the normal prior on all weights, shared by all objectives",
    "watch_every": "steps between looks at sign(det J) at both sites",
    "backtrack": "how often a step may be halved when it makes determinants negative; 0 turns it off",
    "noise_scale": "sigma of the embedding process, for map",
    "first_scale": "sigma_1 of the embedding process, for map",
    "evaluation_windows": "validation windows that are evaluated",
    "implementation": "which one of the density trains and watches; both give the same numbers",
    "barrier_share": "share of sequences, heads and layers whose barrier enters a step (margin, blocked)",
    "product_dtype": "type of the large matrix products of the blocked implementation; determinants stay float32",
    "rematerialise": "blocks: recompute every layer in the backward pass instead of storing it",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.char_gpt", description="A small character-level GPT.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train one model and measure it")
    for field in dataclasses.fields(Config):
        train.add_argument(
            "--" + field.name.replace("_", "-"),
            type=field.type if field.type in (int, float) else str,
            choices=CHOICES.get(field.name),
            default=field.default,
            help=f"{_HELP.get(field.name, field.name.replace('_', ' '))} (default: %(default)s)",
        )
    resume = commands.add_parser("resume", help="go on with a run from its checkpoint")
    every = commands.add_parser("sweep", help="every method, strength and seed; goes on where it was killed")
    every.add_argument("--profile", default="quick", help=f"{', '.join(PROFILES)} (default: %(default)s)")
    every.add_argument("--workers", type=int, metavar="N", help="runs at a time, one thread each (default: one a core)")
    for command in (train, resume):
        command.add_argument("--mesh", metavar="data=D,heads=H", help="spread training over all D * H devices")
        command.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 of several listens")
        command.add_argument("--processes", type=int, metavar="N", help="how many processes take part")
        command.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    for command in (train, resume, every):
        command.add_argument("--corpus", type=Path, help="any UTF-8 text (default: the Wikipedia sample)")
        command.add_argument("--out", type=Path, required=True, help="folder for checkpoint, metrics and margins")
    laplace.add_arguments(commands.add_parser("laplace", help="uncertainty of a trained run's weights, and evidence"))
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    console = Console()
    try:
        if arguments.command == "sweep":
            longest = max(profile.base.context for profile in PROFILES.values())
            context = PROFILES[arguments.profile].base.context if arguments.profile in PROFILES else longest
            text = corpus.load(arguments.corpus, context + 1)
            sweep(arguments.profile, arguments.corpus, text, arguments.out, console, arguments.workers)
            return 0
        if arguments.command == "laplace":
            laplace.main(arguments, console)
            return 0
        config = _train_configuration(arguments) if arguments.command == "train" else configuration_of(arguments.out)
        mesh = _mesh(arguments, config)
        text = corpus.load(arguments.corpus, config.context + 1)
        metrics = run(config, text, arguments.out, mesh)
        if sharding.is_first_process():
            _report(console, metrics, arguments.out)
    except TrainingDivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _train_configuration(arguments: argparse.Namespace) -> Config:
    config = Config(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Config)})
    if (arguments.out / checkpoint.NAME).exists():
        raise ValueError(f"--out: {arguments.out} already holds a run; resume it, or pass another folder.")
    return config


def _mesh(arguments: argparse.Namespace, config: Config) -> Mesh | None:
    """The mesh asked for, after joining the other processes if there are any."""
    several = (arguments.coordinator, arguments.processes, arguments.process_id)
    if arguments.mesh is None:
        if several != (None, None, None):
            raise ValueError("--mesh: not given; pass data=D,heads=H with the devices of all processes.")
        return None
    data, heads = sharding.parse_mesh(arguments.mesh)
    if several != (None, None, None):
        if None in several:
            raise ValueError("--coordinator, --processes, --process-id: pass all three, or none for one process.")
        sharding.connect(*several)
    return sharding.mesh_for(config, data, heads)


def _report(console: Console, metrics: dict[str, Any], out: Path) -> None:
    clean = metrics["clean_loss"]
    layers = metrics["margins"]["layers"]
    error = clean["standard_error"]
    spread = "one window, so no standard error" if error is None else f"standard error over windows {error:.4f}"
    console.print(
        f"{metrics['method']}: {clean['nats_per_character']:.4f} nats per character on {clean['characters']:,} "
        f"validation characters ({spread}); det J <= 0 at "
        f"{layers['negative_share']:.2%} of the layers' positions; {out / METRICS}"
    )


if __name__ == "__main__":
    cli.run(main)
