"""The potential U around a mode, as a function of the flat vector z of the sites that are approximated.

    U(z) = loss(f(z)) + rest(z)

f(z) are the parameters of the distributions of the data (logits, a mean), loss the negative log-likelihood as a
function of them, and rest the negative log density of the latent sites and factors less log|d theta / d z|. Sites that
are not chosen are held at the mode. The parameters in z are ordered by the names of their sites, each site row by row.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Num
from numpyro import handlers
from numpyro.primitives import Messenger

from prob_transformer.inference.embedding_sites import embedding_process
from prob_transformer.inference.joint import joint_and_trace, observed_data

Parameters = list[Float[Array, "..."]]
Arguments = tuple[tuple, dict[str, Any]]
Trace = dict[str, dict[str, Any]]


class _Linearisable(Messenger):
    """The same model, refused where JAX cannot make a linear map of its gradient."""

    def process_message(self, msg: Any) -> None:
        process = embedding_process(msg)
        if process is not None and process.implementation == "blocked":
            raise ValueError(
                f"model: site {msg['name']!r} has implementation='blocked', whose gradient cannot be linearised; pass "
                "implementation='reference', which has the same density: to find_map, or to the model of its result "
                "by mode._replace(model_kwargs=...)."
            )


class _WithoutData(_Linearisable):
    """The same model without its likelihood: data keep their values and get the log-density 0."""

    def process_message(self, msg: Any) -> None:
        super().process_message(msg)
        if observed_data({"": msg}):
            msg["fn"] = msg["fn"].mask(False)


class Potential(eqx.Module):
    """A NumPyro model with its arguments, and the unconstrained mode: `mean` of the sites that vary, others `held`."""

    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    mean: dict[str, Float[Array, "..."]]
    held: dict[str, Float[Array, "..."]]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that vary, in the order of the parameters."""
        return tuple(sorted(self.mean))

    def centre(self) -> Float[Array, " k"]:
        """The mean as a flat vector."""
        return ravel_pytree(self.mean)[0]

    def site_values(self, z: Float[Array, " k"]) -> dict[str, Float[Array, "..."]]:
        """Unconstrained values of the sites that vary."""
        return ravel_pytree(self.mean)[1](z)

    def value(self, z: Float[Array, " k"]) -> Float[Array, ""]:
        """U(z) in nats."""
        return self._joint_and_trace(_Linearisable(self.model), z)[0]

    def rest(self, z: Float[Array, " k"]) -> Float[Array, ""]:
        """U(z) without the likelihood, in nats."""
        return self._joint_and_trace(_WithoutData(self.model), z)[0]

    def trace(self, z: Float[Array, " k"], arguments: Arguments | None = None) -> Trace:
        """NumPyro's trace of the model at z, also when called with other arguments, which may leave out the data."""
        # The seed is for these; nothing here depends on what is drawn for them.
        return self._joint_and_trace(handlers.seed(self.model, jax.random.key(0)), z, arguments)[1]

    def _joint_and_trace(
        self, model: Callable, z: Float[Array, " k"], arguments: Arguments | None = None
    ) -> tuple[Float[Array, ""], Trace]:
        args, kwargs = arguments or (self.args, self.kwargs)
        return joint_and_trace(model, args, kwargs, "unconstrained", {**self.held, **self.site_values(z)})

    def outputs(self) -> tuple[Callable[[Float[Array, " k"]], Parameters], Callable[[Parameters], Float[Array, ""]]]:
        """f and loss, so that U = loss(f(z)) + rest(z)."""

        def data(z: Float[Array, " k"]) -> list[tuple[Any, Num[Array, "..."], Any]]:
            """Distribution, value and plates' scale of every observed site."""
            trace = self.trace(z)
            return [(trace[name]["fn"], value, trace[name]["scale"]) for name, value in observed_data(trace).items()]

        # By leaves: NumPyro's masked distributions do not survive a tree of booleans in their place.
        fixed, structure = jax.tree.flatten(data(self.centre()))
        floating = [index for index, leaf in enumerate(fixed) if eqx.is_inexact_array(leaf)]

        def parameters(z: Float[Array, " k"]) -> Parameters:
            leaves = jax.tree.leaves(data(z))
            return [leaves[index] for index in floating]

        def loss(outputs: Parameters) -> Float[Array, ""]:
            leaves = list(fixed)
            for index, output in zip(floating, outputs, strict=True):
                leaves[index] = output
            sites = jax.tree.unflatten(structure, leaves)
            terms = [jnp.sum(fn.log_prob(value)) * (1.0 if scale is None else scale) for fn, value, scale in sites]
            return -jnp.asarray(sum(terms, start=0.0))

        return parameters, loss
