"""The transformer as an explicit generative process: a NumPyro model of its weights, latent embeddings and tokens.

    theta ~ priors                                      one site an array: "transformer/blocks[0].query", ...
    latents = "table"       u_i = embedding of x_i, so x_{i+1} ~ Categorical(softmax(logits_i(x_<=i)))
    latents = "process"     u_1..n ~ EmbeddingProcess of an attention,     x_i ~ Categorical(softmax(logits_i(u_<=i)))
    log factor              -barrier_weight * (predicted tokens) * mean over heads and positions of the penalty b_i

Sequences stand in the plate "sequences", whose subsample makes the potential of a minibatch an unbiased estimate of
that of all the data. Latents in a table are what language models do; given the first token, the law of the others is
consistent. Latents from the process follow the paper's reading, as reported second-hand: attention with noise generates
the embeddings (theory section 2). That the whole decoder reads these embeddings is our own choice.

The factor is a data-dependent penalty, an improper prior: part of the potential, of MAP and Laplace, but not of what
is generated or marginalised (theory section 11). With latents in a table, weight lambda, and the mean over T predicted
tokens, potential / T is the training loss mean(CE) + lambda mean(b) + weight prior / T.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from numpyro import handlers

from prob_transformer._validation import (
    require_choice,
    require_count,
    require_integers,
    require_positive,
    require_vocabulary,
)
from prob_transformer.attention import Attention
from prob_transformer.embedding_process import EmbeddingProcess
from prob_transformer.kernels.barrier import BarrierPenalty
from prob_transformer.margins import Values
from prob_transformer.token_model import is_zero, require_barrier_weight
from prob_transformer.training_barrier import Form, barrier_penalty
from prob_transformer.transformer.network import Attended, Remat, Transformer, TransformerConfig
from prob_transformer.transformer.token_process import TokenProcess
from prob_transformer.transformer.weight_sites import Priors, default_priors, sampled_weights, template

Latents = Literal["table", "process"]
ProcessAttention = Literal["free", "tied"]
Site = Literal["embedding", "layers"]
# Of (transformer, input embeddings, what the layers attended over): the mean of a penalty on a batch, and its parts.
Penalty: TypeAlias = Callable[[Transformer, Float[Array, "B n d"], Attended], BarrierPenalty]


def layers_at(
    site: Site,
    transformer: Transformer,
    embeddings: Float[Array, "B n d"],
    attended: Attended,
    values: Values = "identity",
) -> list[tuple[Attention, Float[Array, "B n d"]]]:
    """The attentions of a site with what they attend over: the prior stage, or every layer. ValueError for others."""
    require_choice("site", site, get_args(Site))
    if site == "embedding":
        if transformer.prior_stage is None:
            raise ValueError("site: got 'embedding', but a tied process has no stage of its own; pass 'layers'.")
        return [(transformer.prior_stage, embeddings)]
    return list(zip([block.attention(values) for block in transformer.blocks], attended.inputs, strict=True))


@dataclass(frozen=True)
class HeadBarrier:
    """The mean barrier of a transformer's heads by `barrier_penalty`: where, of which form, with which values.

    Site "embedding" is the prior stage over the input embeddings; "layers" the heads of every layer, each alone with
    identity values, or jointly with the layer's "own" values.
    """

    site: Site = "embedding"
    form: Form = "two-sided"
    threshold: float = 0.5
    values: Values = "identity"

    def __call__(
        self, transformer: Transformer, embeddings: Float[Array, "B n d"], attended: Attended
    ) -> BarrierPenalty:
        """Mean penalty in nats, share of det J_i <= 0, variance 0. Raises ValueError as `barrier_penalty` does."""
        layers = layers_at(self.site, transformer, embeddings, attended, self.values)
        return barrier_penalty(layers, form=self.form, threshold=self.threshold, values=self.values)


EMBEDDING_BARRIER = HeadBarrier()


def decoded(
    transformer: Transformer, embeddings: Float[Array, "B n d"], remat: Remat = "none"
) -> tuple[Float[Array, "B n V"], Attended]:
    """Logits, and of every layer its inputs (L, B, n, d), queries and keys (L, B, H, p, n)."""
    return jax.vmap(lambda u: transformer.decode(u, remat), out_axes=(0, 1))(embeddings)


def _require(
    latents: str,
    attention: str,
    remat: str,
    tokens: Array | None,
    prompt: Array | None,
    length: int | None,
    context: int,
) -> None:
    require_choice("latents", latents, get_args(Latents))
    require_choice("attention", attention, get_args(ProcessAttention))
    require_choice("remat", remat, get_args(Remat))
    if latents == "table" and attention == "tied":
        raise ValueError(
            "attention: got 'tied' with latents in a table, which have no process; pass latents='process'."
        )
    if tokens is not None and (prompt is not None or length is not None):
        raise ValueError(
            f"{'length' if prompt is None else 'prompt'}: given with tokens; pass tokens to condition on them, or a "
            "prompt and a length to draw what follows."
        )
    if tokens is None and latents == "table" and prompt is None:
        raise ValueError("prompt: got None without tokens; pass the tokens that the text begins with, at least one.")
    if tokens is None and latents == "process" and prompt is not None:
        raise ValueError("prompt: given with latents from the process, which emit every token; pass a length alone.")
    if latents == "process" and length is not None and length > context:
        raise ValueError(f"length: got {length}; pass at most the context, {context}.")
    if tokens is None and length is None:
        raise ValueError("length: got None without tokens; pass the number of tokens to draw.")


def _require_sequences(drawn: Int[Array, " b"], count: int, subsample_size: int | None) -> None:
    """Raises ValueError for indices of the plate, given by a guide or a handler, that do not fit; traced ones pass."""
    if drawn.shape != (count if subsample_size is None else subsample_size,):
        raise ValueError(
            f"subsample_size: got {subsample_size}, but a guide or a handler gave sequences of shape {drawn.shape}; "
            "build the guide on the model with the same subsample_size, and give as many indices."
        )
    if not jnp.issubdtype(drawn.dtype, jnp.integer):
        raise ValueError(f"sequences: has dtype {drawn.dtype}; pass integers.")
    if not isinstance(drawn, jax.core.Tracer):
        given = np.asarray(drawn)
        if subsample_size is None and (given != np.arange(count)).any():
            raise ValueError(f"sequences: got the indices {given.tolist()}; pass subsample_size={count} with them.")
        if not ((given >= 0) & (given < count)).all():
            raise ValueError(f"sequences: got the indices {given.tolist()}; pass integers in 0..{count - 1}.")


def _drawn_text(
    transformer: Transformer,
    stage: Attention | None,
    prompt: Any,
    length: Any,
    scales: tuple[Float[Array, ""] | float, Float[Array, ""] | float],
) -> None:
    """The sites of a text that is drawn: what follows the prompt, or latent embeddings and their tokens."""
    if stage is None:
        numpyro.sample("tokens", TokenProcess(transformer, prompt, length))
        return
    embeddings = numpyro.sample("embeddings", EmbeddingProcess(stage, length, *scales))
    numpyro.sample("tokens", dist.Categorical(logits=transformer.decode(embeddings)[0]).to_event(1))


def transformer_model(
    tokens: Int[Array, "N m"] | None = None,
    *,
    config: TransformerConfig,
    priors: Priors | None = None,
    latents: Latents = "table",
    attention: ProcessAttention = "free",
    noise_scale: Float[Array, ""] | float = 1.0,
    first_scale: Float[Array, ""] | float = 1.0,
    barrier_weight: Float[Array, ""] | float = 0.0,
    penalty: Penalty = EMBEDDING_BARRIER,
    subsample_size: int | None = None,
    total_tokens: Float[Array, ""] | float | None = None,
    prompt: Int[Array, " m"] | None = None,
    length: int | None = None,
    remat: Remat = "none",
    dtype: DTypeLike = float,
) -> Transformer:
    """NumPyro model of weights, latents and tokens; returns the transformer with the weights of the draw.

    `tokens` are N sequences of m. With latents in a table the first token is given and the others follow, m <= context
    + 1; from the process all are emitted, m <= context, with the process's attention "free" (the prior stage, identity
    values) or "tied" (the first layer's heads, jointly with their own values). Sites: the weights; "embeddings" of the
    process; "tokens", whose log-likelihood is one number a sequence. Without `tokens` the site "tokens" is drawn: what
    follows the `prompt`, or from the process a text of `length` tokens.

    `priors` is one distribution for every weight, or distributions by name or pattern (`default_priors` unless given,
    in `dtype`; weights with other priors have the dtypes of these).
    `subsample_size` sequences are drawn from the N by NumPyro, as SVI does, or are given as a `jax.Array` under the
    plate's name by `substitute`; `find_map`, `laplace` and `nuts` need all the data, so leave it out for them.
    Where `tokens` is a minibatch that the caller has drawn, `total_tokens` says how many tokens all the data predict.
    `penalty` is the mean that the factor "barrier" weighs; its `mean`, `negative_share` and `variance` are recorded as
    deterministic sites "barrier_mean", ... Raises ValueError for arguments that do not fit.
    Source: the module docstring; theory sections 2, 5 and 11.
    """
    if not isinstance(config, TransformerConfig):
        raise ValueError(f"config: got {type(config).__name__}; pass a TransformerConfig.")
    _require(latents, attention, remat, tokens, prompt, length, config.context)
    require_barrier_weight(barrier_weight)
    if not is_zero(barrier_weight) and not callable(penalty):
        raise ValueError(f"penalty: got {penalty!r}; pass a callable such as HeadBarrier(site='layers').")
    if total_tokens is not None:
        if tokens is None or subsample_size is not None:
            raise ValueError(
                "total_tokens: given without tokens or with subsample_size; pass it where `tokens` is a minibatch "
                "already."
            )
        if require_positive("total_tokens", total_tokens).ndim:
            raise ValueError(f"total_tokens: has shape {jnp.shape(total_tokens)}; pass one number.")
    empty = template(config, dtype)
    is_table = latents == "table"
    if not is_table:
        # Not of this model: embeddings are drawn, and a tied process has no stage of its own.
        unused = ["token_embedding", "position_embedding"] + ["prior_stage"] * (attention == "tied")
        empty = eqx.tree_at(lambda t: [getattr(t, name) for name in unused], empty, [None] * len(unused))
    if priors is None:
        priors = default_priors(config, dtype)
        if not is_table:
            priors = {pattern: prior for pattern, prior in priors.items() if pattern != "*_embedding"}
    transformer = sampled_weights(empty, priors)
    stage = transformer.prior_stage if attention == "free" else transformer.blocks[0].attention("own")
    if tokens is None:
        _drawn_text(transformer, None if is_table else stage, prompt, length, (noise_scale, first_scale))
        return transformer
    tokens = require_integers("tokens", tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens: has shape {tokens.shape}; pass sequences (N, m), one of them as (1, m).")
    require_vocabulary("tokens", tokens, config.vocabulary)
    count, positions = tokens.shape[0], tokens.shape[1] - is_table
    if count == 0:
        raise ValueError(f"tokens: has shape {tokens.shape}; pass at least one sequence.")
    if subsample_size is not None:
        require_count("subsample_size", subsample_size, 1, "how many sequences a minibatch has")
        if subsample_size > count:
            raise ValueError(f"subsample_size: got {subsample_size}; pass at most {count}, the number of sequences.")
    if not 2 <= positions <= config.context:
        raise ValueError(
            f"tokens: has shape {tokens.shape}; pass {2 + is_table} to {config.context + is_table} a sequence."
        )
    total = count * positions if total_tokens is None else total_tokens
    minibatch = 1.0 if total_tokens is None else total_tokens / (count * positions)
    with handlers.scale(scale=minibatch), numpyro.plate("sequences", count, subsample_size=subsample_size) as drawn:
        _require_sequences(drawn, count, subsample_size)
        # Without a subsample all sequences in order, which on a mesh must not be gathered.
        batch = tokens if subsample_size is None else tokens[drawn]
        if is_table:
            embeddings, batch = jax.vmap(transformer.embed)(batch[:, :-1]), batch[:, 1:]
        else:
            process = EmbeddingProcess(stage, positions, noise_scale, first_scale)
            embeddings = numpyro.sample("embeddings", process)
        logits, attended = decoded(transformer, embeddings, remat)
        if not is_zero(barrier_weight):
            # The penalty's sweep before the decoder's backward pass and not beside it, where each slows the other.
            logits, attended = jax.lax.optimization_barrier((logits, attended))
            found = penalty(transformer, embeddings, attended)
            if not isinstance(found, BarrierPenalty) or jnp.ndim(found.mean):
                shape = f" of shape {jnp.shape(found.mean)}" if isinstance(found, BarrierPenalty) else ""
                raise ValueError(f"penalty: gave {type(found).__name__}{shape}; give a BarrierPenalty of shape ().")
            logits, found = jax.lax.optimization_barrier((logits, found))
        numpyro.sample("tokens", dist.Categorical(logits=logits).to_event(1), obs=batch)
    if not is_zero(barrier_weight):
        for name, value in found._asdict().items():
            numpyro.deterministic(f"barrier_{name}", value)
        numpyro.factor("barrier", -barrier_weight * total * found.mean)
    return transformer
