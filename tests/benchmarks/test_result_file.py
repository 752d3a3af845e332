"""The file of a result: written at the end, with all that a killed run had finished."""

import json

import pytest

from benchmarks import result_file
from benchmarks.problem_sizes import QUICK
from benchmarks.result_tables import Section


@pytest.fixture(autouse=True)
def sources(monkeypatch):
    """Sources that can be changed."""
    digest = ["one"]
    monkeypatch.setattr(result_file, "digest_of_sources", lambda: digest[0])
    return digest


class Counted:
    """Sections that count how often they run, and can be told to die."""

    def __init__(self):
        self.runs, self.dies = [], None
        self.sections = [self._section(name) for name in ("one", "two", "three")]

    def _section(self, name):
        def run(sizes):
            if name == self.dies:
                raise KeyboardInterrupt
            self.runs.append(name)
            return {"setting": "", "rows": [{"run": len(self.runs)}], "targets": [], "notes": []}

        return Section(name, name, "", (), run)


@pytest.fixture
def counted():
    return Counted()


def measure(path, sections, sizes=QUICK):
    return result_file.measure(path, sections, sizes, True)


def killed_in(counted, name, path):
    counted.dies = name
    with pytest.raises(KeyboardInterrupt):
        measure(path, counted.sections)
    counted.dies = None


def test_a_killed_run_goes_on_where_it_was(counted, tmp_path, capsys):
    path = tmp_path / "r.json"
    killed_in(counted, "three", path)
    assert counted.runs == ["one", "two"]
    assert not path.exists()
    found = measure(path, counted.sections)
    assert counted.runs == ["one", "two", "three"]
    assert [row["rows"][0]["run"] for row in found["sections"].values()] == [1, 2, 3]
    assert f"going on from {path}.partial; kept: one, two." in capsys.readouterr().err
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_a_finished_run_is_measured_again(counted, tmp_path):
    measure(tmp_path / "r.json", counted.sections)
    measure(tmp_path / "r.json", counted.sections)
    assert counted.runs == 2 * ["one", "two", "three"]


def test_an_old_result_stays_until_the_new_one_is_whole(counted, tmp_path):
    path = tmp_path / "r.json"
    before = measure(path, counted.sections)
    killed_in(counted, "two", path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(before))


@pytest.mark.parametrize("changed", ["sources", "sizes"])
def test_nothing_is_kept_of_other_sources_or_sizes(counted, tmp_path, sources, changed, capsys):
    path, sizes = tmp_path / "r.json", QUICK
    killed_in(counted, "three", path)
    if changed == "sources":
        sources[0] = "two"
    else:
        sizes = type(QUICK)(seed=1)
    found = measure(path, counted.sections, sizes)
    assert counted.runs == ["one", "two", "one", "two", "three"]
    assert "is of other sizes, sources, versions or another machine" in capsys.readouterr().err
    assert found["sources"] == sources[0]


def test_sections_not_asked_for_are_kept_for_the_run_that_asks(counted, tmp_path):
    path = tmp_path / "r.json"
    killed_in(counted, "three", path)
    assert list(measure(path, counted.sections[1:2])["sections"]) == ["two"]
    assert counted.runs == ["one", "two"]
    assert list(measure(path, counted.sections)["sections"]) == ["one", "two", "three"]
    assert counted.runs == ["one", "two", "three"]


@pytest.mark.parametrize("text", ["not json", "[]", "{}"])
def test_a_partial_file_of_something_else_is_refused_and_left(counted, tmp_path, text):
    (tmp_path / "r.json.partial").write_text(text)
    with pytest.raises(ValueError, match=r"--out: .*r\.json\.partial is not a partial result; delete it"):
        measure(tmp_path / "r.json", counted.sections)
    assert (tmp_path / "r.json.partial").read_text() == text
    assert counted.runs == []


@pytest.mark.parametrize(("place", "message"), [("", "is a folder"), ("file/r.json", "cannot be written")])
def test_an_unwritable_path_is_refused_before_anything_runs(counted, tmp_path, place, message):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match=message):
        measure(tmp_path / place, counted.sections)
    assert counted.runs == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_record_names_machine_versions_command_commit_seed_and_date():
    found = result_file.record_of_run(3, {"quick": True, **QUICK._asdict()})
    assert {"processor", "cores", "memory", "backend", "device"} <= found["machine"].keys()
    assert {"python", "jax", "jaxlib", "numpy", "torch"} <= found["versions"].keys()
    assert {"commit", "command", "seed"} <= found["provenance"].keys()
    assert found["provenance"]["configuration"] == {"quick": True, **QUICK._asdict()}
    assert json.dumps(type(QUICK)(**json.loads(json.dumps(QUICK._asdict())))) == json.dumps(QUICK)
    json.dumps(found, allow_nan=False)


def test_the_digest_sees_names_and_texts_of_python_files_alone(tmp_path, monkeypatch):
    monkeypatch.undo()
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "a.py"
    file.write_text("x = 1")
    first = result_file.digest_of_sources(tmp_path)
    (tmp_path / "models" / "notes.txt").write_text("not code")
    (tmp_path / "other.py").write_text("elsewhere")
    assert result_file.digest_of_sources(tmp_path) == first
    file.write_text("x = 2")
    assert result_file.digest_of_sources(tmp_path) != first
    file.write_text("x = 1")
    file.rename(tmp_path / "models" / "b.py")
    assert result_file.digest_of_sources(tmp_path) != first
