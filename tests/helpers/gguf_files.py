"""Tiny GGUF files of the Llama architecture, written from the weights of a Hugging Face folder."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.helpers.tiny_models import LLAMA, byte_tokenizer, llama_weights

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FIELDS: dict[str, Any] = {
    "llama.context_length": 32,
    "llama.embedding_length": 8,
    "llama.block_count": 2,
    "llama.feed_forward_length": 12,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 4,
    "llama.attention.value_length": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 4,
    "llama.rope.freq_base": 100.0,
    "llama.vocab_size": 260,
}


def _stored(name: str) -> str:
    parts = name.removesuffix(".weight")
    if parts.startswith("model.layers."):
        _, _, layer, rest = parts.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest]}.weight"
    return f"{_NAMES[parts]}.weight"


def tensors(config: dict[str, Any] = LLAMA) -> dict[str, np.ndarray]:
    """The weights under their GGUF names, rows of queries and keys so that rotary pairs are neighbours."""
    found = {}
    for name, weight in llama_weights(config).items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            half = config["head_dim"] // 2
            weight = weight.reshape(-1, 2, half, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        found[_stored(name)] = weight
    return found


def byte_level() -> dict[str, Any]:
    """One token a byte, and one merge that the text does not have."""
    vocabulary = byte_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__)[:-1], "qq"]
    return {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [1] * len(tokens), "merges": ["q q"]}


def write_gguf(
    path: Path, fields: dict[str, Any] = FIELDS, weights: dict[str, np.ndarray] | None = None,
    tokenizer: dict[str, Any] | None = None, architecture: str = "llama",
) -> Path:  # fmt: skip
    """A file of these fields (those that are None left out), weights and fields of its tokenizer."""
    writer = gguf.GGUFWriter(path, architecture)
    told = {f"tokenizer.ggml.{name}": x for name, x in (tokenizer or byte_level()).items()}
    for name, value in (fields | told).items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, weight in (tensors() if weights is None else weights).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
