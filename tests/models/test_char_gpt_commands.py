import dataclasses
import json

import jax
import numpy as np
import pytest

from models import cli
from models.char_gpt import checkpoint
from models.char_gpt import commands as command
from models.char_gpt import train as training
from models.char_gpt.commands import finished, run
from models.char_gpt.config import Config
from models.char_gpt.evaluation import EMBEDDING_NOISE, RELATIVE_EMBEDDING_NOISE
from models.char_gpt.loss import loss_terms
from models.char_gpt.train import Method, TrainingDivergedError, train_model
from models.corpus import load
from tests.helpers.error_lines import assert_refused

TINY = Config(
    objective="margin",
    steps=6,
    layers=1,
    width=8,
    heads=2,
    context=8,
    batch=2,
    checkpoint_every=2,
    evaluation_windows=4,
)


@pytest.fixture(scope="module")
def corpus(text):
    return load(text, TINY.context + 1)


def same(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def test_a_run_stopped_anywhere_goes_on_to_the_same_last_bit(corpus, tmp_path):
    whole, record = train_model(TINY, corpus, tmp_path / "whole")
    for stop in (1, 2, 5):
        out = tmp_path / f"stopped-{stop}"
        train_model(TINY, corpus, out, stop_at=stop)
        resumed, resumed_record = train_model(TINY, corpus, out)
        assert same(whole, resumed)
        assert resumed_record["crossings"] == record["crossings"]
        assert resumed_record["watch"] == record["watch"]
        assert resumed_record["history"] == record["history"]


def test_a_killed_run_loses_at_most_the_steps_since_its_checkpoint(corpus, tmp_path, monkeypatch):
    original, calls = training.train_step, []

    def dies_at_the_fourth(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(training, "train_step", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train_model(TINY, corpus, tmp_path / "killed")
    assert checkpoint.read_header(tmp_path / "killed" / checkpoint.NAME).step == 2
    monkeypatch.setattr(training, "train_step", original)
    resumed, _ = train_model(TINY, corpus, tmp_path / "killed")
    assert same(resumed, train_model(TINY, corpus, tmp_path / "whole")[0])


def test_training_learns_the_text(corpus, tmp_path):
    config = dataclasses.replace(TINY, objective="ce", steps=150, learning_rate=1e-2)
    metrics = run(config, corpus, tmp_path / "run")
    history = metrics["training"]
    assert history[-1]["cross_entropy"] < history[0]["cross_entropy"] - 1.0
    assert metrics["clean_loss"]["nats_per_character"] < np.log(len(corpus.vocabulary))


def test_metrics_are_complete_finite_and_consistent(corpus, tmp_path):
    metrics = run(TINY, corpus, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written == metrics
    assert written["provenance"]["configuration"] == TINY.as_dict()
    assert written["provenance"]["seed"] == TINY.seed
    assert [(row["kind"], row["sigma"]) for row in written["noise"]] == [
        *(("absolute", sigma) for sigma in EMBEDDING_NOISE.levels),
        *(("relative", sigma) for sigma in RELATIVE_EMBEDDING_NOISE.levels),
    ]
    for row in written["noise"]:
        clean = written["clean_loss"]["nats_per_character"]
        np.testing.assert_allclose(row["nats_per_character"] - clean, row["increase"], atol=1e-12)
    with np.load(tmp_path / "run" / "margins.npz") as margins:
        assert margins["embedding"].shape == (4, TINY.context - 2)
        assert margins["layers"].shape == (1, 2, 4, TINY.context - 2)
        for site in ("embedding", "layers"):
            summary = written["margins"][site]
            assert summary["positions"] == margins[site].size
            assert summary["negative_share"] == (margins[site] <= 0).mean()
            np.testing.assert_allclose(summary["determinant_quantiles"]["0.50"], np.median(margins[site]), rtol=1e-6)
    for site in ("embedding", "layers"):
        assert written["crossings"][site]["steps_watched"] == 1


def test_a_loss_that_is_not_finite_stops_the_run_by_name(corpus, tmp_path, monkeypatch):
    original = training.train_step

    def broken(*args):
        state, terms = original(*args)
        return state, terms._replace(loss=np.float32("nan"))

    monkeypatch.setattr(training, "train_step", broken)
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 0 of margin@embedding, seed 0; lower"):
        train_model(TINY, corpus, tmp_path / "run")


def test_one_compilation_serves_all_seeds_and_strengths_of_a_method(corpus, tmp_path):
    compiled, trained = [], {}
    counting = lambda *given: compiled.append(given) or loss_terms(*given)  # noqa: E731
    # A configuration that no other test uses, so that nothing is compiled yet.
    config = dataclasses.replace(TINY, batch=3, steps=2)
    for seed, weight in ((0, 0.1), (1, 0.1), (0, 3.0)):
        changed = dataclasses.replace(config, seed=seed, barrier_weight=weight)
        method = Method("margin", weight, counting)
        trained[seed, weight] = train_model(changed, corpus, tmp_path / f"{seed}-{weight}", method)[0]
    assert not same(trained[0, 0.1], trained[0, 3.0])
    assert len(compiled) == 1


def test_finished_runs_of_another_configuration_are_not_mistaken_for_this_one(corpus, tmp_path):
    run(TINY, corpus, tmp_path / "run")
    other = dataclasses.replace(TINY, seed=1)
    assert finished(tmp_path / "run", TINY.as_dict(), corpus.sha256) is not None
    assert finished(tmp_path / "run", other.as_dict(), corpus.sha256) is None
    assert finished(tmp_path / "run", TINY.as_dict(), "another text") is None
    with pytest.raises(ValueError, match=r"--out: .* differs in seed; pass another folder"):
        run(other, corpus, tmp_path / "run")


@pytest.mark.parametrize("damage", ["not json\n", "{}\n", "[]", ""])
@pytest.mark.parametrize(
    ("name", "read", "message"),
    [
        ("metrics.json", lambda out: finished(out, TINY.as_dict(), "any text"), "the metrics of a run; delete it"),
        (checkpoint.NAME, lambda out: checkpoint.read_header(out / checkpoint.NAME), "a checkpoint"),
    ],
)
def test_what_is_no_file_of_a_run_is_refused(tmp_path, name, read, message, damage):
    (tmp_path / name).write_text(damage)
    with pytest.raises(ValueError, match=rf"--out: .* is not {message}"):
        read(tmp_path)


def run_command(*arguments):
    """Exit status of the command line."""
    with pytest.raises(SystemExit) as info:
        cli.run(lambda: command.main([str(argument) for argument in arguments]))
    return info.value.code


SIZES = ("--steps", 3, "--layers", 1, "--width", 8, "--heads", 2, "--context", 8, "--batch", 2)
SIZES = (*SIZES, "--evaluation-windows", TINY.evaluation_windows)


def test_train_then_resume_from_the_command_line(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_command("train", "--objective", "map", "--corpus", text, "--out", out, *SIZES) == 0
    assert "map@embedding: " in capsys.readouterr().out
    first = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").unlink()
    assert run_command("resume", "--corpus", text, "--out", out) == 0
    again = json.loads((out / "metrics.json").read_text())
    assert again["clean_loss"] == first["clean_loss"]
    assert run_command("train", "--corpus", text, "--out", out, *SIZES) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run_command("resume", "--corpus", text, "--out", out, "--steps", 5) == 0
    extended = json.loads((out / "metrics.json").read_text())
    assert [(x["from_step"], x["to_step"]) for x in extended["extensions"]] == [(3, 5)]
    capsys.readouterr()
    assert run_command("resume", "--corpus", text, "--out", out, "--steps", 5) == 2
    assert_refused(capsys, "--steps: got 5 for a run of 5 steps; pass more, or resume without --steps")


JOINED = ("train", "--mesh", "data=1,heads=1", "--coordinator")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--corpus", "missing.txt"), "--corpus: missing.txt cannot be read"),
        (("train", "--steps", "0"), "--steps: got 0; pass an integer of at least 1"),
        (("train", "--barrier-weight", "-1"), "--barrier-weight: got -1.0"),
        (("train", "--barrier-weight", "nan"), "--barrier-weight: got nan"),
        (("train", "--noise-scale", "0"), "--noise-scale: got 0.0; pass a number greater than 0"),
        (("train", "--heads", "3"), "--heads: got 3; pass a divisor of --width, 64"),
        (("resume",), "--out: no checkpoint at"),
        (("train", "--barrier-form", "one-sided"), "--barrier-form: one-sided needs --objective margin, got ce"),
        (("sweep", "--profile", "smoke"), "sweep: is now python -m paper_figures.study sweep"),
        (("train", "--mesh", "8"), "--mesh: got '8'; pass data=D,heads=H"),
        (("train", "--mesh", "data=0,heads=8"), "--mesh: got 'data=0,heads=8'; pass data=D,heads=H"),
        (("train", "--mesh", "data=3,heads=1"), "--batch: got 16 for --mesh data=3; pass a multiple of 3"),
        (("train", "--mesh", "data=1,heads=3"), "--heads: got 4 for --mesh heads=3; pass a multiple of 3"),
        (("train", "--mesh", "data=4,heads=2"), "data, heads: got 4 * 2 = 8 for 1 devices; pass a product of 1"),
        (
            ("train", "--coordinator", "127.0.0.1:1"),
            "--mesh: not given; pass data=D,heads=H",
        ),
        ((*JOINED, "127.0.0.1:1"), "--coordinator, --processes, --process-id: pass all three, or none"),
        ((*JOINED, "here", "--processes", 2, "--process-id", 0), "--coordinator: got 'here'; pass HOST:PORT"),
        (
            (*JOINED, "here:1", "--processes", 0, "--process-id", 0),
            "--processes: got 0; pass an integer of at least 1",
        ),
        ((*JOINED, "here:1", "--processes", 2, "--process-id", 2), "--process-id: got 2; pass 0 to 1"),
    ],
)
def test_bad_arguments_end_with_one_line_and_status_2(arguments, message, text, tmp_path, capsys):
    given = () if "--corpus" in arguments else ("--corpus", text)
    assert run_command(*arguments, *given, "--out", tmp_path / "run") == 2
    assert_refused(capsys, message)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_named(text, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert run_command("train", "--corpus", text, "--out", blocked / "run", *SIZES) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert blocked.read_text() == "in the way"
