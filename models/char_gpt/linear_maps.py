"""The linear maps of the character GPT as matrices (outputs, inputs) by name, and the model as a function of them.

Heads stand one after the other in the outputs of "query", "key" and "value" and in the inputs of "output". Not among
the maps are the token and position embeddings, the scales and biases of the norms, and the prior stage, which takes no
part in prediction.
"""

from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, Float, Int

from prob_transformer.inference.laplace import TrainedNetwork
from prob_transformer.transformer.network import Transformer

_OF_A_LAYER = ("query", "key", "value", "output", "up", "down")
Matrices = dict[str, Float[Array, "*S o i"]]


def _leaf(model: Transformer, name: str) -> Array:
    if name == "head":
        return model.head
    layer, _, own = name.partition(".")
    return getattr(model.blocks[int(layer)], own)


def _matrix(name: str, leaf: Array) -> Float[Array, "o i"]:
    if name.endswith(".output"):
        return leaf.transpose(1, 0, 2).reshape(leaf.shape[1], -1)
    return leaf.reshape(-1, leaf.shape[-1])


def matrices(model: Transformer) -> Matrices:
    """All linear maps as matrices (outputs, inputs), sorted by name as JAX hands dictionaries back."""
    names = (*(f"{i}.{name}" for i in range(len(model.blocks)) for name in _OF_A_LAYER), "head")
    return {name: _matrix(name, _leaf(model, name)) for name in sorted(names)}


def _as_leaf(name: str, matrix: Float[Array, "o i"], like: Array) -> Array:
    if name.endswith(".output"):
        heads, width, size = like.shape
        return matrix.reshape(width, heads, size).transpose(1, 0, 2)
    return matrix.reshape(like.shape)


def with_matrices(model: Transformer, replaced: Matrices) -> Transformer:
    """The model with some of its maps replaced."""
    leaves = [_as_leaf(name, matrix, _leaf(model, name)) for name, matrix in replaced.items()]
    return eqx.tree_at(lambda m: [_leaf(m, name) for name in replaced], model, leaves)


def logits(hook: Callable[[str, Array, Array], Array], model: Transformer, characters: Int[Array, " n"]) -> Array:
    """Logits (n, V) of one window; `hook` sees every map with inputs (n, i) and outputs (n, o)."""

    def positions_first(name: str, inputs: Array, outputs: Array) -> Array:
        if name.endswith(".stream"):
            return outputs
        if outputs.ndim == 2:
            return hook(name, inputs, outputs)
        return hook(name, inputs, outputs.reshape(-1, outputs.shape[-1]).T).T.reshape(outputs.shape)

    return model.decode(model.embed(characters), "none", positions_first)[0]


def trained_network(model: Transformer, windows: Int[Array, "W n+1"]) -> TrainedNetwork:
    """The model at its weights with windows of text, whose characters are predicted one by one."""
    return TrainedNetwork(logits, with_matrices, model, matrices(model), "head", windows[:, :-1], windows[:, 1:])
