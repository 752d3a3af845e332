"""Model folders and files that cannot be read right: one line, exit status 2, and nothing written."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.foreign_models import (
    LLAMA3,
    TEXT,
    added,
    body,
    cast,
    gpt2_folder,
    llama_folder,
    sharded,
    with_tokenizer,
)
from tests.helpers.gguf_files import FIELDS, byte_level, tensors, write_gguf
from tests.helpers.tiny_models import GPT2, LLAMA


def raw(name, content, make=llama_folder):
    """A folder with one file replaced."""

    def spoil(folder):
        (make(folder) / name).write_bytes(content)

    return spoil


def edited(name, change):
    """A folder with one JSON file changed."""

    def spoil(folder):
        llama_folder(folder)
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return spoil


def config(**changes):
    return edited("config.json", lambda values: values.update(changes))


def weights(change, changes=None):
    """A folder whose weights are changed after its configuration was made."""
    return lambda folder: llama_folder(folder, changes or {}, change)


def without(*names):
    return lambda found: {name: x for name, x in found.items() if name not in names}


def one(name, change):
    return lambda found: found | {name: change(found[name])}


def fp8(folder):
    """Eight-bit floating weights, which NumPy has no name for: int8 ones with another header."""
    weights(one(QUERY, lambda x: x.astype(np.int8)))(folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    told = content[8 : 8 + size].replace(b'"I8"', b'"F8_E4M3"')
    path.write_bytes(len(told).to_bytes(8, "little") + told + content[8 + size :])


def removed(name, make=llama_folder):
    return lambda folder: (make(folder) / name).unlink()


QUERY = "model.layers.0.self_attn.q_proj.weight"
AWQ = {name: np.ones((8, 2), np.int32) for name in (QUERY.replace("weight", x) for x in ("qweight", "qzeros"))}
HUGE = b'{"a":' * 100_000
REFUSED = {
    "no config": (removed("config.json"), "config.json cannot be read"),
    "config cut off": (raw("config.json", b'{"model_type": "ll'), "config.json is not JSON"),
    "config in UTF-16": (raw("config.json", json.dumps(LLAMA).encode("utf-16")), "is not JSON"),
    "config nested without end": (raw("config.json", HUGE), "is not JSON"),
    "config is a list": (raw("config.json", b"[1]"), "Expected `object`, got `array`"),
    "config without a type": (raw("config.json", b"{}"), "missing required field `model_type`"),
    "type is a list": (config(model_type=["llama"]), "Expected `str`, got `array` - at `$.model_type`"),
    "another type": (config(model_type="mamba"), "is of type 'mamba'; supported are llama, mistral, gpt2"),
    "quantization_config": (
        config(quantization_config={"quant_method": "awq", "bits": 4}),
        "has a quantization_config; quantised weights are not read",
    ),
    "heads in words": (config(num_attention_heads="4"), "Expected `int`, got `str` - at `$.num_attention_heads`"),
    "heads with a point": (config(num_attention_heads=4.0), "Expected `int`, got `float`"),
    "heads are true": (config(num_attention_heads=True), "Expected `int`, got `bool`"),
    "no heads": (config(num_attention_heads=0), "Expected `int` >= 1"),
    "huge number of layers": (config(num_hidden_layers=10**30), "no model.layers.2.input_layernorm.weight"),
    "huge epsilon": (config(rms_norm_eps=1e300), "Expected `float` < 1e+38"),
    "negative epsilon": (config(rms_norm_eps=-1e-5), "Expected `float` > 0.0 - at `$.rms_norm_eps`"),
    "infinite base": (
        raw("config.json", json.dumps(LLAMA | {"rope_theta": 1}).replace(": 1,", ": 1e999,").encode()),
        "out of range",
    ),
    "base is null": (config(rope_theta=None), "Expected `float`, got `null` - at `$.rope_theta`"),
    "scaling in words": (config(rope_scaling="linear"), "Expected `object | null`, got `str` - at `$.rope_scaling`"),
    "factor in words": (
        config(rope_scaling={"type": "linear", "factor": "4"}),
        "got `str` - at `$.rope_scaling.factor`",
    ),
    "factor is null": (
        config(rope_scaling={"type": "linear", "factor": None}),
        "got `null` - at `$.rope_scaling.factor`",
    ),
    "linear without factor": (config(rope_scaling={"rope_type": "linear"}), "scaled without factor"),
    "llama3 without factor": (config(rope_scaling={"rope_type": "llama3"}), "scaled without factor"),
    "llama3 without bounds": (
        config(rope_scaling={"rope_type": "llama3", "factor": 2}),
        "scaled without low_freq_factor",
    ),
    "llama3 with bounds that meet": (
        config(rope_scaling=LLAMA3 | {"low_freq_factor": 4}),
        "is not below high_freq_factor",
    ),
    "yarn": (
        config(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        "rope_type = 'yarn'; only 'default' or 'linear'",
    ),
    "rotary positions of a part": (config(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5; only 1.0"),
    "rotary positions by layer": (
        config(rope_parameters={"full_attention": {}, "rope_type": {"a": 1}}),
        "got `object` - at `$.rope_parameters",
    ),
    "another activation": (config(hidden_act="gelu"), "hidden_act = 'gelu'; only 'silu' or 'swish' is supported"),
    "perceptrons with biases": (config(mlp_bias=True), "mlp_bias = True; only False"),
    "heads of odd size": (config(head_dim=3), "heads of size 3 have a coordinate without a pair"),
    "key heads that do not divide": (config(num_key_value_heads=3), "4 heads do not divide among 3 key heads"),
    "window of nothing": (
        config(model_type="mistral", sliding_window=0),
        "Expected `int` >= 1 - at `$.sliding_window`",
    ),
    "tied in words": (config(tie_word_embeddings="true"), "Expected `bool`, got `str`"),
    "adapter": (raw("adapter_config.json", b"{}"), "merge the adapter into the weights first"),
    "more tokens than embeddings": (
        config(vocab_size=9),
        "embed_tokens.weight has shape (260, 8), but its configuration asks for (9, 8)",
    ),
    "another width": (config(hidden_size=16), "embed_tokens.weight has shape (260, 8)"),
    "another head size": (config(head_dim=2), "layers.0.self_attn.q_proj.weight has shape"),
    "fewer layers than stored": (
        config(num_hidden_layers=1),
        "model.layers.1.input_layernorm.weight is stored, which",
    ),
    "more layers than stored": (config(num_hidden_layers=3), "no model.layers.2.input_layernorm.weight"),
    "biases that are not stored": (
        config(attention_bias=True),
        "no model.layers.0.self_attn.q_proj.bias",
    ),
    "biases that config does not tell of": (
        weights(added(**{QUERY.replace("weight", "bias"): np.ones(16, np.float32)})),
        "model.layers.0.self_attn.q_proj.bias is stored, which",
    ),
    "norms of queries": (
        weights(added(**{"model.layers.1.self_attn.q_norm.weight": np.ones(4, np.float32)})),
        "self_attn.q_norm.weight is stored, which",
    ),
    "scales beside int8": (
        weights(
            lambda w: w | {QUERY: w[QUERY].astype(np.int8), QUERY.replace("weight", "SCB"): np.ones(16, np.float32)}
        ),
        "q_proj.weight as I8; quantised weights are not read",
    ),
    "scales alone": (
        weights(added(**{QUERY.replace("weight", "SCB"): np.ones(16, np.float32)})),
        "q_proj.SCB is stored, which",
    ),
    "AWQ without a word of it": (weights(lambda w: without(QUERY)(w) | AWQ), "as I32; quantised weights are not read"),
    "eight bits, floating": (fp8, "q_proj.weight as F8_E4M3; quantised weights are not read"),
    "booleans": (weights(one(QUERY, lambda x: x > 0)), "q_proj.weight as BOOL"),
    "turned weights": (weights(one(QUERY, lambda x: x.T.copy())), "q_proj.weight has shape (8, 16)"),
    "weights of three axes": (
        weights(one(QUERY, lambda x: x.reshape(4, 4, 8))),
        "q_proj.weight has shape (4, 4, 8)",
    ),
    "not a number": (weights(one("model.norm.weight", lambda x: x * np.nan)), "norm.weight contains NaN or inf"),
    "infinite in float16": (
        weights(lambda w: cast(np.float16)(one(QUERY, lambda x: x * np.inf)(w))),
        "contains NaN or inf",
    ),
    "no norm": (weights(without("model.norm.weight")), "weights: no model.norm.weight"),
    "no head": (weights(without("lm_head.weight")), "a model without a language-model head"),
    "body": (weights(body), "a model without a language-model head"),
    "no embedding": (weights(without("model.embed_tokens.weight")), "no model.embed_tokens.weight"),
    "weights cut off": (
        lambda f: raw("model.safetensors", (llama_folder(f) / "model.safetensors").read_bytes()[:-100])(f),
        "not a whole safetensors",
    ),
    "weights zipped": (raw("model.safetensors", b"PK\3\4" * 40), "not a whole safetensors file"),
    "weights empty": (raw("model.safetensors", b""), "not a whole safetensors file"),
    "weights pickled": (
        lambda f: (llama_folder(f) / "model.safetensors").rename(f / "pytorch_model.bin"),
        "a pickled file that is not opened",
    ),
    "a part missing": (removed("model-1.safetensors", sharded), "model-1.safetensors is not a whole safetensors file"),
    "an index that leaves the folder": (
        lambda f: (sharded(f) / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        "names ../b.safetensors, which is not in the folder",
    ),
    "an index of numbers": (
        lambda f: (sharded(f) / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}'),
        "got `int` - at `$.weight_map",
    ),
    "a tensor in two parts": (
        lambda f: save_file(
            {"lm_head.weight": np.ones((260, 8), np.float32)} | load_file(sharded(f) / "model-0.safetensors"),
            f / "model-1.safetensors",
        ),
        "is in two files",
    ),
    "no tokenizer": (removed("tokenizer.json"), "tokenizer.json cannot be read as one of"),
    "tokenizer cut off": (raw("tokenizer.json", b'{"version": "1.0"'), "tokenizer.json cannot be read as one of"),
    "tokenizer is not UTF-8": (raw("tokenizer.json", b"\xff"), "tokenizer.json cannot be read"),
    "tokenizer of a larger model": (
        with_tokenizer(lambda t: t.add_tokens(["more"])),
        "has 261 tokens but the model 260",
    ),
    "tokenizer of a smaller model": (
        lambda f: llama_folder(f, {"vocab_size": 600}),
        "has 260 tokens but the model 600 embeddings",
    ),
    "begins with a token without an embedding": (
        edited(
            "tokenizer.json",
            lambda t: t.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "pair": [],
                    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [999], "tokens": ["<s>"]}},
                }
            ),
        ),
        "but the model has 260 embeddings",
    ),
    "gpt2 with scaled attention by layer": (
        lambda f: gpt2_folder(f, {"scale_attn_by_inverse_layer_idx": True}),
        "only False",
    ),
    "gpt2 without scaling": (
        lambda f: gpt2_folder(f, {"scale_attn_weights": False}),
        "scale_attn_weights = False; only True",
    ),
    "gpt2 with cross attention": (
        lambda f: gpt2_folder(f, {"add_cross_attention": True}),
        "add_cross_attention = True",
    ),
    "gpt2 with relu": (lambda f: gpt2_folder(f, {"activation_function": "relu"}), "activation_function = 'relu'"),
    "gpt2 with heads that do not divide": (lambda f: gpt2_folder(f, {"n_head": 3}), "does not divide into n_head = 3"),
    "gpt2 of another context": (
        lambda f: raw("config.json", json.dumps(GPT2 | {"n_positions": 16}).encode(), gpt2_folder)(f),
        "wpe.weight has shape (32, 8)",
    ),
    "gpt2 with its maps turned": (
        lambda f: gpt2_folder(f, change=one("h.0.attn.c_attn.weight", lambda x: x.T.copy())),
        "c_attn.weight has shape (24, 8)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_read_right_is_one_line(refused, tmp_path, case):
    spoil, word = REFUSED[case]
    spoil(tmp_path / "model")
    refused(tmp_path / "model", word)


def file(fields=None, weights=None, tokenizer=None, **more):
    return lambda path: write_gguf(path, FIELDS | (fields or {}), weights, byte_level() | (tokenizer or {}), **more)


def cut(kept):
    """A file that ends early."""

    def spoil(path):
        whole = write_gguf(path).read_bytes()
        path.write_bytes(whole[: int(kept * len(whole))])

    return spoil


LEFT = {name: x for name, x in tensors().items() if name != "output.weight"}
REFUSED_FILES = {
    "part of several": (file({"split.count": 3, "split.no": 0}, LEFT), "is part 1 of 3; merge the parts first"),
    "another architecture": (file(architecture="qwen2"), "has architecture 'qwen2'; only 'llama'"),
    "unknown setting": (file({"llama.attention.sliding_window": 4}), "unknown field `attention.sliding_window`"),
    "experts": (file({"llama.expert_count": 8}), "expert_count = 8; only 0 is supported"),
    "yarn": (file({"llama.rope.scaling.type": "yarn"}), "rope.scaling.type = 'yarn'; only 'linear' or 'none'"),
    "key heads that differ by layer": (
        file({"llama.attention.head_count_kv": [2, 1]}),
        "head_count_kv = [2, 1]; only",
    ),
    "context in words": (file({"llama.context_length": "32"}), "Expected `int`, got `str` - at `$.context_length`"),
    "no context": (file({"llama.context_length": None}), "missing required field `context_length`"),
    "no heads": (file({"llama.attention.head_count": 0}), "Expected `int` >= 1"),
    "infinite base": (file({"llama.rope.freq_base": np.inf}), "Expected `float` < 1e+38 - at `$.rope.freq_base`"),
    "infinite factor": (file({"llama.rope.scaling.factor": np.inf}), "`$.rope.scaling.factor`"),
    "rotary positions wider than a head": (
        file({"llama.rope.dimension_count": 6}),
        "rope.dimension_count is 6 for heads of size 4",
    ),
    "values of another size": (file({"llama.attention.value_length": 2}), "value_length = 2; only None or 4"),
    "another width": (file({"llama.embedding_length": 16}), "token_embd.weight has shape (260, 8)"),
    "other rows": (file({"llama.vocab_size": 300}), "token_embd.weight has shape (260, 8)"),
    "factors of another count": (
        file(weights=tensors() | {"rope_freqs.weight": np.ones(3, np.float32)}),
        "rope_freqs.weight has shape (3,)",
    ),
    "unread tensor": (
        file(weights=tensors() | {"blk.0.attn_q_norm.weight": np.ones(4, np.float32)}),
        "blk.0.attn_q_norm.weight is stored, which",
    ),
    "tensor missing": (
        file(weights={k: x for k, x in tensors().items() if "ffn_up" not in k}),
        "no blk.0.ffn_up.weight",
    ),
    "integers": (
        file(weights=tensors() | {"output.weight": np.ones((260, 8), np.int8)}),
        "output.weight cannot be dequantised",
    ),
    "another tokenizer": (
        file(tokenizer={"pre": "tekken"}),
        "of kind 'gpt2', 'tekken'; supported are llama (SentencePiece)",
    ),
    "tokenizer of word pieces": (file(tokenizer={"model": "bert"}), "of kind 'bert'"),
    "types of some tokens": (file(tokenizer={"token_type": [1, 1]}), "tokens and token_type are not one of each"),
    "merges of other tokens": (file(tokenizer={"merges": ["a zz"]}), "merges 'a' and 'zz', which are not all tokens"),
    "SentencePiece without scores": (file(tokenizer={"model": "llama"}), "scores are not one for every token"),
    "begins with no token": (
        file(tokenizer={"add_bos_token": True}),
        "bos is added to a text, but bos_token_id = None",
    ),
    "empty": (lambda path: path.write_bytes(b""), "is not a whole GGUF file"),
    "zipped": (lambda path: path.write_bytes(b"PK\3\4 something else"), "is not a whole GGUF file"),
    "cut off after its first bytes": (lambda path: path.write_bytes(b"GGUF\3\0\0\0"), "is not a whole GGUF file"),
    "cut off in the middle": (cut(0.5), "is not a whole GGUF file"),
    "cut off near the end": (cut(0.9), "is not a whole GGUF file"),
    "begins with a token beyond": (file(tokenizer={"add_bos_token": True, "bos_token_id": 999}), "bos_token_id = 999"),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_a_gguf_file_that_cannot_be_read_right_is_one_line(refused, tmp_path, case):
    make, word = REFUSED_FILES[case]
    make(tmp_path / "model.gguf")
    refused(tmp_path / "model.gguf", word)


@pytest.mark.slow
def test_an_output_that_cannot_be_encoded_in_a_process_of_its_own(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    model, out = llama_folder(tmp_path / "good"), tmp_path / "Łódź"
    given = ["--model", str(model), "--text", str(tmp_path / "text.txt"), "--out", str(out), "--rows", "8"]
    command = [sys.executable, "-m", "prob_transformer", "inspect", *given]
    environment = {"PYTHONIOENCODING": "cp1252", "PATH": ""}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?\xf3d?" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["inspect.html", "inspect.nc"]
