import bz2
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from models.char_gpt import commands
from models.char_gpt.checkpoint import NAME as CHECKPOINT
from models.char_gpt.commands import METRICS
from models.char_gpt.config import in_names_of_today
from models.corpus import load
from paper_figures.study import __main__ as command
from paper_figures.study import design, runs, sweep
from tests.helpers import tiny_sweep
from tests.helpers.words import write_words

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 240.0


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("corpus") / "text.txt", 3000)


def line(name="ce-strength0-seed0", **more):
    return {"run": name, "provenance": {}, **more}


def with_a_torn_line(path):
    """The file with the lines of two seeds and a line that a kill cut short."""
    for seed in (0, 1):
        runs.append(path, line(seed=seed))
    path.write_text(path.read_text() + '{"run": "half')
    return path


def seeds_in(path):
    return [found["seed"] for found in runs.read(path)]


def test_lines_come_back_as_written_and_a_torn_one_is_dropped(tmp_path):
    path = tmp_path / runs.NAME
    assert runs.read(path) == []
    assert seeds_in(with_a_torn_line(path)) == [0, 1]
    runs.make_whole(path)
    runs.append(path, line(seed=2))
    assert seeds_in(path) == [0, 1, 2]
    with pytest.raises(ValueError, match="JSON"):
        runs.append(path, line(seed=float("nan")))
    assert len(runs.read(path)) == 3


def compress(path):
    """What `bzip2 FILE` does."""
    path.with_name(f"{path.name}.bz2").write_bytes(bz2.compress(path.read_bytes()))
    path.unlink()


def test_compressed_lines_are_read_in_place_of_the_plain_file_and_unpacked_to_go_on(tmp_path):
    path = with_a_torn_line(tmp_path / runs.NAME)
    compress(path)
    assert seeds_in(path) == [0, 1]
    runs.append(path, line(seed=2))
    assert seeds_in(path) == [0, 1, 2]
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"junk" + content])
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / runs.NAME
    runs.append(path, line())
    compress(path)
    compressed = runs.stored_at(path)
    compressed.write_bytes(damage(compressed.read_bytes()))
    with pytest.raises(ValueError, match=r"--out: .*runs\.jsonl\.bz2 cannot be read"):
        runs.read(path)


@pytest.mark.parametrize("damage", ["not json", "[]", '{"run": "x"}', "3"])
def test_a_line_that_is_not_of_a_run_is_refused_by_number(tmp_path, damage):
    path = tmp_path / runs.NAME
    runs.append(path, line())
    path.write_text(path.read_text() + damage + "\n")
    with pytest.raises(ValueError, match=r"--out: line 2 of .* is not of a run; delete that line"):
        runs.read(path)


def test_numbers_keep_the_digits_of_float32_and_everything_else_is_left():
    tree = {"a": [1 / 3, None, {"b": -1e-30 / 3}], "n": 123456789, "s": "x"}
    assert runs.shortened(tree) == {"a": [0.3333333, None, {"b": -3.333333e-31}], "n": 123456789, "s": "x"}
    value = np.float32(np.pi)
    assert np.float32(runs.shortened(float(value))) == pytest.approx(value, rel=2e-7)


def test_the_full_profile_is_the_study_that_was_asked_for():
    planned = design.designs(design.PROFILES["full"])
    assert len({one.name for one in planned}) == len(planned)
    # Whole seeds first, so that a sweep cut short can be read.
    assert [one.base.seed for one in planned] == sorted(one.base.seed for one in planned)
    for name, method in design.METHODS.items():
        found = [one for one in planned if one.method == name]
        assert {(one.strength, one.base.seed) for one in found} == {
            (strength, seed) for strength in method.strengths for seed in range(5)
        }
        # The same number of values to choose from for everyone.
        assert len(method.strengths) == (1 if name == design.BASELINE else 6)
        assert {one.config.method for one in found} == {name if name in design.BARRIERS else "ce"}
    assert set(design.BARRIERS) == {
        f"{form}@{site}" for form in ("margin", "map", "one-sided") for site in ("embedding", "layers")
    }
    assert {method.strengths for method in design.BARRIERS.values()} == {(0.01, 0.02, 0.05, 0.1, 0.3, 1.0)}
    own = ("barrier", "objective", "seed", "method", "strength")
    shared = [{k: v for k, v in one.configuration.items() if not k.startswith(own)} for one in planned]
    assert shared == [shared[0]] * len(planned)


