"""The tables of a made-up result, and that the page holds only what was run."""

import json
import re

import pytest

from benchmarks import __main__ as command
from benchmarks.__main__ import SECTIONS
from benchmarks.result_tables import Column, Section, load_published, markdown, shown


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("seconds", 0.0125, "12.5 ms"),
        ("seconds", 2.5, "2.5 s"),
        ("seconds", {"median": 2.0, "low": 0.5, "high": 3.0}, "2 s (500 ms to 3 s)"),
        ("ratio", {"median": 0.2345, "low": 0.1, "high": 12.0}, "0.234 (0.1 to 12)"),
        ("share", {"median": 0.256, "low": 0.2, "high": 0.3}, "25.6% (20.0% to 30.0%)"),
        ("megabytes", 1234.4e6, "1,234"),
        ("billions", 78.4e9, "78"),
        ("error", 1.23e-6, "1.2e-06"),
        ("number", -0.0140213, "-0.01402"),
        ("count", 4096, "4,096"),
        ("text", "fast", "fast"),
        ("ratio", None, "-"),
    ],
)
def test_entries(kind, value, text):
    assert shown(kind, value) == text


def test_every_kind_of_column_is_known():
    kinds = {column.kind for section in SECTIONS for column in section.columns}
    assert kinds <= {"text", "count", "seconds", "ratio", "share", "megabytes", "billions", "error", "number"}


def test_markdown_shows_rows_targets_notes_and_origin(result):
    # Tables are padded to the width of their columns.
    text = re.sub("-{3,}", "---", re.sub(" +", " ", markdown(result, SECTIONS, level=3)))
    lines = text.splitlines()
    assert "- A processor, 2 cores, 16 GiB, Linux x86_64; JAX on cpu (cpu)" in lines
    assert "- python 3.11.7, jax 0.10.2, torch not installed" in lines
    assert any("commit abc, seed 3; medians of 7 paired rounds" in line for line in lines)
    assert "| low enough | at most 0.25 | 0.2 | met |" in lines
    assert "| too low | at least 0.25 | 0.2 | not met |" in lines
    assert "| unknown | at most 0.22 | - | not measured |" in lines
    start = lines.index("### Kernel: value and gradient")
    assert lines[start + 4] == "Here: 2 cells, n = 4."
    # The column that no row fills is left out, and a bar in a name does not start a new one.
    assert lines[start + 6 : start + 10] == [
        "| | cells | time | time a cell | fast exact / this, a cell | share of the machine's rate |",
        "|---|---|---|---|---|---|",
        "| fast \\| exact | 2,000 | 500 ms (250 ms to 1.5 s) | 250 ms | 0.125 (0.1 to 0.5) | 30.5% (20.0% to 40.0%) |",
        "| PyTorch (PyTorch not installed) | - | - | - | - | - |",
    ]
    assert lines[start + 11] == "A note."


def test_rows_of_two_kinds_stand_in_two_tables_without_the_columns_of_the_other(result):
    columns = tuple(Column(name, name, "count") for name in ("alone", "shared", "other"))
    found = {"setting": "s", "rows": [{"other": 1, "shared": 2}, {"alone": 3, "shared": 4}], "targets": [], "notes": []}
    result["sections"] = {"two": found}
    text = markdown(result, [Section("two", "Two", "About.", columns, dict, apart="alone")])
    shown_rows = re.sub("-{3,}", "---", re.sub(" +", " ", text)).split("Here: s.\n\n")[1].split("\n")
    assert shown_rows == [
        "| alone | shared |", "|---|---|", "| 3 | 4 |", "", "| shared | other |", "|---|---|", "| 2 | 1 |",
    ]  # fmt: skip


def test_a_quick_run_is_not_judged(result):
    assert "not met" in markdown(result, SECTIONS)
    result["provenance"]["configuration"]["quick"] = True
    text = markdown(result, SECTIONS)
    assert "fast \\| exact" in text
    assert "not met" not in text


def test_the_page_is_written_from_results_alone_in_the_order_of_their_names(result, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    written = tmp_path / "docs" / "page.md"
    command.main(["--page", str(written), "--results", str(tmp_path / "two.json"), str(tmp_path / "one.json")])
    text = written.read_text(encoding="utf-8")
    assert text == command.page({"two": result, "one": result})
    assert re.findall("^## .*", text, re.MULTILINE) == ["## one", "## two"]
    assert len(re.findall(r"\| too low +\| at least 0.25 +\| 0.2 +\| not met", text)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result["provenance"]["configuration"].update(quick=True), "is a quick run"),
        (lambda result: result["sections"].pop("kernel"), "lacks kernel"),
        (lambda result: result.pop("sections"), "is not a result; write one with"),
    ],
)
def test_results_not_fit_for_the_page_are_refused(result, tmp_path, change, message):
    change(result)
    (tmp_path / "r.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=rf"RESULT: .*r\.json {message}"):
        command.main(["--page", str(tmp_path / "page.md"), "--results", str(tmp_path / "r.json")])
    assert not (tmp_path / "page.md").exists()


def test_missing_results_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"RESULT: .*none\.json is not a result; write one with"):
        load_published(tmp_path / "none.json", SECTIONS, "python -m benchmarks")
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="--results: none given and none in"):
        command.main(["--page", str(tmp_path / "page.md")])


def test_the_committed_page_shows_exactly_the_committed_results(tmp_path):
    command.main(["--page", str(tmp_path / "page.md")])
    committed = (command.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert committed == (tmp_path / "page.md").read_text(encoding="utf-8"), "run python -m benchmarks --page"
