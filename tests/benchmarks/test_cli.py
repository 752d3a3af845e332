"""The command line: a table and a result for good input, one line and status 2 for bad."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks.__main__ import main
from benchmarks.problem_sizes import Sizes, sizes_for
from benchmarks.result_tables import Column, Section


@pytest.fixture
def sections(monkeypatch):
    """Two sections that cost nothing; the sizes of the last run."""
    seen = []

    def run(sizes):
        seen.append(sizes)
        return {"setting": f"seed {sizes.seed}", "rows": [{"name": "a row"}], "targets": [], "notes": []}

    found = tuple(Section(name, name.title(), "", (Column("name", "", "text"),), run) for name in ("one", "two"))
    monkeypatch.setattr(command, "SECTIONS", found)
    return seen


def test_a_run_prints_its_tables_and_writes_its_result(sections, capsys, tmp_path):
    path = tmp_path / "results" / "r.json"
    assert main(["--quick", "--seed", "5", "--rounds", "9", "--out", str(path)]) == 0
    printed = capsys.readouterr()
    for text in ("## One", "## Two", "Here: seed 5.", "a row", "medians of 9 paired rounds", f"result: {path}"):
        assert text in re.sub(r"\s+", " ", printed.out)
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["one", "two"]
    written = json.loads(path.read_text())
    assert list(written["sections"]) == ["one", "two"]
    configuration = {"quick": True, **sizes_for(True, 5, 9)._asdict()}
    assert written["provenance"]["configuration"] == json.loads(json.dumps(configuration))
    assert [(sizes.seed, sizes.rounds) for sizes in sections] == [(5, 9)] * 2


def test_only_runs_what_it_names_in_the_order_of_the_table(sections, tmp_path):
    main(["--quick", "--only", "two", "one", "--only", "two", "--out", str(tmp_path / "r.json")])
    assert list(json.loads((tmp_path / "r.json").read_text())["sections"]) == ["one", "two"]
    main(["--quick", "--only", "two", "--out", str(tmp_path / "r.json")])
    assert list(json.loads((tmp_path / "r.json").read_text())["sections"]) == ["two"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], "--only: unknown 'nonsense'; known: one, two."),
        (["--rounds", "6"], "--rounds: got 6; pass an integer of at least 7."),
        (["--seed", "-1"], "--seed: got -1; pass an integer of at least 0."),
    ],
)
def test_bad_arguments_are_refused_by_name(sections, capsys, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        main([*arguments, "--out", str(tmp_path / "r.json")])
    assert capsys.readouterr().out == ""
    assert sections == []


def test_a_bad_argument_is_one_line_and_status_2(tmp_path):
    bad = ["--only", "nonsense", "--out", str(tmp_path / "r.json")]
    finished = subprocess.run([sys.executable, "-m", "benchmarks", *bad], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (2, "")
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: --only: unknown 'nonsense'")


def test_the_table_has_the_sections_of_the_page():
    assert [section.name for section in command.SECTIONS] == [
        "training-step",
        "kernel",
        "step-memory",
        "kernel-memory",
        "scaling",
        "agreement",
        "subsampling",
    ]


def test_full_sizes_are_those_of_the_issue():
    full = sizes_for(False, 0, 7)
    assert (full.cells, full.length, full.head_size, full.share) == (32, 256, 32, 1 / 8)
    assert full.lengths == (512, 1024, 2048, 4096)
    assert full == Sizes()
