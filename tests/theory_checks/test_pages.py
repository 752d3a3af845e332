"""The pages of the claims: complete, filled from the committed results, and refused when they cannot be."""

import json
import re

import pytest

from theory_checks import claims, mistakes, pages

DOCS = pages.ROOT / "docs" / "claims"
RESULTS = pages.ROOT / "results" / "reference" / "theory_checks.json"


def test_every_claim_has_a_page_with_statement_proof_counterexample_and_check():
    for check in claims.CHECKS:
        text = (DOCS / f"{check.id}.md").read_text(encoding="utf-8")
        for part in (
            r"\*\*Statement",
            r"\*\*(Proof|Derivation|Why)",
            r"\*\*Where (it|a shortcut) fails",
            r"\*\*How it is checked",
        ):
            assert re.search(part, text), (check.id, part)


def test_committed_pages_show_the_committed_results():
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [row["id"] for row in report["checks"]] == [check.id for check in claims.CHECKS]
    for path, text in pages.pages(report, DOCS).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m theory_checks.pages"


def test_committed_sabotage_was_complete_and_all_caught():
    report = json.loads(RESULTS.with_name("sabotage.json").read_text(encoding="utf-8"))
    assert report["complete"]
    assert report["all_caught"]
    assert [row["mistake"] for row in report["mistakes"][1:]] == [mistake.name for mistake in mistakes.MISTAKES]
    assert (DOCS / "sabotage.md").read_text(encoding="utf-8") == pages.sabotage_page(report)


def test_a_page_keeps_its_text():
    page = f"# Title\n{pages.START}\nold\n{pages.END}\nend\n"
    assert pages.fill(page, "new") == f"# Title\n{pages.START}\nnew\n{pages.END}\nend\n"


@pytest.mark.parametrize("page", ["", pages.START, f"{pages.END}{pages.START}", 2 * f"{pages.START}{pages.END}"])
def test_a_page_without_its_markers_is_refused(page):
    with pytest.raises(ValueError, match="page: has not one"):
        pages.fill(page, "new")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: pages.main(["--json", str(folder / "none.json")]), "--json: no results at"),
        (lambda folder: pages.pages(json.loads(RESULTS.read_text(encoding="utf-8")), folder), "--docs: no page at"),
    ],
    ids=["results", "pages"],
)
def test_missing_results_and_pages_are_named(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
