import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from models.char_gpt import checkpoint
from models.char_gpt.commands import run
from models.char_gpt.config import Config
from models.char_gpt.train import StepData, initial_state, learning_rate, train_model, train_step
from models.corpus import load

TINY = Config(
    objective="margin", steps=6, layers=1, width=4, heads=2, context=8, batch=2, checkpoint_every=2,
    evaluation_windows=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(text):
    return load(text, TINY.context + 1)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of six steps: its folder, its metrics and its last state."""
    out = tmp_path_factory.mktemp("trained")
    metrics = run(TINY, corpus, out)
    return out, metrics, train_model(TINY, corpus, out)[0]


@pytest.fixture
def out(trained, tmp_path):
    """A copy of the run to change."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def same(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


def parts(content):
    """Checksum line, header and arrays of a file."""
    checksum, header, arrays = content.split(b"\n", 2)
    return checksum, json.loads(header), arrays


def written(header, arrays):
    """A file with this header and a checksum that is right."""
    content = json.dumps(header).encode() + b"\n" + arrays
    return b"sha256 " + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def as_an_earlier_version_wrote_it(content):
    """The same run in a file without checksum, vocabulary, tokeniser, format and extensions."""
    _, header, arrays = parts(content)
    record = {key: value for key, value in header["record"].items() if key != "extensions"}
    earlier = {key: header[key] for key in ("configuration", "corpus_sha256", "step")} | {"record": record}
    return json.dumps(earlier).encode() + b"\n" + arrays


# The arrays of a model in version 0.1, in the order in which they were written, by the names of today.
LEAVES_0_1 = (
    *("token_embedding", "position_embedding"),
    *(f"blocks[0].{name}" for name in ("query", "key", "value", "output", "up", "down")),
    *(f"{norm}.{name}" for norm in ("blocks[0].attention_norm", "blocks[0].mlp_norm") for name in ("scale", "bias")),
    *("final_norm.scale", "final_norm.bias", "head", "prior_stage.query", "prior_stage.key"),
)


def assert_has_arrays_of_0_1(model, path):
    """Every weight is the one that NumPy reads from the file of version 0.1."""
    with path.open("rb") as stream:
        stream.readline()
        saved = [np.load(stream) for _ in LEAVES_0_1]
    found = {jax.tree_util.keystr(place): x for place, x in jax.tree_util.tree_leaves_with_path(model)}
    assert len(found) == len(LEAVES_0_1)
    for name, expected in zip(LEAVES_0_1, saved, strict=True):
        np.testing.assert_array_equal(found[f".{name}"], expected, err_msg=name)


OF_0_1 = Path(__file__).parent / "version_0_1" / checkpoint.NAME


def test_a_checkpoint_of_version_0_1_goes_on_and_gets_a_vocabulary(corpus, tmp_path):
    """One that was trained for two steps by that version."""
    path = Path(shutil.copy(OF_0_1, tmp_path))
    config = checkpoint.read_header(path).config
    assert config == dataclasses.replace(TINY, barrier_site="layers", implementation="blocked")
    like = initial_state(config, len(corpus.vocabulary))
    state, step, _ = checkpoint.load(path, config.as_dict(), corpus.sha256, like)
    assert step == 2
    assert_has_arrays_of_0_1(state.model, OF_0_1)
    why = "has no vocabulary, because an earlier version wrote it; resume the run with its corpus, which adds"
    with pytest.raises(ValueError, match=f"folder: {re.escape(str(path))} {why}"):
        checkpoint.load_run(tmp_path)

    train_model(config, corpus, tmp_path, stop_at=2)
    found = checkpoint.load_run(tmp_path)
    assert found.vocabulary == corpus.vocabulary
    assert_has_arrays_of_0_1(found.model, OF_0_1)
    _, record = train_model(config, corpus, tmp_path)
    assert record["history"][-1]["step"] == config.steps - 1


def test_a_finished_run_of_an_earlier_version_gets_a_vocabulary_and_keeps_its_metrics(trained, corpus, out):
    _, metrics, state = trained
    path = out / checkpoint.NAME
    path.write_bytes(as_an_earlier_version_wrote_it(path.read_bytes()))
    earlier = {key: value for key, value in metrics.items() if key != "extensions"}
    (out / "metrics.json").write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match="has no vocabulary"):
        checkpoint.load_run(out)
    # Metrics measured again would have extensions.
    assert run(TINY, corpus, out) == earlier
    assert same(checkpoint.load_run(out).model, state.model)


