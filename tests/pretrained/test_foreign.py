"""Model folders and files as others write them, read right: by the numbers of transformers and SentencePiece."""

import json
from pathlib import Path

import numpy as np
import pytest

from prob_transformer.inference import result_tree
from prob_transformer.pretrained.load import load_pretrained
from tests.helpers.foreign_models import FOLDERS, TEXT, TIED, ends, llama_folder, with_tokenizer
from tests.helpers.gguf_files import FIELDS, tensors, write_gguf
from tests.helpers.tiny_models import LLAMA

HERE = Path(__file__).parent
TRUTH = np.load(HERE / "foreign.npz")
TOKENIZERS = json.loads((HERE / "tokenizers.json").read_text(encoding="utf-8"))


def close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


@pytest.fixture
def compare(inspect, tmp_path):
    """That tokens, margins of both kinds, and logits are as transformers has them."""

    def check(model, case):
        truth = {name: TRUTH[f"{case}/{name}"] for name in ("tokens", "logits", "sign", "log_det")}
        for index, more in enumerate(((), ("--values", "own", "--self-inclusive"))):
            assert inspect(model, *more) == 0
            tree = result_tree.load(tmp_path / "out" / "inspect.nc")
            np.testing.assert_array_equal(tree["text/token_number"], truth["tokens"])
            # The first position has no past: J is the identity, or that of a position alone with itself.
            sign, log_det = truth["sign"][:, index, :, 1:], truth["log_det"][:, index, :, 1:]
            np.testing.assert_array_equal(tree["margins/sign"][..., 1:], sign)
            # The inputs of a layer come from a model in float32; a determinant near 0 makes more of their rounding.
            close(tree["margins/log_det"][..., 1:].values, log_det, 1e-3)
        close(np.asarray(load_pretrained(str(model)).decoder(truth["tokens"]))[:, ::20], truth["logits"], 2e-4)

    return check


def begin_with_a_byte_order_mark(folder):
    path = llama_folder(folder) / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return folder


# Of each folder: how it is written, and the folder whose truth it shares.
EQUAL = {case: (make, case) for case, make in FOLDERS.items()} | {"byte order": (begin_with_a_byte_order_mark, "llama")}


@pytest.mark.parametrize("case", EQUAL)
def test_a_folder_is_read_as_transformers_reads_it(compare, tmp_path, case):
    make, truth = EQUAL[case]
    compare(make(tmp_path / "model"), truth)


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
def test_a_gguf_file_is_read_as_the_folder_that_it_equals(compare, tmp_path, case):
    fields, weights, folder = FILES[case]
    compare(write_gguf(tmp_path / "model.gguf", FIELDS | fields, weights), folder)


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
    tokenizer = load_pretrained(str(path)).tokenizer
    assert [tokenizer.encode(text).ids for text in TOKENIZERS["texts"]] == told["ids"]
    for text in TOKENIZERS["texts"]:
        if kind != "qwen2":
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_added_tokens_are_shown_and_can_be_left_out(inspect, tmp_path, capsys):
    model = with_tokenizer(ends("<unused0> $A <unused1>"))(tmp_path / "model")
    assert inspect(model) == 0
    whole = result_tree.load(tmp_path / "out" / "inspect.nc")
    last = len(TEXT.encode()) + 1
    words = f"Tokens added by the tokenizer: '<unused0>' at 0, '<unused1>' at {last}."
    assert words in " ".join(capsys.readouterr().out.split())
    assert words.replace("'", "&#x27;").replace("<", "&lt;").replace(">", "&gt;") in (
        tmp_path / "out" / "inspect.html"
    ).read_text(encoding="utf-8")
    assert json.loads(whole.attrs["added_tokens"]) == [0, last]
    pieces = whole["text/token"].values.tolist()
    assert (pieces[0], pieces[-1], "".join(pieces[1:-1])) == ("<unused0>", "<unused1>", TEXT)
    assert inspect(model, "--no-special-tokens") == 0
    assert "Tokens added by the tokenizer: none." in capsys.readouterr().out
    plain = result_tree.load(tmp_path / "out" / "inspect.nc")
    assert "".join(plain["text/token"].values.tolist()) == TEXT
