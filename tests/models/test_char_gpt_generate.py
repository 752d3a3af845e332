"""The command that writes text: what it prints and leaves, against the library's `generate`, and what it refuses."""

import dataclasses
import json
import re
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from PIL import Image

from models import cli
from models.char_gpt import checkpoint, commands
from models.char_gpt.checkpoint import load_run
from models.char_gpt.config import Config
from models.char_gpt.train import train_model
from models.corpus import load
from prob_transformer.transformer import generate, next_token_logits
from tests.helpers.error_lines import assert_refused

SMALL = Config(steps=2, layers=2, width=8, heads=2, context=8, batch=2, evaluation_windows=4)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_model(SMALL, load(text, SMALL.context + 1), folder)
    return folder


def test_it_prints_the_text_and_writes_the_margins_of_generate(run, tmp_path, capsys):
    out, figure = tmp_path / "text.json", tmp_path / "text.png"
    given = ["generate", "--run", str(run), "--prompt", "a b", "--length", "40", "--seed", "3", "--top-k", "4"]
    assert commands.main([*given, "--temperature", "0.8", "--json", str(out), "--figure", str(figure)]) == 0
    model, _, vocabulary = load_run(run)
    prompt = jnp.asarray(vocabulary.encode("a b"))
    expected = generate(model, prompt, 40, key=jax.random.key(3), temperature=0.8, top_k=4)
    told, record = capsys.readouterr(), json.loads(out.read_text())
    assert told.out == "a b" + vocabulary.decode(np.asarray(expected.tokens)) + "\n"
    assert "a b" + record["text"] + "\n" == told.out
    for name in ("tokens", "log_probs", "sign", "log_det", "conditioning"):
        np.testing.assert_allclose(record[name], getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert record["provenance"]["seed"] == 3
    smallest = np.exp(expected.log_det).min()
    assert f"{smallest:.3g}" in re.sub(r"\s+", " ", told.err)
    with Image.open(figure) as image:
        assert image.size == (1200, 675)


@pytest.fixture(scope="module")
def posterior(run, text, tmp_path_factory):
    """A file of the command laplace: three draws of the head of the run."""
    out = tmp_path_factory.mktemp("posterior") / "laplace.nc"
    given = ["laplace", "--run", str(run), "--corpus", str(text), "--structure", "last-layer", "--draws", "3"]
    assert commands.main([*given, "--characters", "40", "--prior-precision", "2", "--out", str(out)]) == 0
    return out


def test_texts_of_posterior_draws_are_those_of_generate_with_the_drawn_head(run, posterior, tmp_path, capsys):
    out = tmp_path / "texts.json"
    given = ["generate", "--run", str(run), "--prompt", "a b", "--length", "40", "--posterior", str(posterior)]
    assert commands.main([*given, "--draws", "2", "--json", str(out)]) == 0
    told, (first, second) = capsys.readouterr().out, json.loads(out.read_text())["draws"]
    assert told == f"a b{first['text']}\n\na b{second['text']}\n"
    model, _, vocabulary = load_run(run)
    heads = np.asarray(xr.open_datatree(posterior)["posterior"]["head"])[0]
    assert not np.allclose(heads[0], heads[1])
    for head, record in zip(heads, (first, second), strict=False):
        drawn = eqx.tree_at(lambda m: m.head, model, jnp.asarray(head))
        # The text is one that these weights give: its log-probabilities are theirs.
        tokens = np.concatenate([vocabulary.encode("a b"), record["tokens"]])
        expected = [jax.nn.log_softmax(next_token_logits(drawn, tokens[:m]))[tokens[m]] for m in range(3, 43)]
        np.testing.assert_allclose(record["log_probs"], expected, rtol=1e-4, atol=1e-5)
    prompt, key = jnp.asarray(vocabulary.encode("a b")), jax.random.split(jax.random.key(0), 2)[0]
    drawn = eqx.tree_at(lambda m: m.head, model, jnp.asarray(heads[0]))
    assert first["tokens"] == generate(drawn, prompt, 40, key=key).tokens.tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--draws": "4"}, "--draws: got 4; pass 1 to 3"),
        ({"--draws": "0"}, "--draws: got 0; pass 1 to 3"),
        ({"--draws": "2", "--figure": "text.png"}, "--figure: shows one text, got --draws 2"),
        ({"--posterior": "nowhere.nc"}, "--posterior: nowhere.nc: is not there"),
    ],
)
def test_bad_draws_are_refused_in_one_line(run, posterior, capsys, changed, message):
    options = {"--run": str(run), "--prompt": "a", "--posterior": str(posterior)} | changed
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: commands.main(["generate", *(part for pair in options.items() for part in pair)]))
    assert ended.value.code == 2
    assert_refused(capsys, message)


def test_draws_of_another_run_are_refused(text, posterior, tmp_path, capsys):
    other = dataclasses.replace(SMALL, seed=1)
    train_model(other, load(text, other.context + 1), tmp_path)
    with pytest.raises(ValueError, match=r"--posterior: .* is of other weights than the run's"):
        commands.main(["generate", "--run", str(tmp_path), "--prompt", "a", "--posterior", str(posterior)])


def test_draws_of_a_run_before_it_was_extended_are_refused(run, text, posterior, tmp_path):
    extended = shutil.copytree(run, tmp_path / "extended")
    steps = checkpoint.read_header(extended / checkpoint.NAME).step + 1
    assert commands.main(["resume", "--steps", str(steps), "--corpus", str(text), "--out", str(extended)]) == 0
    with pytest.raises(ValueError, match=r"--posterior: .* is of other weights than the run's"):
        commands.main(["generate", "--run", str(extended), "--prompt", "a", "--posterior", str(posterior)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--prompt": "\u03a9\u03b1\u03a9"}, "--prompt: contains '\u03a9', '\u03b1', which"),
        ({"--prompt": ""}, "--prompt: is empty; pass at least one character"),
        ({"--length": "0"}, "--length: got 0"),
        ({"--top-k": "0"}, "--top-k: got 0"),
        ({"--temperature": "-1"}, "--temperature: got -1.0"),
        ({"--noise-scale": "-1"}, "--noise-scale: got -1.0"),
        ({"--seed": "-1"}, "--seed: got -1"),
        ({"--seed": "4294967296"}, "--seed: got 4294967296; pass an integer below"),
        ({"--json": "checkpoint.eqx"}, "--json: checkpoint.eqx: ends in '.eqx'; pass a path ending in .json"),
        ({"--figure": "text.json"}, "--figure: text.json: ends in '.json'; pass a path ending in .png"),
        ({"--json": "/proc/text.json"}, "--json: /proc/text.json: cannot be written"),
        ({"--figure": "/proc/text.png"}, "--figure: /proc/text.png: cannot be written"),
        ({"--draws": "2"}, "--draws: got 2 without --posterior"),
        ({"--run": "nowhere"}, "--run: no checkpoint at nowhere"),
    ],
)
def test_bad_options_are_refused_in_one_line(run, capsys, changed, message):
    options = {"--run": str(run), "--prompt": "a"} | changed
    given = ["generate", *(part for pair in options.items() for part in pair)]
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: commands.main(given))
    assert ended.value.code == 2
    assert_refused(capsys, message)
