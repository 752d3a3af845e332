"""A pretrained model by what a user writes for it: smollm2, a GGUF file or a Hugging Face folder."""

import hashlib
from pathlib import Path

from prob_transformer.files import file_sha256
from prob_transformer.inspection import Loaded
from prob_transformer.pretrained.gguf_file import read_gguf
from prob_transformer.pretrained.huggingface import read_folder
from prob_transformer.pretrained.safetensors_folder import weight_files
from prob_transformer.pretrained.smollm2 import WEIGHTS_SHA256, weights_path


def _digest(paths: list[Path]) -> str:
    """sha256 of a file, or of the digests of several in the order of their names."""
    digests = [file_sha256(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def load(model: str) -> Loaded:
    """Decoder and tokenizer of "smollm2" or of the file or folder of that path.

    Raises ValueError for what is not there, damaged, foreign or of an architecture that is not supported.
    """
    if model == "smollm2":
        return Loaded(*read_gguf(weights_path()), "SmolLM2-135M", WEIGHTS_SHA256)
    path = Path(model)
    if path.is_dir():
        decoder, tokenizer = read_folder(path)
        return Loaded(decoder, tokenizer, path.resolve().name, _digest(weight_files(path)))
    if path.suffix == ".safetensors":
        raise ValueError(
            f"--model: {model} holds weights alone; pass the folder with its config.json and tokenizer.json."
        )
    if path.is_file():
        return Loaded(*read_gguf(path), path.name, _digest([path]))
    raise ValueError(f"--model: {model} is not there; pass smollm2, a GGUF file or a Hugging Face folder.")
