"""Margins of a PyTorch decoder of transformers, with the layer names of the Llama family: hook, Attention, margins."""

from typing import Any

from prob_transformer import Attention, Rotary


def layers_of(model: Any, *arguments: Any) -> list[tuple[Attention, Any]]:
    """Every attention layer of the model and the inputs (n, d) that its heads attend over, from one run of it."""
    frequencies = model.model.rotary_emb.inv_freq.numpy()
    found = []

    def keep(layer: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs = named["hidden_states"] if "hidden_states" in named else positional[0]
        query, key = (x.weight.detach().numpy() for x in (layer.q_proj, layer.k_proj))
        query, key = (x.reshape(-1, layer.head_dim, x.shape[1]) for x in (query, key))
        found.append(
            (Attention(query, key, rotary=Rotary(frequencies), scale=layer.scaling), inputs[0].detach().numpy())
        )

    hooks = [block.self_attn.register_forward_pre_hook(keep, with_kwargs=True) for block in model.model.layers]
    model(*arguments)
    for hook in hooks:
        hook.remove()
    return found
