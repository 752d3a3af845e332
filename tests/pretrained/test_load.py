"""What a user may pass for a model: what is read, and that all else is one line, status 2, and nothing written."""

import hashlib
import json

import gguf
import numpy as np
import pytest

from prob_transformer.inspection import main
from prob_transformer.pretrained.load import load
from tests.support.tiny_models import LLAMA, byte_tokenizer, llama_weights, write


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", LLAMA, llama_weights(LLAMA))


def gguf_file(path, architecture):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(8)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(model, tmp_path, capsys):
    """The one line that the command says of the model."""
    (tmp_path / "text.txt").write_text("some text")
    before = sorted(tmp_path.rglob("*"))
    given = ["--model", str(model), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    assert main(["inspect", *given], load) == 2
    assert sorted(tmp_path.rglob("*")) == before
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    return told.err


def test_a_folder_is_read_and_known_by_the_digest_of_its_weights(folder):
    loaded = load(str(folder))
    assert (loaded.name, loaded.decoder.context) == ("model", LLAMA["max_position_embeddings"])
    assert loaded.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_nothing_there(tmp_path, capsys):
    assert "is not there; pass smollm2, a GGUF file or" in refused(tmp_path / "none", tmp_path, capsys)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 something else", b"GGUF\3\0\0\0"])
def test_foreign_files(tmp_path, capsys, content):
    (tmp_path / "model.gguf").write_bytes(content)
    assert "is not a whole GGUF file" in refused(tmp_path / "model.gguf", tmp_path, capsys)


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_files(tmp_path, capsys, kept):
    path = gguf_file(tmp_path / "model.gguf", "llama")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert "is not a whole GGUF file" in refused(path, tmp_path, capsys)


def test_other_architectures(tmp_path, folder, capsys):
    path = gguf_file(tmp_path / "model.gguf", "mamba")
    assert "has architecture 'mamba'; only 'llama'" in refused(path, tmp_path, capsys)
    (folder / "config.json").write_text(json.dumps(LLAMA | {"model_type": "mamba"}))
    assert "is of type 'mamba'; supported are llama" in refused(folder, tmp_path, capsys)


def test_a_tokenizer_of_another_model(tmp_path, folder, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(9)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "pass the tokenizer that belongs to the model" in refused(folder, tmp_path, capsys)


def test_truncated_weights(tmp_path, folder, capsys):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is not a whole safetensors file" in refused(folder, tmp_path, capsys)


def test_pickled_weights_are_not_opened(tmp_path, folder, capsys):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "a pickled file that is not opened" in refused(folder, tmp_path, capsys)


def test_a_configuration_with_a_byte_order_mark_is_read(folder):
    plain = load(str(folder)).decoder
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(str(folder)).decoder.context == plain.context == 32