def test_a_folder_is_enough_to_use_a_model(trained, corpus, tmp_path):
    folder, _, state = trained
    Path(shutil.copy(folder / checkpoint.NAME, tmp_path))
    found = checkpoint.load_run(tmp_path)
    assert found.config == TINY
    characters = found.vocabulary.encode("attention")
    assert found.vocabulary.decode(characters) == "attention"
    assert [corpus.vocabulary.characters[i] for i in characters] == list("attention")
    np.testing.assert_array_equal(found.model(characters[:8]), state.model(characters[:8]))
    header = parts((tmp_path / checkpoint.NAME).read_bytes())[1]
    assert header["tokeniser"] == "characters"
    assert header["vocabulary"] == {"characters": list(corpus.vocabulary.characters), "unknown": "\ufffd"}


def test_every_flipped_bit_is_noticed(trained, tmp_path):
    path = tmp_path / checkpoint.NAME
    content = (trained[0] / checkpoint.NAME).read_bytes()
    start = 8 * 120
    # Every bit of the checksum's line and of the first words of the header, and some of all others.
    others = np.random.default_rng(0).integers(start, 8 * len(content), 500)
    for bit in (*range(start), *map(int, others)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=rf"^--out: {re.escape(str(path))} is .*; (restore|use) .*\.$"):
            checkpoint.read_header(path)


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x + b"0", lambda x: x[: len(x) // 2], lambda x: x[:80]])
def test_a_file_cut_off_or_with_more_behind_it_is_damaged(corpus, out, change):
    path = out / checkpoint.NAME
    path.write_bytes(change(path.read_bytes()))
    message = f"{re.escape(str(path))} is damaged or is not a checkpoint; restore a copy of it, delete it to start"
    with pytest.raises(ValueError, match=f"^--out: {message}"):
        train_model(TINY, corpus, out)
    with pytest.raises(ValueError, match=f"^folder: {message}"):
        checkpoint.load_run(out)


def test_an_earlier_file_whose_arrays_end_too_soon_is_damaged(corpus, out):
    path = out / checkpoint.NAME
    path.write_bytes(as_an_earlier_version_wrote_it(path.read_bytes())[:-100])
    with pytest.raises(ValueError, match="is damaged or is not a checkpoint; restore"):
        train_model(TINY, corpus, out)


def edited(part, **changes):
    """A change of a header or of its configuration or record; None takes a field away."""

    def change(header):
        whole = (header[part] if part else header) | changes
        whole = {key: value for key, value in whole.items() if value is not None}
        return header | {part: whole} if part else whole

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited("", colour=1), "unknown field `colour`"),
        (edited("", step=None), "missing required field `step`"),
        (edited("", vocabulary=None), "missing required field `vocabulary`"),
        (edited("", tokeniser="words"), r"Invalid enum value 'words' - at `\$.tokeniser`"),
        (edited("", step="6"), r"Expected `int`, got `str` - at `\$.step`"),
        (edited("", vocabulary=["a"]), r"Expected `object \| null`, got `array` - at `\$.vocabulary`"),
        (edited("vocabulary", characters=[1]), r"Expected `str`, got `int` - at `\$.vocabulary.characters"),
        (edited("vocabulary", colour=1), "unknown field `colour`"),
        (edited("configuration", colour=1), "unknown field `colour`"),
        (edited("configuration", width=None), "missing required field `width`"),
        (edited("configuration", width="4"), r"Expected `int`, got `str` - at `\$.width`"),
        (edited("configuration", remat="all"), r"Invalid enum value 'all' - at `\$.remat`"),
        (edited("configuration", heads=3), "--heads: got 3; pass a divisor of --width, 4"),
        (edited("record", starts=None), "missing required field `starts`"),
        (edited("record", watch={}), r"Expected `array`, got `object` - at `\$.watch`"),
        (edited("record", colour=1), "unknown field `colour`"),
        (edited("", format=3, colour=1), "its format is 3, and the newest that this version reads is 2"),
        (lambda header: [header], "Expected `object`, got `array`"),
    ],
)
def test_a_header_that_is_not_of_this_version_is_refused_by_name(out, change, message):
    path = out / checkpoint.NAME
    _, header, arrays = parts(path.read_bytes())
    path.write_bytes(written(header, arrays))
    assert checkpoint.load_run(out).config == TINY
    path.write_bytes(written(change(header), arrays))
    why = f"{re.escape(str(path))} is not a checkpoint of this version: .*{message}.*; use the version that wrote it"
    with pytest.raises(ValueError, match=f"^folder: {why}"):
        checkpoint.load_run(out)


