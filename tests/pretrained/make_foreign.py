"""Makes foreign.npz and tokenizers.json, which the tests compare with: numbers of transformers and SentencePiece.

In an environment of its own, from the root of a clone:

    pip install torch==2.13.0 transformers==5.24.0 safetensors sentencepiece protobuf ml_dtypes tokenizers
    python -m tests.pretrained.make_foreign

Of every folder in tests/helpers/foreign_models.py: the tokens of a text, a part of the logits, and sign and log|det J|
of every layer, head and position by autograd in float64, J of the map e = u - mu(u) with identity values and the strict
past, and of the map with the layer's own values and the position itself, which is transformers' own attention module
with the outputs of all heads but one removed. (transformers makes norms and rotations in float32 whatever the weights.)
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.helpers.foreign_models import FOLDERS, TEXT

HERE = Path(__file__).parent
TEXTS = (
    "In 1984, naïve Łódź?\n\n\tsome  words' it's WE'LL 12345 x=3;",
    "  two   spaces\n \n",
    "日本語 😀 end",
    "a",
    "the theory the",
    "aaaaaaa  bbbb",
    "e\u0301 is not é",
)


def causal(length: int, window: int | None, inclusive: bool) -> torch.Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = distance >= (0 if inclusive else 1)
    return seen if window is None else seen & (distance < window)


def heads_of(attention: Any, inputs: torch.Tensor, rotary: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys (H, n, p) of transformers' own projections and rotations."""
    length = inputs.shape[0]
    if rotary is None:
        parts = attention.c_attn(inputs).split(inputs.shape[1], dim=1)
        return tuple(part.view(length, attention.num_heads, -1).transpose(0, 1) for part in parts[:2])
    size = attention.head_dim
    query, key = (
        projection(inputs).view(1, length, -1, size).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    return query[0], key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)


def slogdet(mean: Any, inputs: torch.Tensor, position: int) -> tuple[float, float]:
    """Of d (u_i - mean(inputs)_i) / d u_i."""

    def moved(own: torch.Tensor) -> torch.Tensor:
        changed = torch.cat([inputs[:position], own[None], inputs[position + 1 :]])
        return own - mean(changed)[position]

    sign, log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(moved, inputs[position]))
    return sign.item(), log_det.item()


def identity_margins(attention: Any, inputs: torch.Tensor, rotary: Any, window: int | None) -> np.ndarray:
    seen = causal(len(inputs), window, inclusive=False)

    def mean(u: torch.Tensor, head: int) -> torch.Tensor:
        query, key = heads_of(attention, u, rotary)
        logits = query[head] @ key[head].T / query.shape[2] ** 0.5
        unnormalised = torch.where(seen, (logits - logits.max().detach()).exp(), 0)
        return unnormalised @ u / unnormalised.sum(1, keepdim=True).clamp_min(1e-300)

    count = heads_of(attention, inputs, rotary)[0].shape[0]
    return np.array([[slogdet(lambda u, h=h: mean(u, h), inputs, i) for i in range(len(inputs))] for h in range(count)])


def own_margins(attention: Any, inputs: torch.Tensor, rotary: Any, window: int | None) -> np.ndarray:
    mask = torch.where(causal(len(inputs), window, inclusive=True), 0.0, -torch.inf).to(inputs)[None, None]
    output = attention.c_proj if rotary is None else attention.o_proj
    whole = output.weight.detach().clone()
    # The inputs of the output map, head by head: rows in GPT-2, columns in Llama.
    stacked = whole if rotary is None else whole.T
    count = attention.num_heads if rotary is None else attention.config.num_attention_heads
    found = []
    for head in range(count):
        part = torch.zeros_like(stacked).view(count, -1, stacked.shape[1])
        part[head] = stacked.view(count, -1, stacked.shape[1])[head]
        part = part.view_as(stacked)
        output.weight.data = part if rotary is None else part.T.contiguous()
        more = {} if rotary is None else {"position_embeddings": rotary}

        def mean(u: torch.Tensor, more: dict = more) -> torch.Tensor:
            return attention(u[None], attention_mask=mask, **more)[0][0]

        found.append([slogdet(mean, inputs, i) for i in range(len(inputs))])
    output.weight.data = whole
    return np.array(found)


