"""`python -m paper_figures.study {sweep,run,verdicts}`: train the study, a run of it alone, and judge it."""

import argparse
from pathlib import Path

from rich.console import Console

from models import cli, corpus
from models.char_gpt import commands
from paper_figures.study.analysis import analyse
from paper_figures.study.design import METHODS, PROFILES, Design
from paper_figures.study.runs import load_runs
from paper_figures.study.sweep import run_sweep
from paper_figures.study.tables import markdown
from prob_transformer._validation import require_choice
from prob_transformer.files import write_json

# Given by the method.
_BY_METHOD = ("objective", "barrier_site", "barrier_form", "barrier_weight")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paper_figures.study", description="The study of the barrier.")
    several = parser.add_subparsers(dest="command", required=True)
    every = several.add_parser("sweep", help="every method, strength and seed; goes on where it was killed")
    every.add_argument("--profile", default="quick", help=f"{', '.join(PROFILES)} (default: %(default)s)")
    every.add_argument("--workers", type=int, metavar="N", help="runs at a time, one thread each (default: one a core)")
    one = several.add_parser("run", help="one method, strength and seed; goes on from its checkpoint")
    one.add_argument("--method", required=True, help=", ".join(METHODS))
    one.add_argument("--strength", type=float, default=0.0, help="of the method (default: %(default)s)")
    commands.add_configuration(one, left_out=_BY_METHOD)
    for command in (every, one):
        commands.add_text_and_folder(command)
    judged = several.add_parser("verdicts", help="what a sweep says of the paper's findings, as JSON and as tables")
    judged.add_argument("--runs", type=Path, default=Path("results/runs/quick"), help="sweep (default: %(default)s)")
    judged.add_argument("--out", type=Path, default=Path("results/verdicts.json"), help="file (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status of the command: 1 if the training of a single run diverged. Raises ValueError for what is refused."""
    arguments, console = _parser().parse_args(argv), Console()
    if arguments.command == "verdicts":
        _judge_sweep(arguments.runs, arguments.out)
    elif arguments.command == "sweep":
        require_choice("--profile", arguments.profile, tuple(PROFILES))
        text = corpus.load(arguments.corpus, PROFILES[arguments.profile].base.context + 1)
        run_sweep(arguments.profile, arguments.corpus, text, arguments.out, console, arguments.workers)
    else:
        base = commands.configuration_in(arguments)
        design = Design(arguments.method, arguments.strength, base)
        return commands.run_and_report(design.config, arguments.corpus, arguments.out, console, method=design.loss)
    return 0


def _judge_sweep(runs: Path, out: Path) -> None:
    """Write the verdicts on a sweep as JSON and print them as tables and sentences."""
    record = analyse(load_runs(runs))
    write_json(out, record)
    print(markdown(record), "", *record["answers"], sep="\n")
    print(f"\n{len(record['findings'])} verdicts from seeds {', '.join(map(str, record['seeds']))} in {out}")


if __name__ == "__main__":
    cli.run(main)
