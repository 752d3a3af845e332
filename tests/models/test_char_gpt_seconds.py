"""What a run says of its own figures: no standard error from one window, no compilation in the seconds of a step."""

import io
import json
import re
import time

import numpy as np
import pytest
from rich.console import Console

from models.char_gpt import __main__ as command
from models.char_gpt import evaluation, training
from models.char_gpt.config import Config
from models.char_gpt.laplace import score
from models.char_gpt.training import new_record, seconds_per_step, train
from models.corpus import load
from paper_figures import verdicts
from paper_figures.runs import load_runs
from tests.support.synthetic_runs import write_runs
from tests.support.words import write_words

TINY = Config(objective="ce", steps=6, layers=1, width=8, heads=2, context=8, batch=2, checkpoint_every=2)
COMPILING, STEP = 0.6, 0.02


def test_one_window_has_no_standard_error(monkeypatch, tmp_path):
    losses = np.array([2.5])
    assert evaluation.standard_error(losses) is None
    monkeypatch.setattr(evaluation, "perturbed_losses", lambda *arguments: [losses + level for level in arguments[3]])
    for row in evaluation.perturbed_rows(None, None, losses, None):
        assert row["standard_error"] is None
        assert row["increase_standard_error"] is None
        np.testing.assert_allclose(row["increase"], row["level"])
    assert score(np.array([[[0.9, 0.1]]]), np.zeros((1, 1), int)).standard_error is None
    clean = evaluation._clean_summary(losses, TINY)
    assert json.dumps(clean, allow_nan=False) == '{"nats_per_character": 2.5, "standard_error": null, "characters": 8}'
    console = Console(file=io.StringIO(), width=300)
    command._report(
        console, {"method": "ce", "clean_loss": clean, "margins": {"layers": {"negative_share": 0.0}}}, tmp_path
    )
    assert "8 validation characters (one window, so no standard error)" in console.file.getvalue()


@pytest.mark.slow
def test_the_seconds_of_a_step_are_without_the_first_of_every_start_and_the_bar_says_what_it_does(
    tmp_path, monkeypatch, capsys
):
    corpus, original, calls = load(write_words(tmp_path / "text.txt"), TINY.context + 1), training.train_step, []

    def timed(*arguments):
        # Compiled before, so that the seconds are those slept here.
        found = original(*arguments)
        time.sleep(STEP if calls else COMPILING)
        calls.append(None)
        return found

    train(TINY, corpus, tmp_path / "before", quiet=True)
    monkeypatch.setattr(training, "train_step", timed)
    _, record = train(TINY, corpus, tmp_path / "run", stop_at=4)
    shown = capsys.readouterr().err
    assert f"{TINY.method} seed 0, compiling: " in shown
    assert f"{TINY.method} seed 0: " in shown
    assert record["starts"] == 1
    assert record["starting_seconds"] >= COMPILING
    assert record["wall_seconds"] > record["starting_seconds"] + 3 * STEP
    calls.clear()
    _, record = train(TINY, corpus, tmp_path / "run", quiet=True)
    assert record["starts"] == 2
    assert record["starting_seconds"] >= 2 * COMPILING
    assert STEP <= seconds_per_step(record, TINY.steps) < COMPILING / 2


def test_a_run_of_first_steps_alone_has_no_seconds_a_step():
    assert seconds_per_step(new_record() | {"wall_seconds": 3.0, "starting_seconds": 3.0, "starts": 1}, 1) is None


def test_the_verdicts_are_over_seeds_and_the_same_without_standard_errors(tmp_path):
    found = []
    for drop in (False, True):
        folder = write_runs(tmp_path / str(drop), {}, seeds=3)
        path = folder / "runs.jsonl"
        text = path.read_text(encoding="utf-8")
        assert '"increase_standard_error"' in text
        if drop:
            text = re.sub(r'("(?:increase_)?standard_error": )[0-9.e-]+', r"\1null", text)
            assert '"standard_error": null' in text
        path.write_text(text, encoding="utf-8")
        found.append(verdicts.analyse(load_runs(folder)))
    assert found[0] == found[1]
