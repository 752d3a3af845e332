"""Llama-family weights from a GGUF file, dequantised to float32.

GGUF stores a weight's rows as here, (out, in), and orders the rows of W_Q and W_K so that rotary pairs are neighbours,
(2j, 2j + 1): `Rotary(interleaved=True)`. Quantised weights carry quantisation noise: 4 bits leave fine spectral results
uncertain. Fields and their defaults are those of llama.cpp; a field or tensor that is not known here is refused.
"""

from pathlib import Path
from typing import Any, TypeVar

import gguf
import jax.numpy as jnp
import msgspec
import numpy as np
from tokenizers import Tokenizer

from prob_transformer.logits import Rotary
from prob_transformer.pretrained.config import Count, Positive, require_only, rotary_frequencies
from prob_transformer.pretrained.gguf_tokenizer import GgufTokenizer, tokenizer_of
from prob_transformer.pretrained.llama import LlamaShape, llama
from prob_transformer.pretrained.model import Decoder
from prob_transformer.pretrained.tokenizer import require_match

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
# By what the frequency of each rotary pair is divided, the scaling of Llama 3.
_FACTORS = "rope_freqs.weight"
_REMEDY = "pass a whole GGUF file of the Llama architecture"
Read = TypeVar("Read")


class _General(msgspec.Struct):
    architecture: str


class _Split(msgspec.Struct):
    count: int = 1
    no: int = 0


def _dotted(name: str) -> str:
    return name.replace("__", ".")


class _Llama(msgspec.Struct, forbid_unknown_fields=True, rename=_dotted):
    """The fields `llama.*`; counts of heads may be given layer by layer."""

    context_length: Count
    embedding_length: Count
    block_count: Count
    feed_forward_length: Count | list[Count]
    attention__head_count: Count | list[Count]
    attention__layer_norm_rms_epsilon: Positive
    attention__head_count_kv: Count | list[Count] | None = None
    attention__key_length: Count | None = None
    attention__value_length: Count | None = None
    attention__causal: bool = True
    rope__dimension_count: Count | None = None
    rope__freq_base: Positive = 10000.0
    rope__scaling__type: str = "linear"
    rope__scaling__factor: Positive | None = None
    rope__scaling__original_context_length: Any = None
    rope__scaling__finetuned: Any = None
    rope__scale_linear: Positive = 1.0
    expert_count: int = 0
    expert_used_count: int = 0
    vocab_size: Count | None = None
    tensor_data_layout: Any = None

    def __post_init__(self) -> None:
        require_only("rope.scaling.type", self.rope__scaling__type, "linear", "none")
        require_only("expert_count", self.expert_count, 0)
        require_only("attention.causal", self.attention__causal, True)
        if self.attention__key_length is None and self.embedding_length % self.heads:
            raise ValueError(f"embedding_length {self.embedding_length} does not divide into {self.heads} heads")
        require_only("attention.value_length", self.attention__value_length, None, self.head_size)
        if self.heads % self.key_heads:
            raise ValueError(f"{self.heads} heads do not divide among {self.key_heads} key heads")
        if self.turned % 2 or self.turned > self.head_size:
            raise ValueError(f"rope.dimension_count is {self.turned} for heads of size {self.head_size}")

    def _of_all_layers(self, name: str) -> int:
        given = getattr(self, name)
        if not isinstance(given, list):
            return given
        if len(set(given)) != 1 or len(given) != self.block_count:
            raise ValueError(f"{_dotted(name)} is {given}; only models whose layers are all alike are supported")
        return given[0]

    @property
    def heads(self) -> int:
        return self._of_all_layers("attention__head_count")

    @property
    def key_heads(self) -> int:
        return self.heads if self.attention__head_count_kv is None else self._of_all_layers("attention__head_count_kv")

    @property
    def head_size(self) -> int:
        return self.attention__key_length or self.embedding_length // self.heads

    @property
    def turned(self) -> int:
        return self.rope__dimension_count or self.head_size

    def shape(self, tokens: int) -> LlamaShape:
        return LlamaShape(
            tokens=tokens,
            width=self.embedding_length,
            hidden=self._of_all_layers("feed_forward_length"),
            layers=self.block_count,
            heads=self.heads,
            key_heads=self.key_heads,
            head_size=self.head_size,
            context=self.context_length,
            epsilon=self.attention__layer_norm_rms_epsilon,
        )

    def frequencies(self, factors: np.ndarray | None) -> np.ndarray:
        """Rotary frequencies in radians a position, divided by the factor of all and by those of each pair."""
        plain = rotary_frequencies(self.rope__freq_base, self.turned)
        if factors is not None:
            if factors.shape != plain.shape or not (factors > 0).all():
                raise ValueError(f"weights: {_FACTORS} has shape {factors.shape}; {plain.shape} numbers above 0 fit.")
            plain = plain / factors
        if self.rope__scaling__type == "none":
            return plain
        return plain / (self.rope__scaling__factor or self.rope__scale_linear)


