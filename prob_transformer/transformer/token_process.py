"""The law of the tokens that follow a prompt, as a NumPyro distribution.

    log p(x_{m+1..m+n} | x_1..m) = sum_i log softmax(logits(x_<i))[x_i]

It is a law for all weights, and the laws of different lengths agree: the law of the first n tokens of a longer text is
this one's (Ionescu-Tulcea). Drawing goes token by token, the density takes one pass.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro.distributions import constraints

from prob_transformer._validation import require_count, require_integers, require_key
from prob_transformer.transformer.decoding import require_text
from prob_transformer.transformer.generation import require_finite_log_probs, sample
from prob_transformer.transformer.network import Transformer


class TokenProcess(dist.Distribution):
    """NumPyro distribution of the `length` tokens that follow a prompt (m,); event shape (length,), nats.

    The text fits the transformer's positions: m + length - 1 <= context. Raises ValueError where it does not, and for
    a prompt that is empty or outside the vocabulary.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    reparametrized_params: ClassVar[list[str]] = []
    pytree_data_fields = ("transformer", "prompt")
    pytree_aux_fields = ("length",)

    def __init__(
        self,
        transformer: Transformer,
        prompt: Int[Array, " m"],
        length: int,
        *,
        validate_args: bool | None = None,
    ):
        prompt = require_text("prompt", prompt, transformer)
        require_count("length", length, 1, "how many tokens follow the prompt")
        if prompt.size > transformer.context + 1 - length:
            raise ValueError(
                f"prompt: has shape {prompt.shape} with length {length}; pass m tokens, m + length - 1 at most the "
                f"context, {transformer.context}."
            )
        self.transformer, self.prompt, self.length = transformer, prompt, length
        super().__init__((), (length,), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        largest = self.transformer.head.shape[0] - 1
        return constraints.independent(constraints.integer_interval(0, largest), 1)

    def log_prob(self, value: Int[Array, "*S n"], intermediates: Any = None) -> Float[Array, "*S"]:
        """Nats of every continuation. Raises ValueError for those of another length, and for what is not integers."""
        value = require_integers("value", value)
        if value.shape[-1:] != (self.length,):
            raise ValueError(f"value: has shape {value.shape}; pass (..., n), n = {self.length}.")

        def of_one(continuation: Int[Array, " n"]) -> Float[Array, ""]:
            text = jnp.concatenate([self.prompt, continuation])
            logits = self.transformer(text[:-1])[self.prompt.size - 1 :]
            return dist.Categorical(logits=logits).log_prob(continuation).sum()

        flat = jax.lax.map(of_one, value.reshape(-1, self.length), batch_size=256)
        return flat.reshape(value.shape[:-1])

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Int[Array, "*S n"]:
        """Draws of shape (*sample_shape, n), token by token. Raises ValueError for a bad key or logits not finite."""
        keys = jax.random.split(require_key("key", key), math.prod(sample_shape))
        drawn = jax.vmap(lambda key: sample(self.transformer, self.prompt, key, self.length))(keys)
        require_finite_log_probs("transformer", drawn.log_probs)
        return drawn.tokens.reshape(*sample_shape, self.length)
