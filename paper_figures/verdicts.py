"""`python -m paper_figures.verdicts`: what a sweep says of the paper's findings, as JSON and as a table."""

import argparse
from pathlib import Path
from typing import Any

from models import cli
from paper_figures.analysis import comparisons, equal_cost, paired, selection, verdicts
from paper_figures.analysis.answers import answers
from paper_figures.analysis.comparisons import declared
from paper_figures.analysis.findings import FINDINGS, findings
from paper_figures.analysis.overview import at_one_cost, described
from paper_figures.analysis.selection import FIRST_BUDGET, Selection, select_all
from paper_figures.analysis.tables import markdown
from paper_figures.analysis.verdicts import judge
from paper_figures.runs import Runs, load_runs
from paper_figures.saved import load_record
from prob_transformer.files import provenance, write_json

RULES = {
    "selection": "largest strength whose mean clean validation loss is at most the budget above that of ce",
    "budget": selection.BUDGET,
    "first_budget": FIRST_BUDGET,
    "equal_cost": equal_cost.COST,
    "widest_gap": equal_cost.WIDEST_GAP,
    "primary": comparisons.PRIMARY,
    "level": verdicts.ALPHA,
    "intervals": paired.LEVEL,
    "smallest_effects": {
        "increase": comparisons.SMALLEST_INCREASE,
        "share of det J <= 0": comparisons.SMALLEST_SHARE,
        "1 % quantile of det J": comparisons.SMALLEST_MARGIN,
        "clean": comparisons.CLEAN_MARGIN,
        "lower clean loss": comparisons.SMALLEST_CLEAN_GAIN,
    },
    "perturbations": [list(perturbation) for perturbation in comparisons.PERTURBATIONS],
    "findings": dict(FINDINGS),
}


def analyse(runs: Runs) -> dict[str, Any]:
    """Selections, an overview of the methods, findings with sentences and the answers, ready for JSON."""
    selections = select_all(runs)
    entries = _findings(runs, selections)
    kept = ("finding", "split", "method", "strength", "within_budget", "verdict", "one_family_verdict")
    overview = [row for split in comparisons.SPLITS for row in described(selections, split)]
    return {
        "provenance": provenance(None, {"profile": runs.profile, "seeds": list(runs.seeds)}),
        "runs": {**runs.lines[0]["provenance"], "count": len(runs.lines)},
        "profile": runs.profile,
        "seeds": list(runs.seeds),
        "diverged": [
            {key: line[key] for key in ("method", "strength", "seed")}
            for line in runs.lines
            if line["status"] == "diverged"
        ],
        "never_finished": [method for method in runs.methods if method not in selections],
        "rules": RULES,
        "overview": overview,
        "equal_cost": [row for split in comparisons.SPLITS for row in at_one_cost(runs, split)],
        "findings": entries,
        "first_budget": [
            {key: entry[key] for key in kept} for entry in _findings(runs, select_all(runs, FIRST_BUDGET))
        ],
        "answers": answers(entries, overview),
    }


def _findings(runs: Runs, selections: dict[str, Selection]) -> list[dict[str, Any]]:
    compared = declared(runs, selections)
    return findings(judge(compared), judge(compared, primary_first=False), selections)


def load_verdicts(path: Path) -> dict[str, Any]:
    """A saved record. Raises ValueError naming the command that makes it if there is none."""
    command = "python -m paper_figures.verdicts --runs DIR --out"
    return load_record(path, ("findings", "overview", "equal_cost", "first_budget", "answers"), "no verdicts", command)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m paper_figures.verdicts", description="Judge a sweep.")
    parser.add_argument("--runs", type=Path, default=Path("results/runs/quick"), help="sweep (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/verdicts.json"), help="file (default: %(default)s)")
    arguments = parser.parse_args(argv)
    record = analyse(load_runs(arguments.runs))
    write_json(arguments.out, record)
    print(markdown(record))
    print("\n" + "\n".join(record["answers"]))
    print(f"\n{len(record['findings'])} verdicts from seeds {', '.join(map(str, record['seeds']))} in {arguments.out}")


if __name__ == "__main__":
    cli.run(main)