def truth(folder: Path) -> dict[str, np.ndarray]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokens = torch.tensor([tokenizer(TEXT).input_ids])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    gpt2 = model.config.model_type == "gpt2"
    layers = model.transformer.h if gpt2 else model.model.layers
    window = model.config.sliding_window if model.config.model_type == "mistral" else None
    inputs, found = [], []
    for layer in layers:
        norm = layer.ln_1 if gpt2 else layer.input_layernorm
        norm.register_forward_hook(lambda _, given, out: inputs.append(out[0].detach()))
    with torch.no_grad():
        logits = model(tokens).logits[0]
    places = torch.arange(tokens.shape[1])[None]
    rotary = None if gpt2 else model.model.rotary_emb(inputs[0][None], places)
    for layer, given in zip(layers, inputs, strict=True):
        attention = layer.attn if gpt2 else layer.self_attn
        found.append([margins(attention, given, rotary, window) for margins in (identity_margins, own_margins)])
    found = np.array(found)
    return {
        "tokens": tokens[0].numpy().astype(np.int16),
        "logits": logits[:, ::20].numpy().astype(np.float32),
        # Layer, identity or own values, head, position.
        "sign": found[..., 0].astype(np.int8),
        "log_det": found[..., 1].astype(np.float32),
    }


def byte_level_vocabulary(rule: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = rule
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        [*TEXTS, *(5 * ["the theory it's WE'LL some words 123 12345 naïve é  \n\n"])], trainer
    )
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {"tokens": [*tokens, "<|end|>"], "merges": [" ".join(pair) for pair in model["merges"]]}


def byte_level_tokenizers() -> dict[str, Any]:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = byte_level_vocabulary(plain)
    numbers = {token: number for number, token in enumerate(vocabulary["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in vocabulary["merges"]]
    found = {}
    for name, kind in (("qwen2", Qwen2Tokenizer), ("gpt-2", GPT2Tokenizer)):
        tokenizer = kind(vocab=numbers, merges=merges, unk_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>")
        found[name] = vocabulary | {"ids": [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]}
    llama3 = TikTokenConverter().pattern
    rule = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(llama3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = rule
    end = numbers["<|end|>"]
    # Llama 3 begins every text.
    found["llama-bpe"] = vocabulary | {"bos": end, "ids": [[end, *tokenizer.encode(text).ids] for text in TEXTS]}
    return found


def sentence_piece(folder: Path) -> dict[str, Any]:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join([*TEXTS, *(20 * ["the theory it's some words 123 naïve then other than the that"])]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spm"), vocab_size=360, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    numbers = range(model.get_piece_size())
    kinds = [6 if model.is_byte(i) else 3 if model.is_control(i) else 2 if model.is_unknown(i) else 1 for i in numbers]
    return {
        "tokens": [model.id_to_piece(i) for i in numbers],
        "scores": [model.get_score(i) for i in numbers],
        "types": kinds,
        "ids": [[model.bos_id(), *model.encode(text)] for text in TEXTS],
    }


def main() -> None:
    arrays = {}
    with tempfile.TemporaryDirectory() as name:
        for number, (case, make) in enumerate(FOLDERS.items()):
            found = truth(make(Path(name) / str(number)))
            arrays |= {f"{case}/{key}": array for key, array in found.items()}
        tokenizers = byte_level_tokenizers() | {"llama": sentence_piece(Path(name))}
    np.savez_compressed(HERE / "foreign.npz", **arrays)
    (HERE / "tokenizers.json").write_text(json.dumps({"texts": TEXTS, **tokenizers}, ensure_ascii=False))


if __name__ == "__main__":
    main()
