"""The command line: exit status, table, JSON, and one line for bad input."""

import json
import subprocess
import sys

import pytest

from theory_checks import registry
from theory_checks.__main__ import main
from theory_checks.check import Check, Outcome

FIELDS = {
    "id",
    "claim",
    "statement",
    "mark",
    "regime",
    "counterexample",
    "tolerance",
    "tolerance_reason",
    "cases",
    "figure",
    "figure_name",
    "verdict",
    "counterexample_figure",
    "counterexample_verdict",
    "as_stated",
    "seconds",
    "details",
}


def a_check(identifier: str, outcome: Outcome | Exception) -> Check:
    def run(cases: int = 3) -> Outcome:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    texts = ["a claim", "a statement", "ours", "a regime", "a counterexample", 1e-6, "a reason", "a figure", run]
    return Check(identifier, *texts)  # type: ignore[arg-type]


GOOD = Outcome(3, 1e-9, True, 2.0, True)


@pytest.fixture
def checks(monkeypatch):
    def use(*found: Check) -> None:
        monkeypatch.setattr(registry, "CHECKS", found)

    return use


def test_all_as_stated_exits_0(checks, capsys):
    checks(a_check("one", GOOD), a_check("two", GOOD))
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 checks came out as stated." in printed
    assert "one" in printed
    assert "two" in printed


@pytest.mark.parametrize(
    ("outcome", "verdict", "counterexample"),
    [
        (Outcome(3, 1e-3, False, 2.0, True), "fails", "fails"),
        (Outcome(3, 1e-9, True, 0.0, False), "holds", "holds"),
        (ValueError("boom\nand a traceback"), "error", "error"),
    ],
)
def test_any_other_outcome_exits_1_and_the_others_still_run(checks, capsys, tmp_path, outcome, verdict, counterexample):
    checks(a_check("bad", outcome), a_check("good", GOOD))
    assert main(["--json", str(tmp_path / "checks.json")]) == 1
    written = json.loads((tmp_path / "checks.json").read_text())
    assert written["as_stated"] is False
    bad, good = written["checks"]
    assert (bad["verdict"], bad["counterexample_verdict"]) == (verdict, counterexample)
    assert (good["verdict"], good["as_stated"]) == ("holds", True)
    printed = capsys.readouterr()
    assert "1 of 2 checks came out as stated." in printed.out
    assert "Traceback" not in printed.out + printed.err


def test_figures_that_json_lacks_become_strings(checks, tmp_path):
    checks(a_check("bad", Outcome(3, float("inf"), False, float("nan"), False, {"worst": [float("-inf")]})))
    assert main(["--json", str(tmp_path / "checks.json")]) == 1
    (written,) = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert (written["figure"], written["counterexample_figure"]) == ("inf", "nan")
    assert written["details"] == {"worst": ["-inf"]}


def test_unknown_id_names_the_known_ones(capsys):
    assert main(["--only", "normalisation", "--only", "nonsense"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: --only: unknown id 'nonsense'; known ids: change-of-variables, ")
    for check in registry.CHECKS:
        assert check.id in line


@pytest.mark.parametrize("name", ["folder", "file/checks.json"])
def test_unwritable_path_is_refused_before_anything_runs(checks, capsys, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    checks(a_check("never-run", AssertionError("it ran")))
    assert main(["--json", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: --json: ")
    assert str(tmp_path / name) in line
    assert (tmp_path / "file").read_text() == "kept"


def test_every_check_is_complete():
    assert [check.id for check in registry.CHECKS] == [
        "change-of-variables",
        "low-rank-identity",
        "safe-region",
        "normalisation",
        "kolmogorov",
        "map-equivalence",
    ]
    for check in registry.CHECKS:
        assert check.mark in {"paper", "second-hand", "derived", "ours"}
        assert check.tolerance > 0
        for text in (check.claim, check.statement, check.regime, check.counterexample, check.tolerance_reason):
            assert text.strip() == text != ""


def test_one_real_check_from_the_command_line(tmp_path):
    path = tmp_path / "results" / "checks.json"
    command = [sys.executable, "-m", "theory_checks", "--only", "normalisation", "--json", str(path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "normalisation" in finished.stdout
    assert "1 of 1 checks came out as stated." in finished.stdout
    written = json.loads(path.read_text())
    assert written["as_stated"] is True
    assert {"version", "commit", "command", "packages"} <= written["provenance"].keys()
    (row,) = written["checks"]
    assert row.keys() == FIELDS
    assert (row["verdict"], row["counterexample_verdict"]) == ("holds", "fails")
    assert row["cases"] == 68
    assert 0 <= row["figure"] < row["tolerance"]