# `resume --steps`.


def rate_of(config, step):
    """Warm-up over a tenth of the steps and cosine decay to a tenth, by hand, of a step inside the configuration."""
    warmup = max(1, config.steps // 10)
    if step < warmup:
        return config.learning_rate * step / warmup
    decayed = (1 + np.cos(np.pi * (step - warmup) / (config.steps - warmup))) / 2
    return config.learning_rate * (0.1 + 0.9 * decayed)


@pytest.mark.parametrize("steps", [6, 37, 500])
def test_past_its_last_step_the_learning_rate_stays_what_it_was_there(steps):
    config = dataclasses.replace(TINY, steps=steps)
    for step in (0, 1, 3, steps - 2, steps - 1, steps, steps + 1, 10 * steps):
        expected = rate_of(config, min(step, steps - 1))
        np.testing.assert_allclose(learning_rate(config)(step), expected, rtol=1e-5)


def test_an_extension_takes_the_steps_that_follow_and_is_recorded(trained, corpus, out):
    _, before, state = trained
    metrics = run(TINY, corpus, out, steps=9)
    (noted,) = metrics["extensions"]
    assert (noted["from_step"], noted["to_step"]) == (6, 9)
    np.testing.assert_allclose(noted["learning_rate"], rate_of(TINY, 5), rtol=1e-5)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["provenance"]["configuration"] == before["provenance"]["configuration"] == TINY.as_dict()
    assert [entry["step"] for entry in metrics["training"]] == [0, 5, 8]
    assert metrics["clean_loss"] != before["clean_loss"]
    for step in range(6, 9):
        state, _ = train_step(StepData.of(corpus.train, TINY, step), state, TINY)
    assert same(checkpoint.load_run(out).model, state.model)
    # Nothing is left to do, and the metrics are not those of the first six steps.
    assert run(TINY, corpus, out) == metrics


def test_an_extension_stopped_anywhere_goes_on_to_the_same_last_bit(trained, corpus, out, tmp_path):
    whole, record = train_model(TINY, corpus, out, steps=11)
    kept = ("crossings", "watch", "history", "extensions")
    for name, stops in (("at once", (6,)), ("between", (7, 9)), ("before the run's own end", (4, 8))):
        folder = tmp_path / name
        if stops[0] >= TINY.steps:
            shutil.copytree(trained[0], folder)
        for stop in stops:
            train_model(TINY, corpus, folder, steps=11, stop_at=stop)
        resumed, resumed_record = train_model(TINY, corpus, folder)
        assert same(whole, resumed), name
        assert {key: resumed_record[key] for key in kept} == {key: record[key] for key in kept}, name


def test_metrics_from_before_a_stopped_extension_are_not_taken_for_its_own(trained, corpus, out):
    _, before, _ = trained
    train_model(TINY, corpus, out, steps=9, stop_at=7)
    metrics = run(TINY, corpus, out)
    assert metrics["training"][-1]["step"] == 8
    assert metrics["clean_loss"] != before["clean_loss"]


def test_a_run_can_be_extended_again_and_never_to_fewer_steps(trained, corpus, out):
    for steps, has in ((6, 6), (0, 6), (-1, 6)):
        with pytest.raises(ValueError, match=rf"--steps: got {steps} for a run of {has} steps; pass more, or resume"):
            train_model(TINY, corpus, out, steps=steps)
    train_model(TINY, corpus, out, steps=8)
    for steps in (7, 8):
        with pytest.raises(ValueError, match=rf"--steps: got {steps} for a run of 8 steps"):
            train_model(TINY, corpus, out, steps=steps)
    again, record = train_model(TINY, corpus, out, steps=10)
    assert [(x["from_step"], x["to_step"]) for x in record["extensions"]] == [(6, 8), (8, 10)]
    shutil.rmtree(out)
    shutil.copytree(trained[0], out)
    assert same(again, train_model(TINY, corpus, out, steps=10)[0])
