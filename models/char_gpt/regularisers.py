"""What a user would reach for instead of the barrier, each with one strength, added to plain cross-entropy.

    dropout          share of entries set to zero, of the input embeddings and of what each branch adds to the stream
    embedding-noise  Gaussian noise on the input embeddings; its standard deviation over their root mean square
    jacobian         weight of |d logits / d u|_F^2 mean(u^2) a character: what relative noise adds, to first order
    spectral         weight of the mean over heads of |A_h|_2^2, the largest singular value of the interaction
    weight-decay     decoupled (AdamW), on all matrices, in units of the learning rate: see `decayed`

embedding-noise and jacobian are relative to the embeddings' own size, so that neither can be satisfied by making the
embeddings larger. The Frobenius norm is estimated without bias by one random projection a sequence.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from models.char_gpt.config import Config
from models.char_gpt.model import CharGPT, Tap

Strength = Float[Array, ""] | float


def regularised(
    model: CharGPT, characters: Int[Array, "B n"], config: Config, key: PRNGKeyArray, strength: Strength
) -> tuple[Float[Array, "B n V"], Float[Array, ""]]:
    """Logits as training sees them under the regulariser, and the penalty () that its strength multiplies, or 0."""
    embeddings = jax.vmap(model.embed)(characters)
    keys = jax.random.split(key, characters.shape[0])

    def decode(u: Float[Array, "n d"]) -> Float[Array, "n V"]:
        return model.decode(u, config.rematerialise)[0]

    zero = jnp.zeros((), embeddings.dtype)
    if config.regulariser == "dropout":
        return jax.vmap(lambda u, k: _with_dropout(model, u, config, k, strength))(embeddings, keys), zero
    if config.regulariser == "embedding-noise":
        scale = strength * jax.lax.stop_gradient(jnp.sqrt(jnp.square(embeddings).mean()))
        noise = jax.random.normal(key, embeddings.shape, embeddings.dtype)
        return jax.vmap(decode)(embeddings + scale * noise), zero
    if config.regulariser == "jacobian":
        logits, squared_norms = jax.vmap(lambda u, k: _with_jacobian_norm(decode, u, k))(embeddings, keys)
        return logits, squared_norms.mean() / characters.shape[1] * jnp.square(embeddings).mean()
    logits = jax.vmap(decode)(embeddings)
    if config.regulariser == "spectral":
        return logits, jnp.stack([_squared_spectral_norms(b.query, b.key) for b in model.blocks]).mean()
    return logits, zero


def _dropped(key: PRNGKeyArray, share: Strength, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Entries set to zero with probability `share`, the others divided by 1 - share."""
    is_kept = jax.random.uniform(key, x.shape) >= share
    return jnp.where(is_kept, x / (1 - share), 0.0)


def _with_dropout(
    model: CharGPT, embeddings: Float[Array, "n d"], config: Config, key: PRNGKeyArray, share: Strength
) -> Float[Array, "n V"]:
    names = [f"{index}.{branch}" for index in range(len(model.blocks)) for branch in ("output", "contract")]
    keys = dict(zip(["embeddings", *names], jax.random.split(key, 1 + len(names)), strict=True))

    def drop_branches(name: str, inputs: Array, outputs: Array) -> Array:
        return _dropped(keys[name], share, outputs) if name in keys else outputs

    tap: Tap = drop_branches
    return model.decode(_dropped(keys["embeddings"], share, embeddings), config.rematerialise, tap)[0]


def _with_jacobian_norm(
    decode: Callable[[Float[Array, "n d"]], Float[Array, "n V"]], embeddings: Float[Array, "n d"], key: PRNGKeyArray
) -> tuple[Float[Array, "n V"], Float[Array, ""]]:
    """Logits of a sequence and v^T J J^T v for v ~ N(0, I), whose mean is the squared Frobenius norm of J."""
    logits, pull_back = jax.vjp(decode, embeddings)
    (projected,) = pull_back(jax.random.normal(key, logits.shape, logits.dtype))
    return logits, jnp.square(projected).sum()


def _squared_spectral_norms(query: Float[Array, "H p d"], key: Float[Array, "H p d"]) -> Float[Array, " H"]:
    """|A_h|_2^2 for A_h = W_K^T W_Q / sqrt(p): the largest eigenvalue of a p x p matrix with its non-zero spectrum."""
    factor = jnp.linalg.cholesky(key @ key.mT)
    return jnp.linalg.eigvalsh(factor.mT @ (query @ query.mT) @ factor)[:, -1] / query.shape[1]


def decayed(update: PyTree, model: CharGPT, learning_rate: Float[Array, ""], strength: Strength) -> PyTree:
    """The optimiser's update with learning_rate * strength of every matrix taken off it; gains and shifts are left."""

    def decay(change: Array, weight: Array) -> Array:
        return change - learning_rate * strength * weight if weight.ndim > 1 else change

    return jax.tree.map(decay, update, eqx.filter(model, eqx.is_inexact_array))
