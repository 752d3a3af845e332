"""What a user may pass for a model."""

import hashlib

import pytest

from prob_transformer.pretrained.load import load_pretrained
from tests.helpers.foreign_models import llama_folder, sharded


def digest(content):
    return hashlib.sha256(content).hexdigest()


def test_a_folder_is_known_by_its_name_and_the_digest_of_its_weights(tmp_path):
    one = llama_folder(tmp_path / "one")
    assert load_pretrained(str(one))[2:] == ("one", digest((one / "model.safetensors").read_bytes()))
    parts = sharded(tmp_path / "parts")
    whole = "\n".join(digest((parts / f"model-{number}.safetensors").read_bytes()) for number in range(2))
    assert load_pretrained(str(parts)).sha256 == digest(whole.encode())


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("none", "is not there; pass smollm2, a GGUF file or"),
        ("model/model.safetensors", "holds weights alone; pass the folder"),
    ],
)
def test_what_is_no_model_is_one_line(refused, tmp_path, name, word):
    llama_folder(tmp_path / "model")
    refused(tmp_path / name, word)
