"""The command that writes text: what it prints and leaves, against the library's `generate`, and what it refuses."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from models import cli
from models.char_gpt import commands
from models.char_gpt.checkpoint import load_run
from models.char_gpt.config import Config
from models.char_gpt.train import train_model
from models.corpus import load
from prob_transformer.transformer import generate
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--prompt": "\u03a9"}, "--prompt: contains '\u03a9'"),
        ({"--prompt": ""}, "--prompt: has shape (0,)"),
        ({"--length": "0"}, "--length: got 0"),
        ({"--top-k": "0"}, "--top-k: got 0"),
        ({"--temperature": "-1"}, "--temperature: got -1.0"),
        ({"--noise-scale": "-1"}, "--noise-scale: got -1.0"),
        ({"--seed": "-1"}, "--seed: got -1"),
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
