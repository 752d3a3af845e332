"""config.json of a Hugging Face folder, validated once by a schema: every later line can trust its types and ranges.

Names, defaults and the reading of older keys are those of transformers, so a key that is left out means the same here.
"""

import codecs
import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from jaxtyping import Float
from msgspec import UNSET, UnsetType

Count = Annotated[int, msgspec.Meta(ge=1)]
# GGUF can hold an infinity, and the decoders compute in float32.
Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e38)]
Read = TypeVar("Read")


def require_only(name: str, value: Any, *supported: Any) -> None:
    """Raises ValueError for a setting that the decoder here does not compute."""
    if value not in supported:
        allowed = " or ".join(repr(one) for one in supported)
        raise ValueError(f"{name} = {value!r}; only {allowed} is supported")


def rotary_frequencies(base: float, size: int) -> Float[np.ndarray, " r"]:
    """base^(-2j / size) for each of the size / 2 coordinate pairs j, in radians a position."""
    return base ** (-np.arange(0, size, 2) / size)


class Rope(msgspec.Struct):
    """`rope_parameters`, called `rope_scaling` in older files, of any type."""

    rope_type: str | UnsetType = UNSET
    type: str = "default"
    rope_theta: Positive | UnsetType = UNSET
    factor: Positive | UnsetType = UNSET
    low_freq_factor: Positive | UnsetType = UNSET
    high_freq_factor: Positive | UnsetType = UNSET
    original_max_position_embeddings: Count | UnsetType = UNSET
    partial_rotary_factor: float = 1.0

    def required(self, name: str) -> float:
        value = getattr(self, name)
        if value is UNSET:
            raise ValueError(f"rotary positions are scaled without {name}")
        return value


class LlamaConfig(msgspec.Struct):
    """What is read of the config.json of a model of type llama."""

    vocab_size: Count = 32000
    hidden_size: Count = 4096
    intermediate_size: Count = 11008
    num_hidden_layers: Count = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Count = 2048
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    partial_rotary_factor: float = 1.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        require_only("hidden_act", self.hidden_act, "silu", "swish")
        require_only("mlp_bias", self.mlp_bias, False)
        require_only("partial_rotary_factor", self.partial_rotary_factor, 1.0)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} does not divide into {self.num_attention_heads} heads, and "
                "head_dim is not given"
            )
        if self.head_size % 2:
            raise ValueError(f"heads of size {self.head_size} have a coordinate without a pair for rotary positions")
        if self.num_attention_heads % self.key_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide among {self.key_heads} key heads")
        # Once here, so that what is missing is told before any weight is read.
        self.frequencies()

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def key_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def window(self) -> int | None:
        return None

    def frequencies(self) -> Float[np.ndarray, " r"]:
        """Rotary frequencies in radians a position, with the scalings "linear" and "llama3" of long-context models."""
        rope = self.rope_scaling or self.rope_parameters or Rope()
        require_only("partial_rotary_factor", rope.partial_rotary_factor, 1.0)
        base = self.rope_theta if rope.rope_theta is UNSET else rope.rope_theta
        frequencies = rotary_frequencies(base, self.head_size)
        kind = rope.type if rope.rope_type is UNSET else rope.rope_type
        require_only("rope_type", kind, "default", "linear", "llama3")
        if kind == "default":
            return frequencies
        factor = rope.required("factor")
        if kind == "linear":
            return frequencies / factor
        trained = rope.original_max_position_embeddings
        if trained is UNSET:
            trained = self.max_position_embeddings
        low, high = rope.required("low_freq_factor"), rope.required("high_freq_factor")
        if low >= high:
            raise ValueError(f"low_freq_factor = {low} is not below high_freq_factor = {high}")
        kept = np.clip((trained * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / factor)


class MistralConfig(LlamaConfig):
    """The same of a model of type mistral."""

    intermediate_size: Count = 14336
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131072
    sliding_window: Count | None = 4096

    @property
    def window(self) -> int | None:
        return self.sliding_window


class Gpt2Config(msgspec.Struct):
    """The same of a model of type gpt2."""

    vocab_size: Count = 50257
    n_positions: Count = 1024
    n_embd: Count = 768
    n_layer: Count = 12
    n_head: Count = 12
    n_inner: Count | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: Positive = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        require_only("activation_function", self.activation_function, "gelu_new", "gelu_pytorch_tanh", "gelu")
        require_only("scale_attn_weights", self.scale_attn_weights, True)
        require_only("scale_attn_by_inverse_layer_idx", self.scale_attn_by_inverse_layer_idx, False)
        require_only("add_cross_attention", self.add_cross_attention, False)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} does not divide into n_head = {self.n_head} heads")


class _Kind(msgspec.Struct):
    model_type: str
    quantization_config: Any = None
    is_encoder_decoder: bool = False


_FAMILIES: dict[str, type[LlamaConfig | Gpt2Config]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "gpt2": Gpt2Config,
}


def read_json(path: Path, schema: type[Read], remedy: str) -> Read:
    """The JSON file at `path` as `schema`. Raises ValueError, ending in `remedy`, if it is missing or does not fit."""
    try:
        return msgspec.json.decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), type=schema)
    except OSError as error:
        raise ValueError(f"model: {path} cannot be read ({error.strerror}); {remedy}.") from None
    except msgspec.ValidationError as error:
        raise ValueError(f"model: {path} is refused: {error}; {remedy}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"model: {path} is not JSON ({error}); {remedy}.") from None


def read_config(path: Path) -> LlamaConfig | Gpt2Config:
    """The configuration at `path`, by its model type.

    Raises ValueError for what is not there, is not JSON, has a value of another type or out of range, or asks for
    what the decoders here do not compute.
    """
    remedy = "pass a Hugging Face folder with config.json, model.safetensors and tokenizer.json of a supported model"
    kind = read_json(path, _Kind, remedy)
    if kind.model_type not in _FAMILIES:
        raise ValueError(f"model: {path} is of type {kind.model_type!r}; supported are {', '.join(_FAMILIES)}.")
    if kind.quantization_config is not None:
        raise ValueError(
            f"model: {path} has a quantization_config; quantised weights are not read: save the model in float32, "
            "float16 or bfloat16."
        )
    require_only(f"model: {path} gives is_encoder_decoder", kind.is_encoder_decoder, False)
    return read_json(path, _FAMILIES[kind.model_type], remedy)
