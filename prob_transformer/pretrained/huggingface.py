"""Decoders from a Hugging Face folder on disk: config.json, safetensors weights and tokenizer.json.

The Llama family (model types llama and mistral) and the GPT-2 family (gpt2) are read. Nothing is downloaded.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from prob_transformer.logits import Rotary
from prob_transformer.pretrained.config import Gpt2Config, LlamaConfig, read_config
from prob_transformer.pretrained.gpt2 import Gpt2Shape, gpt2
from prob_transformer.pretrained.llama import LlamaShape, llama
from prob_transformer.pretrained.model import Decoder
from prob_transformer.pretrained.safetensors_folder import Tensors
from prob_transformer.pretrained.tokenizer import read_tokenizer, require_match

_HEAD = "lm_head.weight"
_LLAMA_NAMES = {
    "token_embedding": "embed_tokens.weight",
    "final_norm": "norm.weight",
    "attention_norm": "layers.{}.input_layernorm.weight",
    "query": "layers.{}.self_attn.q_proj.weight",
    "key": "layers.{}.self_attn.k_proj.weight",
    "value": "layers.{}.self_attn.v_proj.weight",
    "output": "layers.{}.self_attn.o_proj.weight",
    "perceptron_norm": "layers.{}.post_attention_layernorm.weight",
    "gate": "layers.{}.mlp.gate_proj.weight",
    "up": "layers.{}.mlp.up_proj.weight",
    "down": "layers.{}.mlp.down_proj.weight",
}
_BIASES = {
    "query_bias": "layers.{}.self_attn.q_proj.bias",
    "key_bias": "layers.{}.self_attn.k_proj.bias",
    "value_bias": "layers.{}.self_attn.v_proj.bias",
    "output_bias": "layers.{}.self_attn.o_proj.bias",
}


def _require_head(folder: Path, tensors: Tensors, tied: bool) -> None:
    if not tied and tensors.outside(_HEAD) is None:
        raise ValueError(
            f"weights: {folder} has no {_HEAD}, and its config.json does not tie one to the embeddings: it holds a "
            "model without a language-model head; save it from AutoModelForCausalLM."
        )


def _embedding(tensors: Tensors, name: str, tied: bool) -> np.ndarray | None:
    """Of two tied matrices either may be the one that is stored."""
    found = tensors(name)
    return tensors.outside(_HEAD) if found is None and tied else found


def _llama(folder: Path, config: LlamaConfig) -> Decoder:
    tensors = Tensors(folder, "model.")
    _require_head(folder, tensors, config.tie_word_embeddings)
    shape = LlamaShape(
        tokens=config.vocab_size,
        width=config.hidden_size,
        hidden=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        key_heads=config.key_heads,
        head_size=config.head_size,
        context=config.max_position_embeddings,
        epsilon=config.rms_norm_eps,
        window=config.window,
    )

    def weight(name: str, layer: int | None = None) -> np.ndarray | None:
        if name == "head":
            return tensors.outside(_HEAD)
        if name == "token_embedding":
            return _embedding(tensors, _LLAMA_NAMES[name], config.tie_word_embeddings)
        if name in _LLAMA_NAMES:
            return tensors(_LLAMA_NAMES[name].format(layer))
        if not config.attention_bias:
            return None
        stored = _BIASES[name].format(layer)
        found = tensors(stored)
        if found is None:
            raise ValueError(f"weights: no {stored}, but config.json gives attention_bias = true; save them again.")
        return found

    decoder = llama(shape, weight, Rotary(jnp.asarray(config.frequencies(), jnp.float32)))
    tensors.require_all_read()
    return decoder


def _gpt2(folder: Path, config: Gpt2Config) -> Decoder:
    tensors = Tensors(folder, "transformer.")
    _require_head(folder, tensors, config.tie_word_embeddings)
    shape = Gpt2Shape(
        tokens=config.vocab_size,
        width=config.n_embd,
        hidden=4 * config.n_embd if config.n_inner is None else config.n_inner,
        layers=config.n_layer,
        heads=config.n_head,
        context=config.n_positions,
        epsilon=config.layer_norm_epsilon,
        approximate=config.activation_function != "gelu",
    )

    def weight(name: str) -> np.ndarray | None:
        if name == _HEAD:
            return tensors.outside(name)
        return _embedding(tensors, name, config.tie_word_embeddings) if name == "wte.weight" else tensors(name)

    decoder = gpt2(shape, weight)
    tensors.require_all_read()
    return decoder


def read_folder(folder: Path | str) -> tuple[Decoder, Tokenizer]:
    """Decoder in float32 and tokenizer of a Hugging Face folder of the Llama or GPT-2 family.

    Raises ValueError for a folder that is not whole, weights that do not fit their config.json, a tokenizer that does
    not fit the weights, and architectures that are not supported.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"model: {folder} has an adapter_config.json; merge the adapter into the weights first.")
    decoder = _gpt2(folder, config) if isinstance(config, Gpt2Config) else _llama(folder, config)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    require_match(tokenizer, config.vocab_size)
    return decoder, tokenizer