class _File:
    """Fields and tensors of a GGUF file by name; whatever is missing or damaged is named."""

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except OSError as error:
            raise ValueError(f"weights: {path} cannot be read ({error.strerror}); pass a GGUF file.") from None
        # What its reader raises on a file that ends early or is something else.
        except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
            raise ValueError(f"weights: {path} is not a whole GGUF file ({error}); copy or install it again.") from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._unread = set(self.tensors)

    def section(self, name: str, schema: type[Read]) -> Read:
        """The fields whose names begin with `name`. Raises ValueError where one is missing or does not fit."""
        start = f"{name}."
        given = {field.removeprefix(start): x for field, x in self.fields.items() if field.startswith(start)}
        try:
            return msgspec.convert(given, schema)
        except msgspec.ValidationError as error:
            raise ValueError(f"weights: {self.path} is refused at its fields {start}*: {error}; {_REMEDY}.") from None

    def weight(self, name: str) -> np.ndarray | None:
        if name not in self.tensors:
            return None
        self._unread.discard(name)
        tensor = self.tensors[name]
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"weights: {name} of {self.path} cannot be dequantised ({error}); {_REMEDY}.") from None

    def require_all_read(self) -> None:
        if self._unread:
            raise ValueError(f"weights: {self.path} holds {min(self._unread)}, which is not of this architecture.")


def read_gguf(path: Path) -> tuple[Decoder, Tokenizer]:
    """Decoder and tokenizer of a GGUF file of architecture "llama"; its kinds of tokenizer are in gguf_tokenizer.py.

    Raises ValueError for a file that is damaged, foreign or a part of several, another architecture or tokenizer, and
    settings that the decoder here does not compute.
    """
    file = _File(Path(path))
    architecture = file.section("general", _General).architecture
    if architecture != "llama":
        raise ValueError(f"weights: {path} has architecture {architecture!r}; only 'llama' is read from GGUF files.")
    split = file.section("split", _Split)
    if split.count > 1:
        raise ValueError(
            f"weights: {path} is part {split.no + 1} of {split.count}; merge the parts first, as with "
            "llama-gguf-split --merge."
        )
    fields = file.section("llama", _Llama)
    tokenizer = tokenizer_of(file.section("tokenizer.ggml", GgufTokenizer))
    rotary = Rotary(jnp.asarray(fields.frequencies(file.weight(_FACTORS)), jnp.float32), interleaved=True)

    def weight(name: str, layer: int | None = None) -> np.ndarray | None:
        return file.weight(_NAMES[name].format(layer))

    embedding = weight("token_embedding")
    rows = 0 if embedding is None else embedding.shape[0]
    decoder = llama(fields.shape(fields.vocab_size or rows), weight, rotary)
    file.require_all_read()
    require_match(tokenizer, rows)
    return decoder, tokenizer
