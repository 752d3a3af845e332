"""Llama-family weights from a GGUF file, dequantised to float32.

GGUF stores a weight's rows as here, (out, in), and orders the rows of W_Q and W_K so that rotary pairs are neighbours,
(2j, 2j + 1): `Rotary(interleaved=True)`. Quantised weights carry quantisation noise: 4 bits leave fine spectral results
uncertain.
"""

from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from prob_transformer.decoder import Rotary
from prob_transformer.decoder_models.llama import LlamaShape, llama
from prob_transformer.decoder_models.model import Decoder
from prob_transformer.decoder_models.tokenizer import digits_then_bytes, require_match

_NAMES = {
    "token_embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "query": "blk.{}.attn_q.weight",
    "key": "blk.{}.attn_k.weight",
    "value": "blk.{}.attn_v.weight",
    "output": "blk.{}.attn_output.weight",
    "perceptron_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "query_bias": "blk.{}.attn_q.bias",
    "key_bias": "blk.{}.attn_k.bias",
    "value_bias": "blk.{}.attn_v.bias",
    "output_bias": "blk.{}.attn_output.bias",
}
_OPTIONAL = {"head", "query_bias", "key_bias", "value_bias", "output_bias"}
_CONTROL = 3


class _File:
    """Fields and tensors of a GGUF file by name; whatever is missing or damaged is named."""

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except OSError as error:
            raise ValueError(f"weights: {path} cannot be read ({error.strerror}); pass a GGUF file.") from None
        # What its reader raises on a file that ends early or is something else.
        except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
            raise ValueError(f"weights: {path} is not a whole GGUF file ({error}); copy or install it again.") from None
        self.fields, self.tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}

    def field(self, name: str) -> Any:
        if name not in self.fields:
            raise ValueError(f"weights: {self.path} has no field {name}; pass a GGUF file of the Llama architecture.")
        return self.fields[name].contents()

    def weight(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise ValueError(f"weights: {self.path} has no tensor {name}; pass a GGUF file of the Llama architecture.")
        tensor = self.tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def read_gguf(path: Path) -> tuple[Decoder, Tokenizer]:
    """Decoder and tokenizer of a GGUF file of architecture "llama" with a SmolLM tokenizer.

    Raises ValueError for a file that is damaged or foreign, another architecture, or another tokenizer.
    """
    file = _File(Path(path))
    architecture = file.field("general.architecture")
    if architecture != "llama":
        raise ValueError(f"weights: {path} has architecture {architecture!r}; only 'llama' is read from GGUF files.")
    if "llama.rope.scaling.type" in file.fields or "rope_freqs.weight" in file.tensors:
        raise ValueError(f"weights: {path} scales its rotary positions; only plain ones are read from GGUF files.")
    kind = (file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"tokenizer: {path} holds one of kind {kind}; only ('gpt2', 'smollm') is read from GGUF files."
        )
    heads, width = file.field("llama.attention.head_count"), file.field("llama.embedding_length")
    turned = file.field("llama.rope.dimension_count")
    frequencies = file.field("llama.rope.freq_base") ** (-np.arange(0, turned, 2) / turned)
    shape = LlamaShape(
        layers=file.field("llama.block_count"),
        heads=heads,
        key_heads=file.field("llama.attention.head_count_kv"),
        head_size=width // heads,
        context=file.field("llama.context_length"),
        epsilon=file.field("llama.attention.layer_norm_rms_epsilon"),
    )

    def weight(name: str, layer: int | None = None) -> np.ndarray | None:
        stored = _NAMES[name].format(layer)
        if name in _OPTIONAL and stored not in file.tensors:
            return None
        return file.weight(stored)

    decoder = llama(shape, weight, Rotary(jnp.asarray(frequencies, jnp.float32), interleaved=True))
    tokens = file.field("tokenizer.ggml.tokens")
    types = file.field("tokenizer.ggml.token_type")
    merges = [(first, second) for first, second in (merge.split(" ") for merge in file.field("tokenizer.ggml.merges"))]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer = digits_then_bytes(tokens, merges, special)
    require_match(tokenizer, decoder.token_embedding.shape[0])
    return decoder, tokenizer
