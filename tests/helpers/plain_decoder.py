"""A decoder's attention layer written out plainly, sharing nothing with the library; its Jacobians are autodiff's."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Of the norms of queries and keys.
EPSILON = 1e-6


class Plain(NamedTuple):
    """Weights of a layer as NumPy arrays, and how it is to be read."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray | None = None
    output: np.ndarray | None = None
    query_bias: np.ndarray | None = None
    key_bias: np.ndarray | None = None
    frequencies: np.ndarray | None = None
    query_gain: np.ndarray | None = None
    key_gain: np.ndarray | None = None
    interleaved: bool = False
    window: int | None = None
    cap: float | None = None


def draw(
    seed,
    heads,
    groups,
    size,
    width,
    inner=None,
    pairs=0,
    interleaved=False,
    bias=False,
    window=None,
    output=True,
    normed=False,
    cap=None,
):
    """A random layer; `inner` is the size of its values, None for none."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return scale * rng.normal(size=shape)

    return Plain(
        normal(heads, size, width, scale=0.7),
        normal(groups, size, width, scale=0.7),
        None if inner is None else normal(groups, inner, width, scale=0.7),
        normal(heads, width, inner, scale=0.7) if inner and output else None,
        normal(heads, size) if bias else None,
        normal(groups, size) if bias else None,
        rng.uniform(0.1, 1.0, pairs) if pairs else None,
        rng.uniform(0.5, 2.0, size) if normed else None,
        rng.uniform(0.5, 2.0, size) if normed else None,
        interleaved,
        window,
        cap,
    )


def rotation(plain, position):
    """R_s as a full matrix, one 2 x 2 block a pair."""
    size = plain.query.shape[1]
    matrix = np.eye(size)
    count = 0 if plain.frequencies is None else len(plain.frequencies)
    for j in range(count):
        a, b = (2 * j, 2 * j + 1) if plain.interleaved else (j, j + count)
        angle = position * plain.frequencies[j]
        matrix[a, a] = matrix[b, b] = np.cos(angle)
        matrix[b, a], matrix[a, b] = np.sin(angle), -np.sin(angle)
    return matrix


def _normed(gain, x):
    return x if gain is None else gain * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)


def _weights(plain, rotations, inputs, inclusive, head, position):
    group = head // (plain.query.shape[0] // plain.key.shape[0])
    query, keys = plain.query[head] @ inputs[position], inputs @ plain.key[group].T
    if plain.query_bias is not None:
        query, keys = query + plain.query_bias[head], keys + plain.key_bias[group]
    keys = jnp.einsum("sab,sb->sa", rotations, _normed(plain.key_gain, keys))
    logits = keys @ (rotations[position] @ _normed(plain.query_gain, query)) / np.sqrt(plain.query.shape[1])
    if plain.cap is not None:
        logits = plain.cap * jnp.tanh(logits / plain.cap)
    distance = position - jnp.arange(inputs.shape[0])
    seen = (distance > 0) | (inclusive & (distance == 0))
    if plain.window is not None:
        seen = seen & (distance < plain.window)
    unnormalised = jnp.where(seen, jnp.exp(logits), 0)
    total = unnormalised.sum()
    return unnormalised / jnp.where(total > 0, total, 1)


def weights_at(plain, inputs, inclusive, head, position):
    """alpha_i of one head and position."""
    rotations = np.stack([rotation(plain, s) for s in range(inputs.shape[0])])
    return _weights(plain, rotations, inputs, inclusive, head, position)


def mean_at(plain, own_values, rotations, inputs, inclusive, head, position, embedding):
    """mu_i of one head when u_i is `embedding`, wherever u_i enters."""
    inputs = inputs.at[position].set(embedding)
    values = inputs
    if own_values:
        group = head // (plain.query.shape[0] // plain.key.shape[0])
        values = inputs @ plain.value[group].T
        values = values if plain.output is None else values @ plain.output[head].T
    return _weights(plain, rotations, inputs, inclusive, head, position) @ values


@partial(jax.jit, static_argnames=("interleaved", "window", "cap", "own_values"))
def _jacobians(weights, rotations, inputs, inclusive, positions, interleaved, window, cap, own_values):
    plain = Plain(*weights, interleaved, window, cap)

    def at(index):
        head, position = index

        def mean(embedding):
            return mean_at(plain, own_values, rotations, inputs, inclusive, head, position, embedding)

        return jax.jacfwd(mean)(inputs[position])

    grid = jnp.meshgrid(jnp.arange(plain.query.shape[0]), positions, indexing="ij")
    return jax.lax.map(lambda heads: jax.lax.map(at, heads), tuple(grid))


def jacobians(plain, inputs, own_values, inclusive, positions=None):
    """d mu_i / d u_i of every head and all positions, or those given, (H, m, d, d), by autodiff in float64."""
    length = inputs.shape[0]
    rotations = np.stack([rotation(plain, s) for s in range(length)])
    weights = tuple(None if x is None else jnp.asarray(x) for x in plain[:9])
    chosen = jnp.arange(length) if positions is None else jnp.asarray(positions)
    how = (plain.interleaved, plain.window, plain.cap, own_values)
    return np.asarray(_jacobians(weights, rotations, inputs, inclusive, chosen, *how))
