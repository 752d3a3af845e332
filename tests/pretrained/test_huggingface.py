import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file as save_jax
from safetensors.numpy import save_file
from scipy.special import erf, softmax

from prob_transformer import decoder_margins
from prob_transformer.pretrained.huggingface import read_folder
from prob_transformer.pretrained.tokenizer import encode
from tests.support.tiny_models import GPT2, LLAMA, gpt2_weights, llama_weights, write

TOKENS = np.array([5, 250, 17, 17, 99, 0, 42])


def attended(queries, keys, values, window):
    """Heads (n, H, p) over all s <= i, or the last `window` of them, with a loop."""
    out = np.zeros((len(queries), queries.shape[1], values.shape[2]))
    for i in range(len(queries)):
        first = 0 if window is None else max(0, i - window + 1)
        for h in range(queries.shape[1]):
            group = h * keys.shape[1] // queries.shape[1]
            logits = keys[first : i + 1, group] @ queries[i, h] / np.sqrt(queries.shape[2])
            out[i, h] = softmax(logits) @ values[first : i + 1, group]
    return out


def llama_by_hand(config, w, tokens, frequencies):
    """Rotary positions as multiplication of complex numbers, half-split; everything in float64 with NumPy."""
    w = {name: x.astype(np.float64) for name, x in w.items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[name]

    def turned(x):
        half = x.shape[-1] // 2
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
        return np.concatenate([z.real, z.imag], -1)

    stream = w["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        here, size = f"model.layers.{layer}.", config["head_dim"]

        def project(x, name, here=here, size=size):
            bias = w.get(f"{here}self_attn.{name}_proj.bias", 0)
            return (x @ w[f"{here}self_attn.{name}_proj.weight"].T + bias).reshape(len(x), -1, size)

        x = norm(stream, here + "input_layernorm.weight")
        heads = attended(
            turned(project(x, "q")), turned(project(x, "k")), project(x, "v"), config.get("sliding_window")
        )
        stream = stream + project(heads.reshape(len(x), -1), "o").reshape(len(x), -1)
        x = norm(stream, here + "post_attention_layernorm.weight")
        gate = x @ w[here + "mlp.gate_proj.weight"].T
        stream = stream + (gate / (1 + np.exp(-gate)) * (x @ w[here + "mlp.up_proj.weight"].T)) @ (
            w[here + "mlp.down_proj.weight"].T
        )
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(stream, "model.norm.weight") @ w[head].T


def gpt2_by_hand(config, w, tokens):
    w = {name: x.astype(np.float64) for name, x in w.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config["layer_norm_epsilon"])
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def gelu(x):
        if config["activation_function"] == "gelu":
            return x * (1 + erf(x / np.sqrt(2))) / 2
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    stream = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for layer in range(config["n_layer"]):
        here = f"h.{layer}."
        parts = np.split(linear(norm(stream, here + "ln_1"), here + "attn.c_attn"), 3, axis=1)
        heads = attended(*(part.reshape(len(tokens), config["n_head"], -1) for part in parts), None)
        stream = stream + linear(heads.reshape(len(tokens), -1), here + "attn.c_proj")
        hidden = gelu(linear(norm(stream, here + "ln_2"), here + "mlp.c_fc"))
        stream = stream + linear(hidden, here + "mlp.c_proj")
    return norm(stream, "ln_f") @ w["wte.weight"].T


def plain_frequencies(config):
    return config["rope_theta"] ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True},
        {"model_type": "mistral", "sliding_window": 3},
    ],
)
def test_llama_logits_equal_those_written_out_by_hand(tmp_path, changes):
    config = LLAMA | changes
    weights = llama_weights(config)
    decoder, _ = read_folder(write(tmp_path, config, weights))
    same(decoder(TOKENS), llama_by_hand(config, weights, TOKENS, plain_frequencies(config)))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_gpt2_logits_equal_those_written_out_by_hand(tmp_path, activation):
    config = GPT2 | {"activation_function": activation}
    weights = gpt2_weights(config)
    prefixed = {f"transformer.{name}": x for name, x in weights.items()} if activation == "gelu" else weights
    decoder, _ = read_folder(write(tmp_path, config, prefixed))
    same(decoder(TOKENS), gpt2_by_hand(config, weights, TOKENS))


def test_scaled_rotary_positions_follow_their_published_rules(tmp_path):
    # Wavelengths 2 pi / frequency: below 32 / 4 kept, above 32 / 1 divided by the factor, blended between.
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 32
    config = LLAMA | {"head_dim": 8, "rope_theta": 500.0}
    weights = llama_weights(config)
    plain = plain_frequencies(config)
    wavelengths = 2 * np.pi / plain
    assert (wavelengths < 8).any()
    assert ((wavelengths > 8) & (wavelengths < 32)).any()
    assert (wavelengths > 32).any()
    blend = (32 / wavelengths - 1) / 3
    scaled = np.where(wavelengths > 32, plain / 8, (1 - blend) * plain / 8 + blend * plain)
    scaled = np.where(wavelengths < 8, plain, scaled)
    for scaling, frequencies in ((llama3, scaled), ({"type": "linear", "factor": 2.0}, plain / 2)):
        decoder, _ = read_folder(write(tmp_path, config | {"rope_scaling": scaling}, weights))
        same(decoder(TOKENS), llama_by_hand(config, weights, TOKENS, frequencies))


def test_weights_in_several_files_and_in_bfloat16_are_read(tmp_path):
    weights = llama_weights(LLAMA)
    whole, _ = read_folder(write(tmp_path / "whole", LLAMA, weights))
    folder = write(tmp_path / "parts", LLAMA, weights)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: weights[name] for name in part}, folder / f"part{number}.safetensors")
    index = {name: f"part{number}.safetensors" for number, part in enumerate((names[:5], names[5:])) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    parts, _ = read_folder(folder)
    np.testing.assert_array_equal(parts(TOKENS), whole(TOKENS))
    narrow = {name: jnp.asarray(x, jnp.bfloat16) for name, x in weights.items()}
    save_jax(narrow, folder / "part0.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "part0.safetensors")})
    )
    rounded, _ = read_folder(folder)
    exact = {name: np.asarray(x, np.float32) for name, x in narrow.items()}
    same(rounded(TOKENS), llama_by_hand(LLAMA, exact, TOKENS, plain_frequencies(LLAMA)))


def test_each_layer_is_handed_out_with_its_inputs_and_has_margins(tmp_path):
    decoder, tokenizer = read_folder(write(tmp_path, LLAMA, llama_weights(LLAMA)))
    tokens = encode(tokenizer, "Two words.")
    assert tokenizer.decode(tokens.tolist()) == "Two words."
    found = list(decoder_margins(decoder.layers(tokens)))
    assert [layer.sign.shape for layer in found] == [(4, 10)] * 2
    _, inputs = next(decoder.layers(tokens))
    embedded = np.asarray(decoder.token_embedding)[tokens]
    size = np.sqrt(np.square(embedded).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(inputs, embedded / size * np.asarray(decoder.blocks[0].attention_norm.gain), rtol=1e-5)


def test_tokens_beyond_the_context_are_refused(tmp_path):
    decoder, _ = read_folder(write(tmp_path / "model", LLAMA, llama_weights(LLAMA)))
    with pytest.raises(ValueError, match="33 do not fit the context of 32; pass a shorter text"):
        decoder(np.zeros(33, int))
