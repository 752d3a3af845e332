"""Llama-family weights from a GGUF file, dequantised to float32.

GGUF stores a weight's rows as here, (out, in), and orders the rows of W_Q and W_K so that rotary pairs are neighbours,
(2j, 2j + 1): `Rotary(interleaved=True)`. Quantised weights carry quantisation noise: 4 bits leave fine spectral results
uncertain. Fields and their defaults are those of llama.cpp; a field or tensor that is not known here is refused.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import msgspec
from tokenizers import Tokenizer

from prob_transformer.logits import Rotary
from prob_transformer.pretrained.config_fields import Count, Positive, Schema, require_supported
from prob_transformer.pretrained.decoder import Decoder
from prob_transformer.pretrained.gguf_tokenizer import GgufTokenizer, tokenizer_of
from prob_transformer.pretrained.llama import LlamaConfig, llama_decoder, rotary_frequencies
from prob_transformer.pretrained.weights import Stored, read_weights

_NAMES = {
    "token_embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "query": "blk.{}.attn_q.weight",
    "key": "blk.{}.attn_k.weight",
    "value": "blk.{}.attn_v.weight",
    "output": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
}
# Some models have these; all layers have them then, as the first does.
_OPTIONAL_NAMES = {
    "head": "output.weight",
    "query_bias": "blk.{}.attn_q.bias",
    "key_bias": "blk.{}.attn_k.bias",
    "value_bias": "blk.{}.attn_v.bias",
    "output_bias": "blk.{}.attn_output.bias",
}
# By what the frequency of each rotary pair is divided, the scaling of Llama 3.
_FACTORS = "rope_freqs.weight"
# What says nothing of the model as it is run.
_WITHOUT_EFFECT = {
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.finetuned",
    "llama.expert_used_count",
    "llama.tensor_data_layout",
}


class _Llama(msgspec.Struct, forbid_unknown_fields=True, rename=lambda name: name.replace("__", ".")):
    """The fields `llama.*`."""

    context_length: Count
    embedding_length: Count
    block_count: Count
    feed_forward_length: Count
    attention__head_count: Count
    attention__layer_norm_rms_epsilon: Positive
    attention__head_count_kv: Count | None = None
    attention__key_length: Count | None = None
    attention__value_length: Count | None = None
    attention__causal: bool = True
    rope__dimension_count: Count | None = None
    rope__freq_base: Positive = 10000.0
    rope__scaling__type: str = "linear"
    rope__scaling__factor: Positive | None = None
    rope__scale_linear: Positive = 1.0
    expert_count: int = 0
    vocab_size: Count | None = None

    def __post_init__(self) -> None:
        size = self.config(1).head_size
        require_supported(
            self,
            rope__scaling__type=("linear", "none"),
            expert_count=(0,),
            attention__causal=(True,),
            attention__value_length=(None, size),
        )
        turned = self.rope__dimension_count or size
        if turned % 2 or turned > size:
            raise ValueError(f"rope.dimension_count is {turned} for heads of size {size}")

    def config(self, rows: int) -> LlamaConfig:
        """The same as the configuration of a folder; `rows` of embeddings are taken for a vocabulary not told of."""
        return LlamaConfig(
            vocab_size=self.vocab_size or rows,
            hidden_size=self.embedding_length,
            intermediate_size=self.feed_forward_length,
            num_hidden_layers=self.block_count,
            num_attention_heads=self.attention__head_count,
            num_key_value_heads=self.attention__head_count_kv,
            head_dim=self.attention__key_length,
            max_position_embeddings=self.context_length,
            rms_norm_eps=self.attention__layer_norm_rms_epsilon,
        )

    def rotary(self, stored: Stored, size: int) -> Rotary:
        """Frequencies in radians a position, divided by the factor of all and by those of each pair."""
        frequencies = rotary_frequencies(self.rope__freq_base, self.rope__dimension_count or size)
        if _FACTORS in stored:
            (factors,) = read_weights(stored, {"factors": _FACTORS}, {"factors": frequencies.shape}).values()
            if not (factors > 0).all():
                raise ValueError(f"weights: {_FACTORS} has a number that is not above 0; copy the file again.")
            frequencies = frequencies / factors
        if self.rope__scaling__type != "none":
            frequencies = frequencies / (self.rope__scaling__factor or self.rope__scale_linear)
        return Rotary(jnp.asarray(frequencies, jnp.float32), interleaved=True)


def _section(path: Path, fields: Mapping[str, Any], name: str, schema: type[Schema]) -> Schema:
    """The fields whose names begin with `name`, by a schema. Raises ValueError where one is missing or does not fit."""
    given = {field.removeprefix(f"{name}."): x for field, x in fields.items() if field.startswith(f"{name}.")}
    try:
        return msgspec.convert(given, schema)
    except msgspec.ValidationError as error:
        raise ValueError(
            f"weights: {path} is refused at its fields {name}.*: {error}; pass a whole GGUF file of the Llama "
            "architecture."
        ) from None


def read_gguf(path: Path) -> tuple[Decoder, Tokenizer]:
    """Decoder and tokenizer of a GGUF file of architecture "llama"; its kinds of tokenizer are in gguf_tokenizer.py.

    Raises ValueError for a file that is damaged, foreign or a part of several, another architecture or tokenizer, and
    settings that the decoder here does not compute.
    """
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise ValueError(f"weights: {path} cannot be read ({error.strerror}); pass a GGUF file.") from None
    # What its reader raises on a file that ends early or is something else.
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"weights: {path} is not a whole GGUF file ({error}); copy or install it again.") from None
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"weights: {path} has architecture {architecture!r}; only 'llama' is read from GGUF files.")
    if fields.get("split.count", 1) > 1:
        raise ValueError(
            f"weights: {path} is part {fields.get('split.no', 0) + 1} of {fields['split.count']}; merge the parts "
            "first, as with llama-gguf-split --merge."
        )
    # A count may be given layer by layer.
    for name, value in fields.items():
        if name.startswith("llama.") and isinstance(value, list):
            if len(set(value)) != 1 or len(value) != fields.get("llama.block_count"):
                raise ValueError(
                    f"weights: {path} gives {name} = {value}; only models whose layers are all alike are supported."
                )
            fields[name] = value[0]
    told = _section(path, {name: x for name, x in fields.items() if name not in _WITHOUT_EFFECT}, "llama", _Llama)
    tokenizer = tokenizer_of(_section(path, fields, "tokenizer.ggml", GgufTokenizer))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    stored: Stored = {
        name: partial(gguf.quants.dequantize, tensor.data, tensor.tensor_type) for name, tensor in tensors.items()
    }
    names = _NAMES | {name: own for name, own in _OPTIONAL_NAMES.items() if own.format(0) in stored}
    # GGUF gives the last axis first.
    embedding = tensors.get(_NAMES["token_embedding"])
    config = told.config(0 if embedding is None else int(embedding.shape[-1]))
    return llama_decoder(config, stored, names, told.rotary(stored, config.head_size)), tokenizer
