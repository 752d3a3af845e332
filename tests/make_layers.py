"""Makes layers.npz, which the tests compare with: attention layers of Qwen3 and Gemma 2 in the hands of transformers.

In an environment of its own, from the root of a clone:

    pip install torch==2.13.0 transformers==5.24.0 safetensors sentencepiece protobuf ml_dtypes tokenizers
    python -m tests.make_layers

Tiny layers with drawn weights: their maps, the inputs, the logits that transformers' own module hands to its softmax,
and sign and log|det J| of every head and position by autograd in float64, J of the map e = u - mu(u) with identity
values and the strict past, and of the map with the layer's own values and the position itself. (transformers makes
norms and rotations in float32 whatever the weights.)
"""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoModel, Gemma2Config, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.pretrained.make_foreign import causal, own_margins, slogdet

LENGTH, SIZES = (
    10,
    {
        "vocab_size": 8,
        "hidden_size": 12,
        "intermediate_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "attn_implementation": "eager",
    },
)
CONFIGS = {
    "qwen3": Qwen3Config(num_hidden_layers=1, **SIZES),
    "gemma2": Gemma2Config(
        num_hidden_layers=2, query_pre_attn_scalar=3, attn_logit_softcapping=2.0, sliding_window=4, **SIZES
    ),
}


def recorded_logits(attention: Any, inputs: torch.Tensor, rotary: Any, window: int | None) -> torch.Tensor:
    """What the module hands to its softmax, -inf where a position sees nothing."""
    seen = []

    def softmax(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(x)
        return torch.softmax(x, -1)

    mask = torch.where(causal(len(inputs), window, inclusive=True), 0.0, -torch.inf).to(inputs)[None, None]
    with mock.patch("torch.nn.functional.softmax", softmax), torch.no_grad():
        attention(inputs[None], attention_mask=mask, position_embeddings=rotary)
    return seen[0][0]


def identity_margins(attention: Any, inputs: torch.Tensor, rotary: Any, window: int | None) -> np.ndarray:
    seen = causal(len(inputs), window, inclusive=False)
    cap = getattr(attention, "attn_logit_softcapping", None)

    def logits(u: torch.Tensor) -> torch.Tensor:
        shape = (1, len(u), -1, attention.head_dim)
        query, key = (projection(u).view(shape) for projection in (attention.q_proj, attention.k_proj))
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *rotary)
        found = attention.scaling * query[0] @ key[0].repeat_interleave(query.shape[1] // key.shape[1], 0).mT
        return found if cap is None else cap * torch.tanh(found / cap)

    inclusive = torch.where(causal(len(inputs), window, inclusive=True), logits(inputs), -torch.inf)
    torch.testing.assert_close(inclusive, recorded_logits(attention, inputs, rotary, window))

    def mean(u: torch.Tensor, head: int) -> torch.Tensor:
        found = logits(u)[head]
        unnormalised = torch.where(seen, (found - found.max().detach()).exp(), 0)
        return unnormalised @ u / unnormalised.sum(1, keepdim=True).clamp_min(1e-300)

    heads = range(SIZES["num_attention_heads"])
    return np.array([[slogdet(lambda u, h=h: mean(u, h), inputs, i) for i in range(len(inputs))] for h in heads])


def layer(attention: Any, inputs: torch.Tensor, rotary: Any, frequencies: torch.Tensor) -> dict[str, np.ndarray]:
    window = getattr(attention, "sliding_window", None)
    heads, groups, size = SIZES["num_attention_heads"], SIZES["num_key_value_heads"], SIZES["head_dim"]
    cap = getattr(attention, "attn_logit_softcapping", None)
    found = {
        "inputs": inputs,
        "query": attention.q_proj.weight.view(heads, size, -1),
        "key": attention.k_proj.weight.view(groups, size, -1),
        "value": attention.v_proj.weight.view(groups, size, -1),
        "output": attention.o_proj.weight.view(-1, heads, size).transpose(0, 1),
        "frequencies": frequencies,
        "logits": recorded_logits(attention, inputs, rotary, window),
    }
    if hasattr(attention, "q_norm"):
        found |= {"query_gain": attention.q_norm.weight, "key_gain": attention.k_norm.weight}
        found["epsilon"] = torch.tensor(attention.q_norm.variance_epsilon)
    arrays = {name: x.detach().numpy() for name, x in found.items()}
    margins = [find(attention, inputs, rotary, window) for find in (identity_margins, own_margins)]
    numbers = {"window": window, "scale": attention.scaling, "cap": cap}
    arrays |= {name: np.array(number) for name, number in numbers.items() if number is not None}
    # Identity or own values, head, position.
    return arrays | {"sign": np.array(margins)[..., 0], "log_det": np.array(margins)[..., 1]}


def main() -> None:
    arrays = {}
    for family, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModel.from_config(config).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.4)
        inputs = torch.randn(LENGTH, SIZES["hidden_size"], dtype=torch.float64)
        rotary = model.rotary_emb(inputs[None], torch.arange(LENGTH)[None])
        for number, block in enumerate(model.layers):
            found = layer(block.self_attn, inputs, rotary, model.rotary_emb.inv_freq.double())
            arrays |= {f"{family}.{number}/{name}": array for name, array in found.items()}
    np.savez_compressed(Path(__file__).parent / "layers.npz", **arrays)


if __name__ == "__main__":
    main()