def test_the_committed_runs_of_version_0_1_are_those_of_the_full_profile():
    planned = {one.name: one.configuration for one in design.designs(design.PROFILES["full"])}
    saved = runs.read(ROOT / "results/reference/runs/full" / runs.NAME)
    assert {line["run"]: in_names_of_today(line["provenance"]["configuration"]) for line in saved} == planned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("sweep", "--profile", "huge"), "--profile: got 'huge'; pass one of smoke, quick, full"),
        (("sweep", "--profile", "smoke", "--workers", "0"), "--workers: got 0; pass an integer of at least 1"),
        (("run", "--method", "typo"), "--method: got 'typo'; pass one of ce, margin@embedding"),
        (("run", "--method", "dropout", "--strength", "1"), "--strength: got 1.0 for dropout; pass a share below 1"),
        (("run", "--method", "jacobian", "--strength", "nan"), "--strength: got nan for jacobian; pass a finite"),
    ],
)
def test_bad_options_are_named(options, message, text, tmp_path):
    with pytest.raises(ValueError, match=message):
        command.main([*options, "--corpus", str(text), "--out", str(tmp_path)])


def test_a_single_run_of_a_method_goes_on_from_its_checkpoint_and_is_not_mistaken_for_another(text, tmp_path, capsys):
    sizes = {"steps": 2, "layers": 1, "width": 8, "heads": 2, "context": 8, "batch": 2, "evaluation-windows": 4}

    def run(strength):
        given = ["--strength", strength, "--seed", "3", "--corpus", str(text), "--out", str(tmp_path)]
        return command.main(["run", "--method", "dropout", *given, *(f"--{k}={v}" for k, v in sizes.items())])

    assert run("0.1") == 0
    assert "dropout: " in capsys.readouterr().out
    first = json.loads((tmp_path / METRICS).read_text())
    assert first["provenance"]["configuration"].items() >= {"method": "dropout", "strength": 0.1, "seed": 3}.items()
    (tmp_path / METRICS).unlink()
    assert run("0.1") == 0
    assert json.loads((tmp_path / METRICS).read_text())["clean_loss"] == first["clean_loss"]
    with pytest.raises(ValueError, match=r"--out: .* differs in strength; pass another folder"):
        run("0.2")
    with pytest.raises(ValueError, match=r"--out: .* differs in method, strength; pass another folder"):
        commands.main(["resume", "--corpus", str(text), "--out", str(tmp_path)])


def test_one_compilation_serves_all_seeds_and_strengths_of_a_method(text, tmp_path, monkeypatch):
    compiled = []
    original = design.METHODS["spectral"].loss
    counting = design.METHODS["spectral"]._replace(loss=lambda *given: compiled.append(given) or original(*given))
    monkeypatch.setitem(design.METHODS, "spectral", counting)
    # Sizes that no other test uses, so that nothing is compiled yet.
    base = dataclasses.replace(tiny_sweep.BASE, batch=3, steps=2)
    finished = [
        sweep.line_of(design.Design("spectral", strength, dataclasses.replace(base, seed=seed)), text, tmp_path, 9, "")
        for seed, strength in ((0, 0.1), (1, 0.1), (0, 3.0))
    ]
    assert len({line["training"][-1]["loss"] for line in finished}) == 3
    assert len(compiled) == 1


def start(text, out, workers):
    command = [sys.executable, str(ROOT / "tests/helpers/tiny_sweep.py"), "--corpus", str(text), "--out", str(out)]
    # Every process compiles the same small functions, and compiling them is what takes time.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        [*command, "--workers", str(workers)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, process):
    limit = time.monotonic() + LONGEST
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, process.kill()
        time.sleep(0.02)


