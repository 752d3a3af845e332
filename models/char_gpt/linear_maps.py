"""The linear maps of the character GPT as matrices (outputs, inputs) by name, and the model as a function of them.

Heads stand one after the other in the outputs of "query", "key" and "value" and in the inputs of "output". Not among
the maps are the token and position embeddings, the scales and biases of the norms, and the prior stage, which takes no
part in prediction.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.char_gpt.model import CharGPT

_OF_A_LAYER = ("query", "key", "value", "output", "up", "down")
_BY_HEAD = ("query", "key", "value")
Matrices = dict[str, Float[Array, "*S o i"]]


def names(model: CharGPT) -> tuple[str, ...]:
    """Names of all linear maps, sorted: the order in which JAX hands dictionaries back."""
    return tuple(sorted((*(f"{i}.{name}" for i in range(len(model.blocks)) for name in _OF_A_LAYER), "head")))


def matrices(model: CharGPT, chosen: Sequence[str]) -> Matrices:
    """The chosen maps as matrices (outputs, inputs), sorted by name."""
    return {name: _matrix(name, _leaf(model, name)) for name in sorted(chosen)}


def _leaf(model: CharGPT, name: str) -> Array:
    if name == "head":
        return model.head
    layer, _, own = name.partition(".")
    return getattr(model.blocks[int(layer)], own)


def _matrix(name: str, leaf: Array) -> Float[Array, "o i"]:
    own = name.rpartition(".")[2]
    if own in _BY_HEAD:
        return leaf.reshape(-1, leaf.shape[-1])
    return leaf.transpose(1, 0, 2).reshape(leaf.shape[1], -1) if own == "output" else leaf


def _as_leaf(name: str, matrix: Float[Array, "o i"], like: Array) -> Array:
    if name.rpartition(".")[2] == "output":
        heads, width, size = like.shape
        return matrix.reshape(width, heads, size).transpose(1, 0, 2)
    return matrix.reshape(like.shape)


def with_matrices(model: CharGPT, replaced: Matrices) -> CharGPT:
    """The model with some of its maps replaced."""
    chosen = list(replaced)
    leaves = [_as_leaf(name, replaced[name], _leaf(model, name)) for name in chosen]
    return eqx.tree_at(lambda m: [_leaf(m, name) for name in chosen], model, leaves)


def network(tap: Callable[[str, Array, Array], Array], model: CharGPT, characters: Int[Array, " n"]) -> Array:
    """Logits (n, V) of one window; `tap` sees every map with inputs (n, i) and outputs (n, o)."""

    def positions_first(name: str, inputs: Array, outputs: Array) -> Array:
        if name.endswith(".stream"):
            return outputs
        if outputs.ndim == 2:
            return tap(name, inputs, outputs)
        return tap(name, inputs, outputs.reshape(-1, outputs.shape[-1]).T).T.reshape(outputs.shape)

    return model.decode(model.embed(characters), hook=positions_first)[0]


def flat(chosen: Matrices) -> Float[Array, "*S k"]:
    """The matrices one after the other, by rows, sorted by name as `matrices` has them."""
    return jnp.concatenate([matrix.reshape(*matrix.shape[:-2], -1) for _, matrix in sorted(chosen.items())], axis=-1)


def unflat(vectors: Float[Array, "*S k"], like: Matrices) -> Matrices:
    """The inverse of `flat`, for any number of vectors."""
    parts = jnp.split(vectors, np.cumsum([matrix.size for _, matrix in sorted(like.items())])[:-1], axis=-1)
    named = zip(sorted(like.items()), parts, strict=True)
    return {name: part.reshape(*part.shape[:-1], *matrix.shape) for (name, matrix), part in named}


def logit_jacobian(
    model: CharGPT, at: Matrices, characters: Int[Array, " n"], position: Int[Array, ""]
) -> Float[Array, "V k"]:
    """Derivative of the logits at one position of a window in the matrices `at`, flat."""

    def logits(replaced: Matrices) -> Float[Array, " V"]:
        return with_matrices(model, replaced)(characters)[position]

    found, sent_back = jax.vjp(logits, at)
    (rows,) = jax.vmap(sent_back)(jnp.eye(found.shape[0], dtype=found.dtype))
    return flat(rows)
