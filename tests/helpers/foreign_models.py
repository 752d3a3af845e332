"""Tiny model folders as other programs write them, and what transformers makes of each (make_foreign.py).

`FOLDERS` has functions that write a folder; nothing here needs JAX, which the program that makes the truth lacks.
"""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, processors

from tests.helpers.tiny_models import GPT2, LLAMA, byte_tokenizer, gpt2_weights, llama_weights, write

TEXT = "Łódź, 19 no."
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TIED = LLAMA | {"tie_word_embeddings": True}

Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def _same(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return weights


def llama_folder(folder: Path, changes: dict = {}, change: Change = _same, without: tuple[str, ...] = ()) -> Path:  # noqa: B006
    config = {name: x for name, x in (LLAMA | changes).items() if name not in without}
    return write(folder, config, change(llama_weights(LLAMA | changes)))


def gpt2_folder(folder: Path, changes: dict = {}, change: Change = _same) -> Path:  # noqa: B006
    return write(folder, GPT2 | changes, change(gpt2_weights(GPT2 | changes)))


def cast(dtype) -> Change:
    return lambda weights: {name: x.astype(dtype) for name, x in weights.items()}


def added(**more: np.ndarray) -> Change:
    return lambda weights: weights | more


def prefixed(prefix: str) -> Change:
    return lambda weights: {prefix + name: x for name, x in weights.items()}


def body(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is saved of a model without its head."""
    return {name.removeprefix("model."): x for name, x in weights.items() if name != "lm_head.weight"}


def head_only(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The one matrix of two tied ones, stored as the head."""
    return {"lm_head.weight" if name == "model.embed_tokens.weight" else name: x for name, x in weights.items()}


def sharded(folder: Path) -> Path:
    llama_folder(folder)
    (folder / "model.safetensors").unlink()
    weights = llama_weights(LLAMA)
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(where.values()):
        save_file({name: x for name, x in weights.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def stale_index(folder: Path) -> Path:
    llama_folder(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    return folder


def with_tokenizer(change: Callable[[Tokenizer], object], **changes: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        llama_folder(folder, changes)
        tokenizer = byte_tokenizer()
        change(tokenizer)
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return make


def ends(template: str) -> Callable[[Tokenizer], object]:
    def change(tokenizer: Tokenizer) -> None:
        special = [(name, tokenizer.token_to_id(name)) for name in ("<unused0>", "<unused1>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)

    return change


def _dropout(tokenizer: Tokenizer) -> None:
    tokenizer.model.dropout = 0.0


_BUFFERS = {f"h.{layer}.attn.bias": np.ones((1, 1, 32, 32), np.uint8) for layer in range(2)}


def _narrow_inner(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Perceptrons of hidden width 12 in place of 32."""
    cut = dict(weights)
    for layer in range(2):
        here = f"h.{layer}.mlp."
        cut[f"{here}c_fc.weight"] = weights[f"{here}c_fc.weight"][:, :12].copy()
        cut[f"{here}c_fc.bias"] = weights[f"{here}c_fc.bias"][:12].copy()
        cut[f"{here}c_proj.weight"] = weights[f"{here}c_proj.weight"][:12].copy()
    return cut


def _frequencies(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return weights | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(2)}


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "llama": llama_folder,
    "unknown keys": lambda f: llama_folder(f, {"torch_dtype": "float32", "use_cache": False, "my_note": [1, {}]}),
    "defaults": lambda f: llama_folder(
        f, {"num_key_value_heads": 4}, without=("num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act")
    ),
    "head size from the width": lambda f: llama_folder(
        f, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}, without=("head_dim",)
    ),
    "swish": lambda f: llama_folder(f, {"hidden_act": "swish"}),
    "attention biases": lambda f: llama_folder(f, {"attention_bias": True}),
    "mistral": lambda f: llama_folder(f, {"model_type": "mistral", "sliding_window": 3}),
    "mistral without a window": lambda f: llama_folder(f, {"model_type": "mistral", "sliding_window": None}),
    "linear": lambda f: llama_folder(f, {"rope_scaling": {"type": "linear", "factor": 2}}),
    "llama3": lambda f: llama_folder(f, {"rope_scaling": LLAMA3}),
    "llama3 with its context": lambda f: llama_folder(
        f, {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}}
    ),
    "rope_parameters": lambda f: llama_folder(
        f, {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}, without=("rope_theta",)
    ),
    "rope_parameters beside rope_scaling": lambda f: llama_folder(
        f, {"rope_parameters": LLAMA3, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    ),
    "tied": lambda f: llama_folder(f, TIED),
    "tied, both stored": lambda f: llama_folder(
        f, TIED, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].copy()}
    ),
    "tied, another head stored": lambda f: llama_folder(
        f, TIED, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1}
    ),
    "tied, stored as head": lambda f: llama_folder(f, TIED, head_only),
    "tied body": lambda f: llama_folder(f, TIED, body),
    "old buffers": lambda f: llama_folder(f, change=_frequencies),
    "bfloat16": lambda f: llama_folder(f, change=cast(ml_dtypes.bfloat16)),
    "float16": lambda f: llama_folder(f, change=cast(np.float16)),
    "float64": lambda f: llama_folder(f, change=cast(np.float64)),
    "sharded": sharded,
    "one file beside an index": stale_index,
    "spare rows": lambda f: llama_folder(f, {"vocab_size": 500}),
    "truncation": with_tokenizer(lambda t: t.enable_truncation(4)),
    "padding": with_tokenizer(lambda t: t.enable_padding(length=24, pad_id=257)),
    "dropout": with_tokenizer(_dropout),
    "begin of text": with_tokenizer(ends("<unused0> $A")),
    "begin and end of text": with_tokenizer(ends("<unused0> $A <unused1>")),
    "end of text": with_tokenizer(ends("$A <unused1>")),
    "gpt2": gpt2_folder,
    "gpt2 with its head": lambda f: gpt2_folder(f, change=prefixed("transformer.")),
    "gpt2, exact gelu": lambda f: gpt2_folder(f, {"activation_function": "gelu"}),
    "gpt2, causal masks": lambda f: gpt2_folder(f, change=added(**_BUFFERS)),
    "gpt2, narrow": lambda f: gpt2_folder(f, {"n_inner": 12}, _narrow_inner),
    "gpt2, own head": lambda f: gpt2_folder(
        f,
        {"tie_word_embeddings": False},
        lambda w: prefixed("transformer.")(w) | {"lm_head.weight": w["wte.weight"][::-1].copy()},
    ),
}
