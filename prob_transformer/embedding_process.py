"""The stochastic process over embeddings whose conditional law is attention plus noise.

    u_1 ~ N(0, first_scale^2 I),      u_i = mu_i(u_i; u_<i) + eps_i,   eps_i ~ N(0, noise_scale^2 I)
    log p(u_1..n) = sum_i [ log N(e_i; 0, scale_i^2 I) + log|det J_i| ]

This is a probability law where det J_i > 0 everywhere; past the degeneracy boundary its mass exceeds 1 by the
expected number of roots (docs/theory.md section 3; `python -m theory_checks --only normalisation` shows it).
"""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from prob_transformer._dtypes import in_float32_at_least
from prob_transformer._implementation import Implementation, is_blocked
from prob_transformer._validation import require_count, require_finite, require_floating, require_key, require_positive
from prob_transformer.attention import Attention, Past, require_attention
from prob_transformer.change_of_variables import residual_and_log_det_at, residual_and_log_det_unchecked
from prob_transformer.sampling import CausalAttentionTransform, Solution, raise_unless_converged


def _normal_log_density(residual: Float[Array, "... d"], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    # Divided before it is squared: scale^2 underflows in float32 from 1e-19 on.
    squared = jnp.square(residual / scale[..., None]).sum(-1)
    return -0.5 * squared - residual.shape[-1] * (jnp.log(scale) + 0.5 * math.log(2 * math.pi))


class EmbeddingProcess(dist.Distribution):
    """NumPyro distribution of n = `length` embeddings of width d under an attention; event shape (n, d), nats.

    `noise_scale` and `first_scale` are standard deviations; their broadcast shape is the batch shape. With
    `implementation` "blocked" the density of a sequence takes memory linear in its length, and has reverse-mode
    gradients. Raises ValueError for a length below 2, scales that are not positive and finite, or another name.
    """

    arg_constraints: ClassVar = {"noise_scale": constraints.positive, "first_scale": constraints.positive}
    support = constraints.real_matrix
    reparametrized_params: ClassVar = ["noise_scale", "first_scale"]
    pytree_data_fields = ("attention", "noise_scale", "first_scale")
    pytree_aux_fields = ("length", "implementation")

    def __init__(
        self,
        attention: Attention,
        length: int,
        noise_scale: Float[Array, "..."] | np.floating | float = 1.0,
        first_scale: Float[Array, "..."] | np.floating | float = 1.0,
        *,
        implementation: Implementation | None = None,
        validate_args: bool | None = None,
    ):
        require_attention(attention)
        require_count("length", length, 2, "the first position has no past to attend to")
        noise_scale = require_positive("noise_scale", noise_scale)
        first_scale = require_positive("first_scale", first_scale)
        is_blocked(implementation)
        self.attention, self.length, self.implementation = attention, length, implementation
        self.noise_scale, self.first_scale = jnp.broadcast_arrays(noise_scale, first_scale)
        super().__init__(self.noise_scale.shape, (length, attention.width), validate_args=validate_args)

    @property
    def _mapped_axes(self) -> tuple[int, ...]:
        """Leading axes of the parameters of a process that was made inside `jax.vmap` and is used outside."""
        return self.attention.query.shape[:-3]

    def _scales(self) -> Float[Array, "... n"]:
        is_first = jnp.arange(self.length) == 0
        return jnp.where(is_first, self.first_scale[..., None], self.noise_scale[..., None])

    @in_float32_at_least
    def position_log_prob(self, value: Float[Array, "... n d"]) -> Float[Array, "... n"]:
        """log p(u_i | u_<i) in nats at every position; their sum is `log_prob`. Raises ValueError for a wrong shape."""
        value = require_finite("value", value)
        if value.shape[-2:] != self.event_shape:
            raise ValueError(f"value: has shape {value.shape}; pass (..., n, d) ending in {self.event_shape}.")
        mapped = self._mapped_axes
        if mapped:
            value = jnp.broadcast_to(value, (*jnp.broadcast_shapes(value.shape[:-2], mapped), *self.event_shape))
            axis = value.ndim - 2 - len(mapped)
            of_one = jax.vmap(lambda process, value: process.position_log_prob(value), (0, axis), axis)
            return of_one(self, value)
        residual, _, log_det = residual_and_log_det_unchecked(self.attention, value, self.implementation)
        return _normal_log_density(residual, self._scales()) + log_det

    @validate_sample
    def log_prob(self, value: Float[Array, "... n d"], intermediates: Any = None) -> Float[Array, "..."]:
        return self.position_log_prob(value).sum(-1)

    @in_float32_at_least
    def solve_sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Solution:
        """Draws with a `SolveStatus` a position, for those who want the root found past the boundary as well."""
        if self._mapped_axes:
            return jax.vmap(lambda process: process.solve_sample(key, sample_shape), out_axes=len(sample_shape))(self)
        dtype = jnp.result_type(self.noise_scale, self.attention.query)
        noise = jax.random.normal(key, self.shape(sample_shape), dtype)
        scales = jnp.broadcast_to(self._scales()[..., None], noise.shape)
        return CausalAttentionTransform(self.attention).solve(noise * scales)

    def sample(self, key: PRNGKeyArray | None, sample_shape: tuple[int, ...] = ()) -> Float[Array, "... n d"]:
        """Draws of shape (*sample_shape, n, d), which follow the density exactly where det J > 0 everywhere.

        Raises `ImplicitSolveError` where the solver found no root or found det J <= 0 on its path. A narrow crossing
        can be missed (docs/limits.md).
        """
        return raise_unless_converged(self.solve_sample(require_key("key", key), sample_shape))

    def empty_past(self) -> Past:
        """The cache before the first position, with room for `length` of them, in float32 at least."""
        dtype = jnp.result_type(self.noise_scale, self.attention.query)
        return Past.empty(self.attention, self.length, jnp.promote_types(dtype, jnp.float32))

    @in_float32_at_least
    def extend(self, past: Past, embedding: Float[Array, " d"]) -> tuple[Float[Array, "..."], Past]:
        """log p(embedding | past) in nats, and the cache with the embedding added: one more position of the sequence.

        Adding positions one by one from `empty_past` gives the density of the whole sequence. Raises ValueError for a
        wrong shape or a full cache.
        """
        embedding = require_floating("embedding", embedding)
        if embedding.shape != (self.attention.width,):
            raise ValueError(f"embedding: has shape {embedding.shape}; pass (d,) = ({self.attention.width},).")
        if past.visible.shape != (self.length,):
            raise ValueError(f"past: holds {past.visible.shape} positions; start from empty_past(), ({self.length},).")
        position = past.position
        full = "past: is full; make the process with a larger length."
        if isinstance(position, jax.core.Tracer):
            position = eqx.error_if(position, position >= self.length, full)
            past = eqx.tree_at(lambda past: past.position, past, position)
        elif int(position) >= self.length:
            raise ValueError(full)
        residual, _, log_det = residual_and_log_det_at(self.attention, past, embedding)
        scale = jnp.where(position == 0, self.first_scale, self.noise_scale)
        return _normal_log_density(residual, scale) + log_det, past.write(self.attention, embedding)