def all_gone(process):
    """No process of the sweep is left, its workers included."""
    process.communicate()
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def workers_of(process):
    """The sweep's worker processes, without the one in which Python keeps track of their semaphores."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def comparable(out):
    """All that is said of the runs but for when, how long and by which command."""
    found = {run["run"]: run for run in runs.read(out / runs.NAME)}
    for run in found.values():
        for key in ("provenance", "wall_seconds", "seconds_per_step"):
            del run[key]
    return found


@pytest.mark.slow
def test_a_sweep_killed_again_and_again_ends_as_one_that_was_not(text, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    checkpoints = lambda: list((out / sweep.UNFINISHED).glob(f"*/{CHECKPOINT}"))  # noqa: E731
    written = lambda: len(runs.read(out / runs.NAME))  # noqa: E731

    # A worker dies: one line, and status 2.
    process = start(text, out, 2)
    wait_until(checkpoints, process)
    for pid in workers_of(process):
        os.kill(pid, signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    # Python's resource tracker may say afterwards that a killed worker left semaphores behind.
    (error,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert error.startswith("error: a worker was killed")

    # The sweep itself dies, in the middle of a run and after one has been written.
    for at_least in (written(), written() + 1):
        process = start(text, out, 2)
        wait_until(lambda n=at_least: written() >= n and checkpoints(), process)
        process.kill()
        assert all_gone(process)
    kept = (out / runs.NAME).read_text()
    assert written() >= 1
    with (out / runs.NAME).open("a") as stream:
        stream.write('{"run": "ce-str')

    process = start(text, out, 2)
    output, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, errors
    assert f"{len(kept.splitlines())} of 4 runs of tiny are done" in output
    assert (out / runs.NAME).read_text().startswith(kept)
    assert not (out / sweep.UNFINISHED).exists()

    whole = tmp_path / "whole"
    process = start(text, whole, 1)
    table, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, errors
    assert comparable(out) == comparable(whole)
    # The same final table, to the last digit, but for the column of seconds.
    without_time = lambda text: [row.rsplit("|", 2)[0] for row in text.splitlines() if row.startswith("|")]  # noqa: E731
    assert without_time(output) == without_time(table)
    # Headings, and a line for each of two methods.
    assert len(without_time(table)) == 3

    monkeypatch.setattr(design, "METHODS", tiny_sweep.METHODS)
    monkeypatch.setitem(design.PROFILES, "tiny", tiny_sweep.PROFILE)
    console = Console(record=True, width=200)
    again = sweep.run_sweep("tiny", text, load(text, tiny_sweep.BASE.context + 1), whole, console, 1)
    assert len(again) == 4
    assert "4 of 4 runs of tiny are done" in console.export_text()
    finished_runs_are_not_mistaken_for_others(text, whole)


def finished_runs_are_not_mistaken_for_others(text, out):
    """A folder of finished runs is refused to another text and to another configuration."""
    corpus = load(text, tiny_sweep.BASE.context + 1)
    chosen = {one.name: one for one in design.designs(tiny_sweep.PROFILE) if one.method in tiny_sweep.METHODS}
    assert sweep._finished(out / runs.NAME, chosen, corpus).keys() == chosen.keys()
    longer = {
        name: dataclasses.replace(one, base=dataclasses.replace(one.base, steps=31)) for name, one in chosen.items()
    }
    for changed, given in ((chosen, corpus._replace(sha256="another")), (longer, corpus), ({}, corpus)):
        with pytest.raises(ValueError, match=r"--out: .* holds .* of another sweep, text or version; pass another"):
            sweep._finished(out / runs.NAME, changed, given)


def test_two_sweeps_in_one_folder_are_refused(text, tmp_path):
    corpus = load(text, 17)
    with (tmp_path / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"--out: another sweep works in .*; wait for it, or pass another folder"):
            sweep.run_sweep("smoke", text, corpus, tmp_path, Console(quiet=True), 1)


def test_a_diverged_run_is_a_line_of_its_own_in_the_table():
    good = {
        "method": "ce", "strength": 0.0, "status": "finished", "seconds_per_step": 0.1,
        "splits": {"test": {"clean": {"nats_per_character": 2.5}, "perturbed": [
            {"kind": "relative-embedding-noise", "level": 1.0, "increase": 0.125}]}},
        "margins": {"layers": {"negative_share": 0.25}},
    }  # fmt: skip
    bad = {"method": "margin@layers", "strength": 1.0, "status": "diverged", "message": "the loss is nan"}
    shown = sweep.table([json.loads(json.dumps(good)), good, bad])
    assert all(cell in shown for cell in ("2.5000", "+0.1250", "25.00%", "diverged"))
