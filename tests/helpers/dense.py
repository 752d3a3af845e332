"""Attention as a map, written with loops and sharing nothing with the library: the truth for the closed forms."""

import jax
import jax.numpy as jnp
import numpy as np

# heads, head size, width, length, own values
SHAPES = [
    (1, 1, 1, 4, False),
    (1, 2, 2, 2, False),
    (1, 2, 3, 5, False),
    (1, 4, 2, 4, True),
    (2, 1, 3, 4, True),
    (2, 3, 2, 5, True),
    (3, 2, 4, 3, True),
]


def dense_map(query, key, value, embeddings):
    """e = u - mu(u) with a loop over positions and heads."""
    rows = [embeddings[0]]
    for i in range(1, embeddings.shape[0]):
        mean = 0.0
        for h in range(query.shape[0]):
            logits = (embeddings[:i] @ key[h].T) @ (query[h] @ embeddings[i]) / jnp.sqrt(query.shape[1])
            attended = jax.nn.softmax(logits) @ embeddings[:i]
            mean = mean + (attended if value is None else value[h] @ attended)
        rows.append(embeddings[i] - mean)
    return jnp.stack(rows)


@jax.jit
def dense_truth(query, key, value, embeddings):
    """Residual (n, d), blocks J_i (n, d, d) and slogdet of the whole (nd, nd) Jacobian, all by autodiff."""
    length, width = embeddings.shape
    jacobian = jax.jacfwd(lambda u: dense_map(query, key, value, u))(embeddings)
    blocks = jnp.stack([jacobian[i, :, i, :] for i in range(length)])
    whole = jnp.linalg.slogdet(jacobian.reshape(length * width, length * width))
    return dense_map(query, key, value, embeddings), blocks, whole


def draw(seed, shape, dtype=np.float64, scale=0.7):
    """Query, key, value (or None) and embeddings of one of the shapes."""
    heads, size, width, length, own_values = shape
    rng = np.random.default_rng([seed, *shape])
    query, key = ((scale * rng.normal(size=(heads, size, width))).astype(dtype) for _ in range(2))
    value = (0.5 * rng.normal(size=(heads, width, width))).astype(dtype) if own_values else None
    return query, key, value, rng.normal(size=(length, width)).astype(dtype)
