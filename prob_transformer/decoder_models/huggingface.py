"""Decoders from a Hugging Face folder on disk: config.json, safetensors weights and tokenizer.json.

The Llama family (model types llama and mistral) and the GPT-2 family (gpt2) are read. Weights in pickled files are
refused: opening one runs whatever it holds. Nothing is downloaded.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from prob_transformer.decoder import Rotary
from prob_transformer.decoder_models.gpt2 import Gpt2Shape, gpt2
from prob_transformer.decoder_models.llama import LlamaShape, llama
from prob_transformer.decoder_models.model import Decoder
from prob_transformer.decoder_models.tokenizer import read_tokenizer, require_match

_LLAMA_NAMES = {
    "token_embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "query": "model.layers.{}.self_attn.q_proj.weight",
    "key": "model.layers.{}.self_attn.k_proj.weight",
    "value": "model.layers.{}.self_attn.v_proj.weight",
    "output": "model.layers.{}.self_attn.o_proj.weight",
    "query_bias": "model.layers.{}.self_attn.q_proj.bias",
    "key_bias": "model.layers.{}.self_attn.k_proj.bias",
    "value_bias": "model.layers.{}.self_attn.v_proj.bias",
    "output_bias": "model.layers.{}.self_attn.o_proj.bias",
    "perceptron_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}


class _Config:
    """config.json by key; what is missing or of another kind is named."""

    def __init__(self, path: Path):
        self.path = path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"model: {path} cannot be read ({error.strerror}); pass a Hugging Face folder with config.json, "
                "model.safetensors and tokenizer.json."
            ) from None
        except ValueError as error:
            raise ValueError(f"model: {path} is not JSON ({error}); copy the model folder again.") from None
        if not isinstance(values, dict):
            raise ValueError(f"model: {path} holds no JSON object; copy the model folder again.")
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"model: {self.path} gives {key} = {value!r}; it must be a number above 0.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int):
            raise ValueError(f"model: {self.path} gives {key} = {value!r}; it must be an integer.")
        return value

    def require(self, key: str, value: Any, default: Any) -> None:
        """Refuses what the decoder here does not compute."""
        if self.get(key, default) != value:
            raise ValueError(f"model: {self.path} gives {key} = {self.get(key)!r}; only {value!r} is supported.")


def _frequencies(config: _Config, head_size: int) -> np.ndarray:
    """Rotary frequencies in radians a position, with the scalings "linear" and "llama3" of long-context models."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    frequencies = float(base) ** (-np.arange(0, head_size, 2) / head_size)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "llama3":
        trained = rope["original_max_position_embeddings"]
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        turns = trained * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / factor)
    raise ValueError(
        f"model: {config.path} scales rotary positions by {kind!r}; only 'linear' and 'llama3' are supported."
    )


def _safetensors(folder: Path) -> Callable[[str], np.ndarray | None]:
    """Reads a tensor by its stored name, None if there is none, from one file or from several with an index."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = [single]
    if index.is_file():
        try:
            files = sorted(
                {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"weights: {index} is not an index of safetensors; copy the model folder again.") from None
    elif not single.is_file():
        pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
        why = f"only {pickled[0]}, a pickled file that is not opened" if pickled else "none"
        raise ValueError(f"weights: {folder} has no model.safetensors ({why}); save the model as safetensors.")
    where = {}
    for path in files:
        try:
            opened = safe_open(path, framework="flax")
            where.update(dict.fromkeys(opened.keys(), opened))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"weights: {path} is not a whole safetensors file ({error}); copy it again.") from None

    def tensor(name: str) -> np.ndarray | None:
        return np.asarray(where[name].get_tensor(name), np.float32) if name in where else None

    return tensor


def _llama(config: _Config, tensor: Callable[[str], np.ndarray | None]) -> Decoder:
    config.require("hidden_act", "silu", "silu")
    config.require("mlp_bias", False, False)
    heads = config.count("num_attention_heads")
    size = config.count("head_dim", config.count("hidden_size") // heads)
    shape = LlamaShape(
        layers=config.count("num_hidden_layers"),
        heads=heads,
        key_heads=config.count("num_key_value_heads", heads),
        head_size=size,
        context=config.count("max_position_embeddings"),
        epsilon=config.number("rms_norm_eps", 1e-6),
        window=config.get("sliding_window") if config.get("model_type") == "mistral" else None,
    )
    tied = config.get("tie_word_embeddings", False)

    def weight(name: str, layer: int | None = None) -> np.ndarray | None:
        return None if name == "head" and tied else tensor(_LLAMA_NAMES[name].format(layer))

    if not tied and weight("head") is None:
        raise ValueError(
            "weights: no lm_head.weight, and config.json does not tie it to the embeddings; copy it again."
        )
    return llama(shape, weight, Rotary(jnp.asarray(_frequencies(config, size), jnp.float32)))


def _gpt2(config: _Config, tensor: Callable[[str], np.ndarray | None]) -> Decoder:
    config.require("scale_attn_weights", True, True)
    config.require("scale_attn_by_inverse_layer_idx", False, False)
    activation = config.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh", "gelu"):
        raise ValueError(f"model: {config.path} gives activation_function = {activation!r}; only gelu is supported.")
    shape = Gpt2Shape(
        layers=config.count("n_layer"),
        heads=config.count("n_head"),
        epsilon=config.number("layer_norm_epsilon", 1e-5),
        approximate=activation != "gelu",
    )
    tied = config.get("tie_word_embeddings", True)

    def weight(name: str) -> np.ndarray | None:
        if name == "lm_head.weight":
            return None if tied else tensor(name)
        # Saved with the language-model head, the names of the body have a prefix.
        found = tensor(name)
        return tensor(f"transformer.{name}") if found is None else found

    return gpt2(shape, weight)


_FAMILIES: dict[str, Callable[[_Config, Callable[[str], np.ndarray | None]], Decoder]] = {
    "llama": _llama,
    "mistral": _llama,
    "gpt2": _gpt2,
}


def read_folder(folder: Path | str) -> tuple[Decoder, Tokenizer]:
    """Decoder in float32 and tokenizer of a Hugging Face folder of the Llama or GPT-2 family.

    Raises ValueError for a folder that is not whole, weights that do not fit their config.json, a tokenizer that does
    not fit the weights, and architectures that are not supported.
    """
    folder = Path(folder)
    config = _Config(folder / "config.json")
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"model: {folder} is of type {family!r}; supported are {', '.join(_FAMILIES)}.")
    decoder = _FAMILIES[family](config, _safetensors(folder))
    rows = decoder.token_embedding.shape[0]
    if config.get("vocab_size", rows) != rows:
        raise ValueError(f"weights: {rows} embeddings, but config.json gives vocab_size = {config.get('vocab_size')}.")
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    require_match(tokenizer, rows)
    return decoder, tokenizer
