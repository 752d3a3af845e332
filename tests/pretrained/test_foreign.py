"""Model folders and files as others write them, read right: by the numbers of transformers and SentencePiece."""

import json
from pathlib import Path

import numpy as np
import pytest

from prob_transformer.inference import results
from prob_transformer.inspection import main
from prob_transformer.pretrained.load import load
from tests.support.foreign_models import FOLDERS, TEXT, TIED, ends, with_tokenizer
from tests.support.gguf_files import FIELDS, tensors, write_gguf
from tests.support.tiny_models import LLAMA

HERE = Path(__file__).parent
TRUTH = np.load(HERE / "foreign.npz")
TOKENIZERS = json.loads((HERE / "tokenizers.json").read_text(encoding="utf-8"))


def inspect(model, folder, *more):
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    given = ["--model", str(model), "--text", str(folder / "text.txt"), "--out", str(folder / "out"), *more]
    return main(["inspect", *given], load)


def close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def compare(model, folder, case):
    """Tokens, margins of both kinds, and logits as transformers has them."""
    truth = {name: TRUTH[f"{case}/{name}"] for name in ("tokens", "logits", "sign", "log_det")}
    for index, more in enumerate(((), ("--values", "own", "--self-inclusive"))):
        assert inspect(model, folder, *more) == 0
        tree = results.load(folder / "out" / "inspect.nc")
        np.testing.assert_array_equal(tree["text/token_number"], truth["tokens"])
        # The first position has no past: J is the identity, or that of a position alone with itself.
        sign, log_det = truth["sign"][:, index, :, 1:], truth["log_det"][:, index, :, 1:]
        np.testing.assert_array_equal(tree["margins/sign"][..., 1:], sign)
        # The inputs of a layer come from a model in float32; a determinant near 0 makes more of their rounding.
        close(tree["margins/log_det"][..., 1:].values, log_det, 1e-3)
    close(np.asarray(load(str(model)).decoder(truth["tokens"]))[:, ::20], truth["logits"], 2e-4)


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_read_as_transformers_reads_it(tmp_path, case):
    compare(FOLDERS[case](tmp_path / "model"), tmp_path, case)


# Of each file: fields that differ, weights, and the folder that it equals.
FILES = {
    "plain": ({}, tensors(), "llama"),
    "tied": ({}, tensors(TIED), "tied"),
    "defaults of fields": (
        {"llama.rope.dimension_count": None, "llama.vocab_size": None, "llama.attention.value_length": None},
        tensors(),
        "llama",
    ),
    "key heads by layer": (
        {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [12, 12]},
        tensors(),
        "llama",
    ),
    "linear": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, tensors(), "linear"),
    "linear, old key": ({"llama.rope.scale_linear": 2.0}, tensors(), "linear"),
    "scaling of type none": ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0}, tensors(), "llama"),
    "factors of pairs": (
        {},
        tensors() | {"rope_freqs.weight": np.full(2, 2, np.float32)},
        "linear",
    ),
    "one part of one": ({"split.count": 1, "split.no": 0}, tensors(), "llama"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_gguf_file_is_read_as_the_folder_that_it_equals(tmp_path, case):
    fields, weights, folder = FILES[case]
    compare(write_gguf(tmp_path / "model.gguf", FIELDS | fields, weights), tmp_path, folder)


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2", "gpt-2", "llama"])
def test_a_gguf_tokenizer_cuts_as_the_models_own_does(tmp_path, kind):
    told = TOKENIZERS[kind]
    tokens = told["tokens"]
    fields = {"tokens": tokens, "model": "llama" if kind == "llama" else "gpt2"}
    if kind == "llama":
        fields |= {"scores": told["scores"], "token_type": told["types"]}
    else:
        types = [1] * (len(tokens) - 1) + [3]
        fields |= {"pre": kind, "merges": told["merges"], "token_type": types, "bos_token_id": len(tokens) - 1}
    rows = {"vocab_size": len(tokens)}
    path = write_gguf(
        tmp_path / "model.gguf", FIELDS | {"llama.vocab_size": len(tokens)}, tensors(LLAMA | rows), fields
    )
    tokenizer = load(str(path)).tokenizer
    assert [tokenizer.encode(text).ids for text in TOKENIZERS["texts"]] == told["ids"]
    for text in TOKENIZERS["texts"]:
        if kind != "qwen2":
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_added_tokens_are_shown_and_can_be_left_out(tmp_path, capsys):
    model = with_tokenizer(ends("<unused0> $A <unused1>"))(tmp_path / "model")
    assert inspect(model, tmp_path) == 0
    whole = results.load(tmp_path / "out" / "inspect.nc")
    last = len(TEXT.encode()) + 1
    words = f"Tokens added by the tokenizer: '<unused0>' at 0, '<unused1>' at {last}."
    assert words in " ".join(capsys.readouterr().out.split())
    assert words.replace("'", "&#x27;").replace("<", "&lt;").replace(">", "&gt;") in (
        tmp_path / "out" / "inspect.html"
    ).read_text(encoding="utf-8")
    assert json.loads(whole.attrs["added_tokens"]) == [0, last]
    pieces = whole["text/token"].values.tolist()
    assert (pieces[0], pieces[-1], "".join(pieces[1:-1])) == ("<unused0>", "<unused1>", TEXT)
    assert inspect(model, tmp_path, "--no-special-tokens") == 0
    assert "Tokens added by the tokenizer: none." in capsys.readouterr().out
    plain = results.load(tmp_path / "out" / "inspect.nc")
    assert "".join(plain["text/token"].values.tolist()) == TEXT
