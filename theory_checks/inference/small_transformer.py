"""A transformer small enough for NUTS: what is known of it, texts of its own, and the functions that are compared.

Weights are not identified: with p = 1 the signs of W_Q and W_K, and of W_V and W_O, and the order of the mlp's units
leave the likelihood and the prior as they are. What is compared are functions of the weights that these symmetries
leave as they are, on held-out texts:

    attention logits      q_i . k_s less their mean over the visible s, which the softmax does not depend on
    output logits         less their mean over the vocabulary, for the same reason
    det J_i               of every layer's head alone with identity values, on the layer's normalised inputs
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro import handlers

from prob_transformer import stability_margin
from prob_transformer.inference import find_map
from prob_transformer.inference.map import MapResult
from prob_transformer.transformer import (
    TokenProcess,
    Transformer,
    TransformerConfig,
    transformer_model,
    with_weights,
)
from prob_transformer.transformer.weight_sites import weights_of

# 216 free weights where embeddings, norms and the prior stage are known.
CONFIG = TransformerConfig(vocabulary=3, context=5, layers=2, width=8, heads=1, head_size=1, hidden=4)
# 200 weights in all.
NARROW = TransformerConfig(vocabulary=4, context=6, layers=2, width=4, heads=1, head_size=1, hidden=4)
# The name of every site that is known contains one of these.
KNOWN = ("embedding", "norm", "prior_stage")
Weights: TypeAlias = Mapping[str, Float[Any, "..."]]


class Sizes(NamedTuple):
    """Sizes of a whole run; a result is a function of these, the code and the machine."""

    seed: int = 0
    sequences: int = 60
    held_out: int = 200
    # Held-out texts on which logits and det J are compared.
    compared: int = 4
    starts: int = 4
    warmup: int = 400
    draws: int = 1000
    free_warmup: int = 200
    free_draws: int = 200
    chains: int = 4
    max_tree_depth: int = 6
    target_accept: float = 0.9
    laplace_draws: int = 4000
    importance_draws: int = 20_000
    free_steps: int = 1000


QUICK = Sizes(
    sequences=4, held_out=6, compared=2, starts=1, warmup=20, draws=20, free_warmup=5, free_draws=5, max_tree_depth=3,
    laplace_draws=20, importance_draws=200, free_steps=50,
)  # fmt: skip


class Task(NamedTuple):
    """A model of its free weights with its texts and keyword arguments, the weights known and those of the truth."""

    model: Callable[..., Any]
    texts: Int[Array, "N m"]
    given: dict[str, Any]
    known: Weights
    truth: Weights
    held_out: Int[Array, "M m"]

    def transformer(self, free: Weights) -> Transformer:
        """The transformer with these free weights and the known ones."""
        return with_weights({**self.known, **free}, self.given["config"])

    def at_draws(self, function: Callable[[Transformer], Any], draws: Weights) -> Any:
        """A function of the transformer at every draw of the free weights (D, ...)."""
        return jax.jit(lambda of: jax.lax.map(lambda free: function(self.transformer(free)), of, batch_size=50))(
            {name: jnp.asarray(value) for name, value in draws.items()}
        )

    def with_free(self, names: Sequence[str]) -> "Task":
        """The task with the weights of these sites free. The others are no sites of its model, so that no method counts
        them as data."""
        known = {name: value for name, value in self.truth.items() if name not in names}
        model = handlers.block(handlers.condition(transformer_model, data=known), hide=list(known))
        return self._replace(model=model, known=known)


@eqx.filter_jit
def _drawn_text(transformer: Transformer, key: PRNGKeyArray, first: Int[Array, " 1"]) -> Int[Array, " m"]:
    return jnp.concatenate([first, TokenProcess(transformer, first, transformer.context).sample(key)])


def drawn_texts(transformer: Transformer, key: PRNGKeyArray, count: int) -> Int[Array, "count m"]:
    """Texts of context + 1 tokens from the law of the transformer, the first token uniform."""
    first_key, key = jax.random.split(key)
    first = jax.random.randint(first_key, (count, 1), 0, transformer.head.shape[0])
    # One at a time, so that any number of them takes one compilation.
    return jnp.stack([_drawn_text(transformer, *of) for of in zip(jax.random.split(key, count), first, strict=True)])


def task(seed: int, sequences: int, held_out: int, config: TransformerConfig = CONFIG) -> Task:
    """Texts of a transformer drawn from the default priors, except that its norms are as at initialisation."""
    keys = jax.random.split(jax.random.key(seed), 3)
    given = {"config": config, "dtype": float}
    # Tokens that are given are not drawn.
    no_text = handlers.condition(transformer_model, data={"tokens": jnp.zeros(1, int)})
    prior = handlers.seed(no_text, keys[0])(**given, prompt=jnp.zeros(1, int), length=1)
    norms = {name: value for name, value in weights_of(Transformer(keys[0], config, float)).items() if "norm" in name}
    truth = weights_of(prior) | norms
    texts, others = (
        drawn_texts(with_weights(truth, config), key, count)
        for key, count in zip(keys[1:], (sequences, held_out), strict=True)
    )
    empty = Task(transformer_model, texts, given, {}, truth, others)
    return empty.with_free([name for name in truth if not any(part in name for part in KNOWN)])


def functionals(transformer: Transformer, texts: Int[Array, "K n"]) -> dict[str, Float[Array, " k"]]:
    """Attention logits, output logits and det J_i of texts, each flat, without those that all weights give alike."""
    length = texts.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool))
    # The first position sees one key only.
    rows, columns = (index[1:] for index in np.tril_indices(length))

    def of_text(tokens: Int[Array, " n"]) -> dict[str, Float[Array, "..."]]:
        logits, attended = transformer.decode(transformer.embed(tokens))
        dots = jnp.einsum("lhpi,lhps->lhis", attended.queries, attended.keys)
        mean = jnp.where(visible, dots, 0).sum(-1, keepdims=True) / visible.sum(-1, keepdims=True)
        margins = [
            stability_margin(block.attention(), inputs)
            for block, inputs in zip(transformer.blocks, attended.inputs, strict=True)
        ]
        return {
            "attention logits": (dots - mean)[..., rows, columns],
            "output logits": logits - logits.mean(-1, keepdims=True),
            # det J_i = 1 with fewer than two earlier tokens.
            "det J": jnp.stack(margins)[:, 2:],
        }

    return jax.tree.map(jnp.ravel, jax.vmap(of_text)(texts))


def log_scores(transformer: Transformer, texts: Int[Array, "M m"]) -> Float[Array, " M"]:
    """log p of the tokens of each text after its first, in nats."""
    log_p = jax.nn.log_softmax(jax.vmap(transformer)(texts[:, :-1]))
    return jnp.take_along_axis(log_p, texts[:, 1:, None], -1).sum((1, 2))


def searched(one: Task, sizes: Sizes, max_steps: int = 30_000) -> list[MapResult]:
    """Where searches for the mode from several random starts end, the lowest potential first."""
    search = partial(find_map, one.model, space="unconstrained", model_args=(one.texts,), model_kwargs=one.given)
    found = [search(key=sizes.seed + start, max_steps=max_steps) for start in range(sizes.starts)]
    return sorted(found, key=lambda mode: mode.objective)
