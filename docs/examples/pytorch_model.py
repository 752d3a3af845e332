"""The attention layers of a PyTorch decoder of transformers, each hooked and described as an Attention, for margins."""

from typing import Any

from prob_transformer import Attention, RMSNorm, Rotary

# Families tried against autograd. Others may have what is not read here: other norms, scaled rotary positions, a cap.
KNOWN = ("llama", "mistral", "qwen2", "qwen3")


def layers_of(model: Any, *arguments: Any) -> list[tuple[Attention, Any]]:
    """Every attention layer of the model and the inputs (n, d) that its heads attend over, from one run of it."""
    if model.config.model_type not in KNOWN:
        raise ValueError(f"model: is a {model.config.model_type}; this reads {', '.join(KNOWN)}.")
    rotary = model.model.rotary_emb
    found = []

    def keep(layer: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs = named["hidden_states"] if "hidden_states" in named else positional[0]
        maps = [_array(x.weight).reshape(-1, layer.head_dim, x.weight.shape[1]) for x in (layer.q_proj, layer.k_proj)]
        biases = [
            None if x.bias is None else _array(x.bias).reshape(-1, layer.head_dim) for x in (layer.q_proj, layer.k_proj)
        ]
        norms = [
            None if norm is None else RMSNorm(_array(norm.weight), norm.variance_epsilon)
            for norm in (getattr(layer, name, None) for name in ("q_norm", "k_norm"))
        ]
        attention = Attention(
            *maps,
            query_bias=biases[0],
            key_bias=biases[1],
            query_norm=norms[0],
            key_norm=norms[1],
            rotary=Rotary(_array(rotary.inv_freq)),
            # Qwen's layers have one each, Mistral's that of the model.
            window=getattr(layer, "sliding_window", getattr(model.config, "sliding_window", None)),
            scale=layer.scaling * rotary.attention_scaling**2,
        )
        found.append((attention, _array(inputs[0])))

    hooks = [block.self_attn.register_forward_pre_hook(keep, with_kwargs=True) for block in model.model.layers]
    model(*arguments)
    for hook in hooks:
        hook.remove()
    return found


def _array(x: Any) -> Any:
    x = x.detach().cpu()
    # NumPy has no bfloat16.
    return (x.float() if x.element_size() < 4 else x).numpy()
