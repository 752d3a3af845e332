"""A decoder of the Llama family: its configuration, and the model from its weights wherever they are stored.

Root-mean-square norms, rotary positions, grouped keys and values, SwiGLU; no biases but, in some members, those of
queries, keys and values. Fields are those of config.json, with the names, defaults and older keys of transformers.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float
from msgspec import UNSET, UnsetType

from prob_transformer.attention import Attention
from prob_transformer.logits import RMSNorm, Rotary
from prob_transformer.pretrained.config_fields import Count, Positive, require_supported
from prob_transformer.pretrained.decoder import Block, Decoder, SwiGLU
from prob_transformer.pretrained.weights import Stored, read_all_weights


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

    def __post_init__(self) -> None:
        if self.rope_type is UNSET:
            self.rope_type = self.type
        require_supported(self, rope_type=("default", "linear", "llama3"), partial_rotary_factor=(1.0,))


class LlamaConfig(msgspec.Struct):
    """What is read of the config.json of a model of type llama. Raises ValueError for what is not computed here."""

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
        require_supported(self, hidden_act=("silu", "swish"), mlp_bias=(False,), partial_rotary_factor=(1.0,))
        heads, size = self.num_attention_heads, self.head_size
        key_heads = self.num_key_value_heads or heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} does not divide into {heads} heads, and head_dim is not given"
            )
        if size % 2:
            raise ValueError(f"heads of size {size} have a coordinate without a pair for rotary positions")
        if heads % key_heads:
            raise ValueError(f"{heads} heads do not divide among {key_heads} key heads")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    def frequencies(self) -> Float[np.ndarray, " r"]:
        """Rotary frequencies in radians a position, with the scalings "linear" and "llama3" of long-context models.

        Raises ValueError for a scaling that lacks a number.
        """
        rope = msgspec.structs.asdict(self.rope_scaling or self.rope_parameters or Rope())
        base = self.rope_theta if rope["rope_theta"] is UNSET else rope["rope_theta"]
        plain = rotary_frequencies(base, self.head_size)
        if rope["rope_type"] == "default":
            return plain
        wanted = ("factor",) if rope["rope_type"] == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
        for name in wanted:
            if rope[name] is UNSET:
                raise ValueError(f"rope_scaling: rotary positions are scaled without {name}; give it in config.json.")
        factor, *bounds = (rope[name] for name in wanted)
        if not bounds:
            return plain / factor
        low, high = bounds
        if low >= high:
            raise ValueError(
                f"rope_scaling: low_freq_factor = {low} is not below high_freq_factor = {high}; correct it."
            )
        trained = rope["original_max_position_embeddings"]
        trained = self.max_position_embeddings if trained is UNSET else trained
        kept = np.clip((trained * plain / (2 * math.pi) - low) / (high - low), 0, 1)
        return plain * (kept + (1 - kept) / factor)


class MistralConfig(LlamaConfig):
    """The same of a model of type mistral."""

    intermediate_size: Count = 14336
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131072
    sliding_window: Count | None = 4096


def rotary_frequencies(base: float, size: int) -> Float[np.ndarray, " r"]:
    """base^(-2j / size) for each of the size / 2 coordinate pairs j, in radians a position."""
    return base ** (-np.arange(0, size, 2) / size)


def llama_decoder(config: LlamaConfig, stored: Stored, names: Mapping[str, str], rotary: Rotary) -> Decoder:
    """The decoder in float32. Raises ValueError for weights that are missing, left over or do not fit.

    `names` says how each weight is called in the file, layers as {}. It has no biases, or no head, where the model has
    none; the head is then the token embedding. All matrices are stored as (out, in).
    """
    width, hidden, size, epsilon = config.hidden_size, config.intermediate_size, config.head_size, config.rms_norm_eps
    heads = config.num_attention_heads
    groups = config.num_key_value_heads or heads
    whole = {
        "token_embedding": (config.vocab_size, width),
        "final_norm": (width,),
        "head": (config.vocab_size, width),
    }
    of_layer = {
        "attention_norm": (width,),
        "query": (heads * size, width),
        "key": (groups * size, width),
        "value": (groups * size, width),
        "output": (width, heads * size),
        "query_bias": (heads * size,),
        "key_bias": (groups * size,),
        "value_bias": (groups * size,),
        "output_bias": (width,),
        "mlp_norm": (width,),
        "gate": (hidden, width),
        "up": (hidden, width),
        "down": (width, hidden),
    }

    # Compiled once for all layers, so that their shapes are checked once.
    @jax.jit
    def block(weights: dict[str, Array]) -> Block:
        output = weights["output"].reshape(width, heads, size).transpose(1, 0, 2)
        query_bias, key_bias, value_bias = [
            weights[name].reshape(-1, size) if name in weights else None
            for name in ("query_bias", "key_bias", "value_bias")
        ]
        attention = Attention(
            weights["query"].reshape(heads, size, width),
            weights["key"].reshape(groups, size, width),
            weights["value"].reshape(groups, size, width),
            output,
            query_bias=query_bias,
            key_bias=key_bias,
            rotary=rotary,
            window=getattr(config, "sliding_window", None),
        )
        output_bias = weights.get("output_bias")
        if value_bias is not None:
            # Weights sum to one, so each head passes its bias on unchanged.
            through = jnp.einsum("hdv,hv->d", output, attention.of_heads(value_bias))
            output_bias = through if output_bias is None else output_bias + through
        attention_norm, mlp_norm = RMSNorm(weights["attention_norm"], epsilon), RMSNorm(weights["mlp_norm"], epsilon)
        mlp = SwiGLU(weights["gate"], weights["up"], weights["down"])
        return Block(attention_norm, attention, output_bias, mlp_norm, mlp)

    found, blocks = read_all_weights(stored, names, whole, of_layer, config.num_hidden_layers, block)
    table = jnp.asarray(found["token_embedding"])
    return Decoder(
        token_embedding=table,
        position_embedding=None,
        blocks=blocks,
        final_norm=RMSNorm(jnp.asarray(found["final_norm"]), epsilon),
        head=jnp.asarray(found["head"]) if "head" in found else table,
        context=config.max_position_embeddings,
    )
