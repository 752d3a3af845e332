"""The generative model of tokens: embeddings from the process, the next token from a decoder of u_<=i.

    u_1..n ~ EmbeddingProcess                          site "embeddings"
    x_i    ~ Categorical(softmax(decoder(u_<=i)))      site "tokens"; row i holds the token that follows position i
    barrier_weight * sum_i log|det J_i|                factor "barrier", absent when the weight is 0

The factor is a penalty, part of MAP: with it the joint is in general no consistent law of tokens (theory section 5).
Its negative log joint is `map_objective`, to rounding (theory_checks, map-equivalence).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.core import Tracer
from jaxtyping import Array, Float, Int
from numpyro.distributions import constraints

from prob_transformer._validation import require_count, require_finite, require_integers, require_vocabulary
from prob_transformer.attention import Attention
from prob_transformer.barrier import barrier
from prob_transformer.embedding_process import EmbeddingProcess

Objective = Literal["full", "margin"]
Decoder = Callable[[Float[Array, "... n d"]], Float[Array, "... n V"]]


class LinearDecoder(eqx.Module):
    """Logits W u_i + b over a vocabulary of V tokens; `weight` (V, d), `bias` (V,). ValueError for other shapes."""

    weight: Float[Array, "V d"]
    bias: Float[Array, " V"]

    def __init__(self, weight: Float[Array, "V d"], bias: Float[Array, " V"]):
        weight, bias = require_finite("weight", weight), require_finite("bias", bias)
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(f"weight: has shape {weight.shape} with bias {bias.shape}; pass (V, d) and (V,).")
        self.weight, self.bias = weight, bias

    def __call__(self, embeddings: Float[Array, "... n d"]) -> Float[Array, "... n V"]:
        return embeddings @ self.weight.T + self.bias


def sampled_attention(
    width: int, head_size: int, scale: Float[Array, ""] | float = 1.0, site: str = "interaction"
) -> Attention:
    """An attention with identity values inside a NumPyro model: "query" and "key" (p, d) with priors N(0, scale^2).

    The posterior of "query" and "key" is the same after any rotation of the rows of both, so they are not identified.
    Their interaction A = W_K^T W_Q / sqrt(p), (d, d), is: it is recorded as the deterministic site named.
    """
    prior = dist.Normal(0.0, scale).expand([head_size, width]).to_event(2)
    attention = Attention(numpyro.sample("query", prior)[None], numpyro.sample("key", prior)[None])
    numpyro.deterministic(site, attention.interaction[0])
    return attention


def require_objective(objective: str, barrier_weight: Float[Array, ""] | float) -> None:
    if objective not in ("full", "margin"):
        raise ValueError(f"objective: got {objective!r}; pass 'full' or 'margin'.")
    require_barrier_weight(barrier_weight)


def require_barrier_weight(barrier_weight: Float[Array, ""] | float) -> None:
    if require_finite("barrier_weight", barrier_weight).ndim:
        raise ValueError(f"barrier_weight: has shape {jnp.shape(barrier_weight)}; pass one number.")
    if not isinstance(barrier_weight, Tracer) and np.asarray(barrier_weight) < 0:
        raise ValueError(f"barrier_weight: got {barrier_weight}; pass 0 or more.")


def is_zero(barrier_weight: Float[Array, ""] | float) -> bool:
    """Whether there is no barrier term at all; 0 * inf on the boundary would be NaN."""
    return not isinstance(barrier_weight, Tracer) and bool(np.asarray(barrier_weight) == 0)


def require_tokens(tokens: Int[Array, "... n"]) -> Int[Array, "... n"]:
    tokens = require_integers("tokens", tokens)
    if tokens.ndim not in (1, 2):
        raise ValueError(f"tokens: has shape {tokens.shape}; pass one text (n,) or several of one length, (B, n).")
    return tokens


def token_model(
    attention: Attention,
    decoder: Decoder,
    tokens: Int[Array, "... n"] | None = None,
    *,
    length: int | None = None,
    noise_scale: Float[Array, ""] | float = 1.0,
    first_scale: Float[Array, ""] | float = 1.0,
    objective: Objective = "full",
    barrier_weight: Float[Array, ""] | float = 0.0,
) -> Float[Array, "... n d"]:
    """NumPyro model of embeddings and tokens; returns the embeddings.

    `tokens` is (n,) or a batch (B, n) in a plate "sequences", or None with `length` given. Parameters with priors are
    sampled by the caller, who passes them in as `attention` and `decoder`. With `objective="full"` the embeddings
    follow the `EmbeddingProcess`; with "margin" their prior is flat and the barrier is all there is (improper, so
    embeddings cannot be drawn from it, only inferred). The factor multiplies every |det J_i| ** barrier_weight in,
    on top of the density's own determinant under "full". Raises ValueError for bad arguments.
    Source: theory sections 2 and 5.
    """
    require_objective(objective, barrier_weight)
    if tokens is not None:
        tokens = require_tokens(tokens)
        if length not in (None, tokens.shape[-1]):
            raise ValueError(f"length: got {length} with tokens of length {tokens.shape[-1]}; leave length out.")
        length = tokens.shape[-1]
    require_count("length", length, 2, "the number of positions, needed when tokens is None")
    assert length is not None

    with nullcontext() if tokens is None or tokens.ndim == 1 else numpyro.plate("sequences", tokens.shape[0]):
        if objective == "full":
            prior = EmbeddingProcess(attention, length, noise_scale, first_scale)
        else:
            prior = dist.ImproperUniform(constraints.real_matrix, (), event_shape=(length, attention.width))
        embeddings = numpyro.sample("embeddings", prior)
        if not is_zero(barrier_weight):
            numpyro.factor("barrier", -barrier_weight * barrier(attention, embeddings).sum(-1))
        logits = decoder(embeddings)
        if tokens is not None:
            require_vocabulary("tokens", tokens, logits.shape[-1])
        numpyro.sample("tokens", dist.Categorical(logits=logits).to_event(1), obs=tokens)
    return embeddings
