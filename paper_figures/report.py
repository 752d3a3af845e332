"""`python -m paper_figures.report`: results/report.html, from saved results only; it opens offline beside figures/."""

import argparse
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.result_tables import TARGET_HEADINGS, target_cells
from models import cli
from paper_figures.__main__ import FIGURES
from paper_figures.html import STYLE, table
from paper_figures.inference_result import INFERENCE, load_inference
from paper_figures.runs import Runs, load_runs
from paper_figures.saved import load_checks
from paper_figures.study_section import study_section
from paper_figures.verdicts import load_verdicts
from prob_transformer.files import write_text


def _checks_section(checks: dict[str, Any]) -> str:
    rows = []
    for check in checks["checks"]:
        mark = "" if check["as_stated"] else ' class="bad"'
        figure, broken = check["figure"], check["counterexample_figure"]
        rows.append(
            [
                f"<code>{escape(check['id'])}</code>",
                escape(check["mark"]),
                f"{escape(check['statement'])}<br><small>Where: {escape(check['regime'])}</small>",
                f"{check['cases']:,}",
                f"{figure:.3g}" if isinstance(figure, float) else escape(str(figure)),
                f"{check['tolerance']:.3g}",
                f"<span{mark}>{escape(check['verdict'])}</span>",
                f"<span{mark}>{escape(check['counterexample_verdict'])}</span>"
                + (f" ({broken:.4g})" if isinstance(broken, float) else "")
                + f"<br><small>{escape(check['counterexample'])}</small>",
            ]
        )
    header = [("id", False), ("mark", False), ("claim", False), ("cases", True), ("figure", True), ("tolerance", True)]
    header += [("verdict", False), ("counterexample must fail", False)]
    stated = sum(check["as_stated"] for check in checks["checks"])
    return (
        f"<p>{stated} of {len(checks['checks'])} checks came out as stated: the claim holds to its tolerance where it "
        "should, and its counterexample fails. Marks: paper, said by the paper; derived, proved and checked here "
        "(docs/claims, one page a claim); ours, our own addition.</p>" + table(header, rows)
    )


def _inference_section(path: Path) -> str:
    sections = load_inference(path)
    targets = [target for section in sections.values() for target in section["targets"]]
    rows = [[escape(cell) for cell in target_cells(target)] for target in targets]
    met = sum(cells[-1] == "met" for cells in rows)
    notes = "".join(f"<p>{escape(note)}</p>" for section in sections.values() for note in section["notes"])
    header = [(heading, heading == "measured") for heading in TARGET_HEADINGS]
    return f"""
<p>MAP, Laplace, NUTS and particles on models small enough for the truth: closed forms, quadrature, and simulation-based
calibration, in which the rank of what a dataset was drawn with among posterior draws must be uniform. {met} of {len(rows)}
figures keep their bounds. Measured once and committed, not by this command; docs/inference_benchmark.md has all tables.</p>
{table(header, rows)}{notes}"""


def _figures_section(results: Path) -> str:
    parts = [
        "<p>Each picture is a file of the folder figures beside this page, as PNG and as PDF. A copy of this page needs that "
        "folder with it.</p>"
    ]
    for number, figure in enumerate(FIGURES, start=1):
        picture = f"figures/{figure.NAME}.png"
        if not (results / picture).is_file():
            raise ValueError(f"--results: no figure at {results / picture}; run python -m paper_figures.")
        caption = escape(figure.CAPTION)
        parts.append(
            f'<figure><img src="{picture}" alt="{caption}" onerror="this.hidden = true; this.nextElementSibling.hidden = false">'
            f'<p class="bad" hidden>The file {picture} is missing beside this page. Copy the folder figures next to it, '
            "or make it with python -m paper_figures.</p>"
            f"<figcaption>Figure {number}. {caption}</figcaption></figure>"
        )
    return "".join(parts)


def _provenance_section(checks: dict[str, Any], runs: Runs) -> str:
    finished = [line for line in runs.lines if line["status"] == "finished"]
    record = finished[0]["provenance"]
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    commits = ", ".join(sorted({str(line["provenance"]["commit"]) for line in finished}))
    minutes = sum(line["wall_seconds"] for line in finished) / 60
    commands = "\n".join([checks["provenance"]["command"], record["command"]])
    return f"""
<p>Version {escape(record["version"])}, commit {escape(commits)}; Python {escape(record["python"])}; {escape(packages)};
{escape(record["machine"])}. Profile {escape(runs.profile)}: {len(runs.lines)} runs, {minutes:.1f} minutes of training on one
thread each. Text sha256 {escape(finished[0]["corpus"]["sha256"])}. The checks draw the same cases every time; every saved run
has its configuration and seed.</p>
<pre>{escape(commands)}</pre>"""


def build(results: Path, profile: str, inference: Path = INFERENCE) -> str:
    """The report as HTML. Raises ValueError naming the command to run for what is missing."""
    checks = load_checks(results / "theory_checks.json", "--results")
    runs = load_runs(results / "runs" / profile)
    verdicts = load_verdicts(results / "verdicts.json")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attention as a stochastic process: what was checked and measured</title><style>{STYLE}</style></head><body>
<h1>Attention as a stochastic process: what was checked and measured</h1>
<p>Causal self-attention read as a generator, u_i = &mu;_i(u_i; u_&lt;i) + &epsilon;_i, has by a change of
variables the log-density log N(e_i) + log|det J_i|, exact as long as det J_i &gt; 0 for every embedding. Where det J_i = 0 the
map from noise to embedding is not invertible: the degeneracy boundary. A log-barrier keeps training away from it. This page
shows whether the mathematics holds, claim by claim, and what the barrier did to small models trained on real text. Background: arXiv 2602.22271 and docs/theory.md.</p>
<h2>1. Is the theory right?</h2>{_checks_section(checks)}
<h2>2. What did training with the barrier do?</h2>{study_section(verdicts, runs)}
<h2>3. Does inference find the truth?</h2>{_inference_section(inference)}
<h2>4. Figures</h2>{_figures_section(results)}
<h2>5. What was run</h2>{_provenance_section(checks, runs)}
</body></html>
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m paper_figures.report", description="Write the HTML report.")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder (default: %(default)s)")
    parser.add_argument("--profile", default="quick", help="profile of the sweep (default: %(default)s)")
    parser.add_argument("--inference", type=Path, default=INFERENCE, help="result of theory_checks.inference")
    arguments = parser.parse_args(argv)
    path = arguments.results / "report.html"
    write_text(path, build(arguments.results, arguments.profile, arguments.inference))
    print(f"report: {path}")


if __name__ == "__main__":
    cli.run(main)
