"""Decoders from a Hugging Face folder on disk: config.json, safetensors weights and tokenizer.json.

The Llama family (model types llama and mistral) and the GPT-2 family (gpt2) are read. Nothing is downloaded.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgspec
from tokenizers import Tokenizer

from prob_transformer.logits import Rotary
from prob_transformer.pretrained.config_fields import read_json
from prob_transformer.pretrained.decoder import Decoder
from prob_transformer.pretrained.gpt2 import Gpt2Config, gpt2_decoder
from prob_transformer.pretrained.llama import LlamaConfig, MistralConfig, llama_decoder
from prob_transformer.pretrained.weights import open_safetensors

_HEAD = "lm_head.weight"
_LLAMA_NAMES = {
    "token_embedding": "embed_tokens.weight",
    "final_norm": "norm.weight",
    "attention_norm": "layers.{}.input_layernorm.weight",
    "query": "layers.{}.self_attn.q_proj.weight",
    "key": "layers.{}.self_attn.k_proj.weight",
    "value": "layers.{}.self_attn.v_proj.weight",
    "output": "layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "layers.{}.post_attention_layernorm.weight",
    "gate": "layers.{}.mlp.gate_proj.weight",
    "up": "layers.{}.mlp.up_proj.weight",
    "down": "layers.{}.mlp.down_proj.weight",
}
_LLAMA_BIASES = {
    "query_bias": "layers.{}.self_attn.q_proj.bias",
    "key_bias": "layers.{}.self_attn.k_proj.bias",
    "value_bias": "layers.{}.self_attn.v_proj.bias",
    "output_bias": "layers.{}.self_attn.o_proj.bias",
}


class _Kind(msgspec.Struct):
    model_type: str
    quantization_config: Any = None
    is_encoder_decoder: bool = False


_CONFIGS: dict[str, type[LlamaConfig | Gpt2Config]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "gpt2": Gpt2Config,
}


def _read_config(path: Path) -> LlamaConfig | Gpt2Config:
    remedy = "pass a Hugging Face folder with config.json, model.safetensors and tokenizer.json of a supported model"
    kind = read_json(path, _Kind, remedy)
    if kind.model_type not in _CONFIGS:
        raise ValueError(f"model: {path} is of type {kind.model_type!r}; supported are {', '.join(_CONFIGS)}.")
    if kind.quantization_config is not None:
        raise ValueError(
            f"model: {path} has a quantization_config; quantised weights are not read: save the model in float32, "
            "float16 or bfloat16."
        )
    if kind.is_encoder_decoder:
        raise ValueError(f"model: {path} gives is_encoder_decoder = true; pass a model that is a decoder alone.")
    return read_json(path, _CONFIGS[kind.model_type], remedy)


def _read_tokenizer(path: Path) -> Tokenizer:
    """Cuts whole texts and always alike: what was saved of truncation, padding and dropout in training is off."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises plain Exception, for a file that is missing as for one that it cannot parse.
    except Exception as error:
        raise ValueError(
            f"tokenizer: {path} cannot be read as one of the tokenizers library ({error}); save it there anew."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def read_folder(folder: Path | str) -> tuple[Decoder, Tokenizer]:
    """Decoder in float32 and tokenizer of a Hugging Face folder of the Llama or GPT-2 family.

    Raises ValueError for a folder that is not whole, weights that do not fit their config.json, and architectures that
    are not supported.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"model: {folder} has an adapter_config.json; merge the adapter into the weights first.")
    stored = open_safetensors(folder)
    body, embedding = (
        ("transformer.", "wte.weight") if isinstance(config, Gpt2Config) else ("model.", "embed_tokens.weight")
    )
    # A body saved without its head has no prefix.
    prefix = body if any(name.startswith(body) for name in stored) else ""
    if not config.tie_word_embeddings and _HEAD not in stored:
        raise ValueError(
            f"weights: {folder} has no {_HEAD}, and its config.json does not tie one to the embeddings: it holds a "
            "model without a language-model head; save it from AutoModelForCausalLM."
        )
    if _HEAD in stored and config.tie_word_embeddings and prefix + embedding not in stored:
        # Of two tied matrices either may be the one that is stored.
        stored[prefix + embedding] = stored.pop(_HEAD)
    head = {"head": _HEAD} if _HEAD in stored else {}
    if isinstance(config, Gpt2Config):
        decoder = gpt2_decoder(config, stored, prefix, head)
    else:
        names = _LLAMA_NAMES | (_LLAMA_BIASES if config.attention_bias else {})
        names = {name: prefix + own for name, own in names.items()} | head
        decoder = llama_decoder(config, stored, names, Rotary(jnp.asarray(config.frequencies(), jnp.float32)))
    return decoder, _read_tokenizer(folder / "tokenizer.json")
