import json
import time

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from models.char_gpt import train as training
from models.char_gpt.config import Config
from models.char_gpt.train import train_model
from models.char_gpt.training_record import (
    QUANTILES,
    BatchMargins,
    batch_margins,
    new_record,
    note,
    seconds_per_step,
)
from models.corpus import load
from tests.helpers.tiny_gpt import aligned, dense_at, made_wide

SMALL = Config(layers=2, width=8, heads=2, context=6, batch=3)


def test_margins_of_a_batch_are_what_dense_determinants_say_by_layer_without_the_first_two_positions():
    # In float64, with queries twice the keys and large embeddings, so that some determinants are negative.
    model = aligned(made_wide(SMALL, 5, scale=10.0), 2.0)
    windows = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 7)))
    found = eqx.filter_jit(batch_margins)(model, windows)
    for site, layers in (("embedding", 1), ("layers", 2)):
        determinants = np.linalg.det(dense_at(model, site, windows)[1])[..., 2:].reshape(layers, -1)
        seen = found[site]
        assert (determinants <= 0).sum(-1).min() > 0
        np.testing.assert_array_equal(seen.negatives, (determinants <= 0).sum(-1))
        assert int(seen.positions) == determinants.size
        np.testing.assert_allclose(seen.smallest, determinants.min(-1), rtol=1e-8)
        np.testing.assert_allclose(seen.barrier, -np.log(np.abs(determinants)).mean(-1), rtol=1e-8)
        np.testing.assert_allclose(seen.quantiles, np.quantile(determinants, QUANTILES, axis=-1).T, rtol=1e-8)


def test_a_record_adds_margins_up_and_has_none_where_json_has_no_number():
    layers = BatchMargins(
        np.array([1, 3]), np.array(8), np.array([-np.inf, 0.5]), np.ones(2), np.array([[np.nan], [2.0]])
    )
    nothing = BatchMargins(np.array([0]), np.array(4), np.array([0.5]), np.array([0.1]), np.array([[1.0]]))
    record = new_record()
    for step in (0, 5):
        note(record, step, {"embedding": nothing, "layers": layers})
    assert record["crossings"]["layers"] == {
        "steps_watched": 2, "steps_with_crossing": 2, "positions_watched": 16, "positions_negative": 8,
    }  # fmt: skip
    assert record["crossings"]["embedding"]["steps_with_crossing"] == 0
    entry = json.loads(json.dumps(record["watch"][1], allow_nan=False))
    assert entry["step"] == 5
    assert entry["embedding"] == {"negative_share": 0.0, "smallest": 0.5, "barrier": 0.1, "quantiles": [1.0]}
    # Of four positions in each of the two layers one and three are negative.
    assert [layer["negative_share"] for layer in entry["layers"]] == [0.25, 0.75]
    assert [layer["smallest"] for layer in entry["layers"]] == [None, 0.5]
    assert [layer["quantiles"] for layer in entry["layers"]] == [[None], [2.0]]


TINY = Config(steps=6, layers=1, width=8, heads=2, context=8, batch=2, checkpoint_every=2)
COMPILING, STEP = 0.6, 0.02


@pytest.mark.slow
def test_the_seconds_of_a_step_are_without_the_first_of_every_start_and_the_bar_says_what_it_does(
    text, tmp_path, monkeypatch, capsys
):
    corpus, original, calls = load(text, TINY.context + 1), training.train_step, []

    def timed(*arguments):
        # Compiled before, so that the seconds are those slept here.
        found = original(*arguments)
        time.sleep(STEP if calls else COMPILING)
        calls.append(None)
        return found

    train_model(TINY, corpus, tmp_path / "before", quiet=True)
    monkeypatch.setattr(training, "train_step", timed)
    _, record = train_model(TINY, corpus, tmp_path / "run", stop_at=4)
    shown = capsys.readouterr().err
    assert f"{TINY.method} seed 0, compiling: " in shown
    assert f"{TINY.method} seed 0: " in shown
    assert record["starts"] == 1
    assert record["starting_seconds"] >= COMPILING
    assert record["wall_seconds"] > record["starting_seconds"] + 3 * STEP
    calls.clear()
    _, record = train_model(TINY, corpus, tmp_path / "run", quiet=True)
    assert record["starts"] == 2
    assert record["starting_seconds"] >= 2 * COMPILING
    assert STEP <= seconds_per_step(record, TINY.steps) < COMPILING / 2


def test_a_run_of_first_steps_alone_has_no_seconds_a_step():
    assert seconds_per_step(new_record() | {"wall_seconds": 3.0, "starting_seconds": 3.0, "starts": 1}, 1) is None
