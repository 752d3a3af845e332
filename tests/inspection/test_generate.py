"""`prob-transformer generate`: what it prints and writes, against the plain decoder and `inspect`'s own margins."""

import argparse
import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy.special import log_softmax
from tokenizers import Tokenizer, models, processors

from prob_transformer import layer_margins
from prob_transformer.inspection import Setting, command, inspect_text
from prob_transformer.inspection.generated_text import write_files
from prob_transformer.pretrained import load
from tests.helpers.error_lines import assert_refused

PROMPT = "a😀b"


@pytest.fixture
def run(loaded, monkeypatch):
    """The command on the tiny model, read once; gives the exit status."""

    def run(*more, prompt=PROMPT, loaded=loaded):
        monkeypatch.setattr(load, "load_pretrained", lambda _: loaded)
        return command.main(["generate", "--model", "tiny", "--prompt", prompt, *more])

    return run


def test_text_and_margins_are_those_of_the_plain_decoder_and_of_inspect(run, loaded, tmp_path, capsys):
    out, figure = tmp_path / "text.json", tmp_path / "text.png"
    assert run("--length", "20", "--temperature", "0", "--json", str(out), "--figure", str(figure)) == 0
    told, record = capsys.readouterr(), json.loads(out.read_text(encoding="utf-8"))
    text, log_probs = loaded.tokenizer.encode(PROMPT).ids, []
    assert record["prompt_tokens"] == text
    first = len(text) - 1
    for _ in range(20):
        logs = log_softmax(np.asarray(loaded.decoder(np.array(text)), np.float64)[-1])
        text, log_probs = [*text, int(logs.argmax())], [*log_probs, logs.max()]
    assert record["tokens"] == text[first + 1 :]
    np.testing.assert_allclose(record["log_probs"], log_probs, rtol=1e-3, atol=1e-4)
    assert told.out == PROMPT + record["text"] + "\n"
    assert PROMPT + record["text"] == loaded.tokenizer.decode(text, skip_special_tokens=False)
    assert (len(record["pieces"]), "".join(record["pieces"])) == (20, record["text"])

    tokens, positions = np.array(text), range(first, len(text) - 1)
    pieces = [""] * len(text)
    inspected = inspect_text(loaded.decoder.layers(tokens), pieces, tokens, Setting(), (0, 1))
    np.testing.assert_array_equal(record["sign"], inspected.sign[..., positions])
    np.testing.assert_array_equal(record["log_det"], inspected.log_det[..., positions])
    for layer, found in zip(loaded.decoder.layers(tokens), record["conditioning"], strict=True):
        expected = layer_margins(*layer, kinds=("conditioning",), positions=positions).conditioning
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert f"{np.exp(inspected.log_det[..., positions].min()):.3g}" in re.sub(r"\s+", " ", told.err)
    assert record["model_sha256"] == loaded.sha256
    assert record["provenance"]["command"].startswith("prob-transformer generate --model tiny")
    with Image.open(figure) as image:
        assert image.size == (1200, 675)


def test_more_positions_than_a_block_have_the_margins_of_their_own(run, loaded, tmp_path):
    long = loaded._replace(decoder=dataclasses.replace(loaded.decoder, context=64))
    assert run("--length", "40", "--json", str(tmp_path / "text.json"), loaded=long) == 0
    record = json.loads((tmp_path / "text.json").read_text(encoding="utf-8"))
    tokens = np.array(record["prompt_tokens"] + record["tokens"])
    positions = range(len(record["prompt_tokens"]) - 1, len(tokens) - 1)
    for layer, found in zip(long.decoder.layers(tokens), record["conditioning"], strict=True):
        expected = layer_margins(*layer, kinds=("conditioning",), positions=positions).conditioning
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_the_seed_decides_the_text(run, capsys):
    def text(seed):
        assert run("--length", "12", "--temperature", "5", "--seed", seed) == 0
        return capsys.readouterr().out

    assert text("1") == text("1") != text("2")


def test_tokens_added_before_a_text_are_read_and_those_after_it_are_not(run, loaded, tmp_path):
    tokenizer = Tokenizer.from_str(loaded.tokenizer.to_str())
    start, end = (tokenizer.token_to_id(f"<unused{i}>") for i in (0, 1))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<unused0> $A <unused1>", special_tokens=[("<unused0>", start), ("<unused1>", end)]
    )
    out = tmp_path / "text.json"
    assert run("--length", "2", "--json", str(out), loaded=loaded._replace(tokenizer=tokenizer)) == 0
    given = loaded.tokenizer.encode(PROMPT).ids
    assert json.loads(out.read_text(encoding="utf-8"))["prompt_tokens"] == [start, *given]


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        ("", [], "--prompt: is empty"),
        ("a" * 32, [], "--prompt: got 32 tokens, but a context of 32"),
        ("a", ["--length", "0"], "--length: got 0"),
        ("a", ["--length", "32"], "--length: got 32, but a context of 32 has room for 31 tokens"),
        ("a", ["--temperature", "-1"], "--temperature: got -1.0"),
        ("a", ["--top-k", "0"], "--top-k: got 0"),
        ("a", ["--top-k", "261"], "--top-k: got 261; pass at most 260"),
        ("a", ["--seed", "-1"], "--seed: got -1"),
    ],
)
def test_bad_options_are_refused_in_one_line(run, capsys, prompt, more, message):
    assert run("--length", "3", *more, prompt=prompt) == 2
    assert_refused(capsys, message)


def test_a_prompt_that_the_tokenizer_cannot_read_is_refused(run, loaded, capsys):
    words = Tokenizer(models.WordLevel({"known": 0}, unk_token="[UNK]"))
    assert run(loaded=loaded._replace(tokenizer=words)) == 2
    assert_refused(capsys, "--prompt: the model's tokenizer refuses it")


def test_a_model_that_is_not_there_is_refused(capsys):
    assert command.main(["generate", "--model", "nowhere", "--prompt", "a"]) == 2
    assert_refused(capsys, "--model: nowhere is not there")


def test_a_singular_place_is_null_in_the_file(tmp_path):
    options = argparse.Namespace(json=tmp_path / "text.json", figure=None, prompt="a")
    found = {"tokens": np.array([1]), "sign": np.zeros((1, 1, 1)), "log_det": np.full((1, 1, 1), -np.inf)}
    write_files(options, [(found, ["b"])], "token", lambda _: {})
    assert json.loads(options.json.read_text(encoding="utf-8"))["log_det"] == [[[None]]]
