"""Random models of a few thousand weights, written as Hugging Face folders by the tests themselves."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LLAMA = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 260,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}


def llama_weights(config, seed=0):
    rng = np.random.default_rng(seed)
    width, hidden, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    rows, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    weights = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        here = f"model.layers.{layer}."
        weights |= {
            f"{here}input_layernorm.weight": (width,),
            f"{here}post_attention_layernorm.weight": (width,),
            f"{here}self_attn.q_proj.weight": (rows, width),
            f"{here}self_attn.k_proj.weight": (keys, width),
            f"{here}self_attn.v_proj.weight": (keys, width),
            f"{here}self_attn.o_proj.weight": (width, rows),
            f"{here}mlp.gate_proj.weight": (hidden, width),
            f"{here}mlp.up_proj.weight": (hidden, width),
            f"{here}mlp.down_proj.weight": (width, hidden),
        }
        if config.get("attention_bias"):
            biases = {"q_proj": rows, "k_proj": keys, "v_proj": keys, "o_proj": width}
            weights |= {f"{here}self_attn.{name}.bias": (size,) for name, size in biases.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}


def gpt2_weights(config, seed=0):
    rng = np.random.default_rng(seed)
    width = config["n_embd"]
    weights = {"wte.weight": (config["vocab_size"], width), "wpe.weight": (config["n_positions"], width)}
    norms = ["ln_f"]
    for layer in range(config["n_layer"]):
        here = f"h.{layer}."
        norms += [f"{here}ln_1", f"{here}ln_2"]
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            weights |= {f"{here}{name}.weight": (rows, columns), f"{here}{name}.bias": (columns,)}
    for name in norms:
        weights |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}


def byte_tokenizer():
    """One token a byte, and four that no text uses."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"<unused{i}>" for i in range(4))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write(folder, config, weights):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
