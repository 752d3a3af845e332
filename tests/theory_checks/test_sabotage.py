"""Mistakes fit the source they are put into, one is caught, a harmless one is not, and the command says so."""

import ast
import json
from pathlib import Path

import pytest

import prob_transformer
from theory_checks import sabotage
from theory_checks.__main__ import main
from theory_checks.mistakes import FINE_MISTAKES, MISTAKES, Mistake

LIBRARY = Path(prob_transformer.__file__).parent


@pytest.mark.parametrize("mistake", [*MISTAKES, *(fine for _, fine in FINE_MISTAKES)], ids=lambda one: one.name)
def test_every_mistake_fits_its_file_and_still_parses(mistake):
    for file in {file for file, _, _ in mistake.replacements}:
        source = (LIBRARY / file).read_text(encoding="utf-8")
        changed = sabotage.sabotaged(mistake, file, source)
        assert changed != source
        ast.parse(changed)


def test_names_differ_and_cover_the_core():
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES) >= 20
    files = {file for mistake in MISTAKES for file, _, _ in mistake.replacements}
    assert {"attention.py", "change_of_variables.py", "barrier.py", "margins.py", "embedding_process.py"} <= files


def test_a_mistake_that_no_longer_fits_is_named():
    with pytest.raises(ValueError, match=r"mistake 'old': 'gone' occurs 0 times in barrier.py, not once"):
        sabotage.sabotaged(Mistake("old", (("barrier.py", "gone", "here"),)), "barrier.py", "return 1")


@pytest.mark.slow
def test_a_caught_mistake_and_a_harmless_one(monkeypatch, tmp_path, capsys):
    harmless = Mistake(
        "harmless",
        (
            (
                "barrier.py",
                "def barrier(",
                "def barrier (",
            ),
        ),
    )
    (real,) = (mistake for mistake in MISTAKES if mistake.name == "barrier of the wrong sign")
    monkeypatch.setattr(sabotage, "MISTAKES", (harmless, real))
    path = tmp_path / "sabotage.json"
    status = main(["--sabotage", "--only", "support-tokens", "--jobs", "1", "--json", str(path)])
    assert status == 1
    assert "1 of 2 mistakes were caught." in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["complete"]
    assert not written["all_caught"]
    assert [(row["mistake"], row["caught_by"]) for row in written["mistakes"]] == [
        ("(none)", []),
        ("harmless", []),
        ("barrier of the wrong sign", ["support-tokens"]),
    ]


def test_a_library_that_does_not_import_is_an_error(tmp_path):
    broken = Mistake("broken", (("barrier.py", "def barrier(", "def barrier(("),))
    with pytest.raises(RuntimeError, match=r"broken: the checks did not run \(exit status 1\): SyntaxError"):
        sabotage.run_mistake(broken, ["support-tokens"], 0, tmp_path)
