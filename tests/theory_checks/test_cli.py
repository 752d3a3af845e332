"""The command line: exit status, table, JSON, and one line for bad input."""

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from theory_checks import claims
from theory_checks.__main__ import main
from theory_checks.check import Check, Outcome, Plan

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


TEXTS: Any = ("a claim", "a statement", "ours", "a regime", "a counterexample", 1e-6, "a reason", "a figure")


def kill_this_process(plan: Plan) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def a_check(identifier: str, outcome: Outcome | Exception) -> Check:
    def run(plan: Plan) -> Outcome:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return Check(identifier, *TEXTS, run)


GOOD = Outcome(3, 1e-9, True, 2.0, True)


@pytest.fixture
def checks(monkeypatch):
    def use(*found: Check) -> None:
        monkeypatch.setattr(claims, "CHECKS", found)

    return use


def test_all_as_stated_exits_0(checks, capsys):
    checks(a_check("one", GOOD), a_check("two", GOOD))
    assert main(["--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 checks came out as stated, with seed 0." in printed
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
    assert main(["--jobs", "1", "--json", str(tmp_path / "checks.json")]) == 1
    written = json.loads((tmp_path / "checks.json").read_text())
    assert written["as_stated"] is False
    bad, good = written["checks"]
    assert (bad["verdict"], bad["counterexample_verdict"]) == (verdict, counterexample)
    assert (good["verdict"], good["as_stated"]) == ("holds", True)
    printed = capsys.readouterr()
    assert "1 of 2 checks came out as stated, with seed 0." in printed.out
    assert "Traceback" not in printed.out + printed.err


def test_figures_that_json_lacks_become_strings(checks, tmp_path):
    checks(a_check("bad", Outcome(3, float("inf"), False, float("nan"), False, {"worst": [float("-inf")]})))
    assert main(["--jobs", "1", "--json", str(tmp_path / "checks.json")]) == 1
    (written,) = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert (written["figure"], written["counterexample_figure"]) == ("inf", "nan")
    assert written["details"] == {"worst": ["-inf"]}


def test_json_without_a_path_replaces_the_table(checks, capsys):
    checks(a_check("one", GOOD))
    assert main(["--jobs", "1", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in written["checks"]] == ["one"]
    assert written["provenance"]["seed"] == 0


@pytest.mark.slow
def test_checks_run_in_other_processes_come_back_in_order(capsys):
    assert main(["--quick", "--jobs", "2", "--only", "invariance", "--only", "boundedness", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checks"]
    assert [(row["id"], row["as_stated"]) for row in rows] == [("invariance", True), ("boundedness", True)]


@pytest.mark.slow
def test_a_process_that_dies_is_named_and_the_status_is_1(checks, capsys):
    checks(Check("dies", *TEXTS, kill_this_process), Check("dies too", *TEXTS, kill_this_process))
    assert main(["--jobs", "2"]) == 1
    assert "dies: could not finish: the process that ran it died" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], "--only: unknown 'nonsense'; known: change-of-variables, "),
        (["--jobs", "0"], "--jobs: got 0; pass an integer of at least 1."),
        (["--cases", "0"], "--cases: got 0; pass an integer of at least 1."),
        (["--seed", "-1"], "--seed: got -1; pass an integer of at least 0."),
        (["--mistake", "self-inclusion"], "--mistake: goes with --sabotage; add it."),
        (["--sabotage", "--mistake", "typo"], "--mistake: unknown 'typo'; known: self-inclusion, "),
    ],
)
def test_bad_arguments_are_refused_by_name(capsys, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        main(arguments)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["folder", "file/checks.json"])
def test_unwritable_path_is_refused_before_anything_runs(checks, capsys, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    checks(a_check("never-run", AssertionError("it ran")))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        main(["--jobs", "1", "--json", str(tmp_path / name)])
    assert capsys.readouterr().out == ""
    assert (tmp_path / "file").read_text() == "kept"


def test_a_bad_argument_is_one_line_and_status_2():
    command = [sys.executable, "-m", "theory_checks", "--only", "nonsense"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (2, "")
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: --only: unknown 'nonsense'")


def test_every_check_is_complete():
    assert [check.id for check in claims.CHECKS] == [
        "change-of-variables",
        "low-rank-identity",
        "invariance",
        "finite",
        "normalisation",
        "kolmogorov",
        "token-consistency",
        "sampler-law",
        "gaussian-limit",
        "safe-region",
        "conditioning",
        "certified-radius",
        "support-tokens",
        "map-equivalence",
        "boundedness",
    ]
    for check in claims.CHECKS:
        assert check.mark in {"paper", "second-hand", "derived", "ours"}
        assert check.tolerance >= 0
        for text in (check.claim, check.statement, check.regime, check.counterexample, check.tolerance_reason):
            assert text.strip() == text != ""


@pytest.mark.slow
def test_one_real_check_from_the_command_line(tmp_path):
    path = tmp_path / "results" / "checks.json"
    command = [sys.executable, "-m", "theory_checks", "--quick", "--seed", "3", "--json", str(path)]
    command += ["--only", "normalisation"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "normalisation" in finished.stdout
    assert "1 of 1 checks came out as stated, with seed 3." in finished.stdout
    written = json.loads(path.read_text())
    assert written["as_stated"] is True
    assert {"version", "commit", "command", "packages"} <= written["provenance"].keys()
    (row,) = written["checks"]
    assert row.keys() == FIELDS
    assert (row["verdict"], row["counterexample_verdict"]) == ("holds", "fails")
    assert row["cases"] == 4
    assert 0 <= row["figure"] < row["tolerance"]
