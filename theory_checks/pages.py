"""`python -m theory_checks.pages [--json FILE] [--docs FOLDER]`: what was measured, put into the page of each claim.

A page keeps its text; only what stands between its two markers is replaced. The index, README.md, is written whole.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from models import cli
from prob_transformer.files import write_text
from prob_transformer.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- measured -->", "<!-- /measured -->"


def number(value: Any) -> str:
    """A figure as the pages show it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def measured(check: dict[str, Any], record: dict[str, Any], picture: str | None) -> str:
    """The block of one page: figures, verdicts, and what was run."""
    versions = ", ".join(f"{name} {record['packages'][name]}" for name in ("jax", "numpyro", "scipy"))
    claim = f"claim: {check['figure_name']}, {check['cases']:,} cases"
    rows = [
        [claim, number(check["figure"]), f"be at most {number(check['tolerance'])}", f"**{check['verdict']}**"],
        ["counterexample", number(check["counterexample_figure"]), "fail", f"**{check['counterexample_verdict']}**"],
    ]
    shown = "" if picture is None else f"\n\n![{check['claim']}]({picture})"
    return f"""## What was measured

{markdown_table(("", "figure", "must", "verdict"), rows)}

Claim, where: {check["regime"]}

Counterexample: {check["counterexample"]}

Tolerance: {check["tolerance_reason"]}

`python -m theory_checks --only {check["id"]} --seed {record["seed"]}`; {versions}, \
Python {record["python"]}, {record["machine"]}; {check["seconds"]:.0f} s. All figures: \
[theory_checks.json](../../results/reference/theory_checks.json).{shown}"""


def fill(page: str, block: str) -> str:
    """The page with the block between its markers; ValueError unless each marker occurs once, in order."""
    parts = re.split(f"({START}|{END})", page)
    if parts[1::2] != [START, END]:
        raise ValueError(f"page: has not one {START} followed by one {END}; put both in.")
    return f"{parts[0]}{START}\n{block}\n{END}{parts[-1]}"


def index(report: dict[str, Any]) -> str:
    """The table of all claims."""
    headings = ("id", "claim", "mark", "cases", "figure", "at most", "verdict", "counterexample must fail")
    rows = [
        [
            f"[{check['id']}]({check['id']}.md)",
            check["claim"],
            check["mark"],
            f"{check['cases']:,}",
            number(check["figure"]),
            number(check["tolerance"]),
            check["verdict"],
            f"{check['counterexample_verdict']} ({number(check['counterexample_figure'])})",
        ]
        for check in report["checks"]
    ]
    return f"""# Every claim: statement, proof, and what was measured

One page a claim, one check a page: `python -m theory_checks --only ID`. This table and the figures of
the pages are written by `python -m theory_checks.pages` from
[theory_checks.json](../../results/reference/theory_checks.json). Marks: paper, the paper says it;
derived, proved and checked here; ours, our own addition.

`python -m theory_checks --sabotage` puts mistakes into the library; [each of them](sabotage.md) is
noticed by at least one check. [Mutation testing](../mutation.md) asks the same of the test suite.

{markdown_table(headings, rows)}
"""


def sabotage_page(report: dict[str, Any]) -> str:
    """The page of the mistakes: what each replaces by what, and the checks that notice it."""
    unharmed, *mistakes = report["mistakes"]
    rows = []
    for row in mistakes:
        changes = [
            f"{one['file'].rpartition('/')[2]}: `{' '.join(one['old'].split())}` -> `{' '.join(one['new'].split())}`"
            for one in row["replacements"]
        ]
        rows.append([row["mistake"], "\n".join(changes), ", ".join(row["caught_by"]) or "**nothing**"])
    outcome = "FAIL" if unharmed["caught_by"] else "pass"
    caught, record = sum(bool(row["caught_by"]) for row in mistakes), report["provenance"]
    return f"""# Mistakes put into the library, one by one, and the checks that notice them

`python -m theory_checks --sabotage`: {caught} of {len(rows)} mistakes are caught, each by at least one of \
the {len(report["checks"])} quick checks; on the library as it is they all {outcome}. \
Seed {record["seed"]}, Python {record["python"]}, JAX {record["packages"]["jax"]}. \
Written by `python -m theory_checks.pages` from [sabotage.json](../../results/reference/sabotage.json).

{markdown_table(("mistake", "in prob_transformer/", "caught by"), rows)}
"""


def pages(report: dict[str, Any], docs: Path) -> dict[Path, str]:
    """The text of every page and of the index, by path. Raises ValueError naming a page that is missing."""
    found = {docs / "README.md": index(report)}
    for check in report["checks"]:
        path = docs / f"{check['id']}.md"
        try:
            page = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"--docs: no page at {path} ({error.strerror}); write one with {START} and {END}."
            ) from None
        picture = f"../../results/reference/figures/claims/{check['id']}.png"
        shown = picture if (docs / picture).exists() else None
        found[path] = fill(page, measured(check, report["provenance"], shown))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m theory_checks.pages", description="Fill in the pages of the claims."
    )
    parser.add_argument("--json", type=Path, default=Path("results/reference/theory_checks.json"), help="of the checks")
    parser.add_argument("--docs", type=Path, default=Path("docs/claims"), help="folder of the pages")
    options = parser.parse_args(arguments)
    try:
        report = json.loads(options.json.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"--json: no results at {options.json}; run python -m theory_checks --json {options.json}."
        ) from None
    texts = pages(report, options.docs)
    mistakes = options.json.with_name("sabotage.json")
    if mistakes.exists():
        texts[options.docs / "sabotage.md"] = sabotage_page(json.loads(mistakes.read_text(encoding="utf-8")))
    for path, text in texts.items():
        write_text(path, text)
    print(f"pages: {options.docs}")


if __name__ == "__main__":
    cli.run(main)
