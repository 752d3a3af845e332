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
from numpyro.infer.util import constrain_fn
from numpyro.primitives import Messenger

from prob_transformer.inference.joint import Sites, negative_log_joint, observed_data
from prob_transformer.inference.reparam import embedding_process

Parameters = list[Float[Array, "..."]]


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


class Data(eqx.Module):
    """The observed sites at one point: their distributions, values, and the scales that plates put on them."""

    fns: dict[str, Any]
    values: dict[str, Num[Array, "..."]]
    scales: dict[str, Any]

    def loss(self) -> Float[Array, ""]:
        """The negative log-likelihood in nats."""
        terms = [jnp.sum(fn.log_prob(self.values[name])) * self.scales.get(name, 1.0) for name, fn in self.fns.items()]
        return -jnp.asarray(sum(terms, start=0.0))


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

    def constrained(self, z: Float[Array, " k"]) -> dict[str, Float[Array, "..."]]:
        """All latent sites in their supports, and what the model computes deterministically from them."""
        return constrain_fn(self.model, self.args, self.kwargs, {**self.held, **self.site_values(z)})

    def value(self, z: Float[Array, " k"]) -> Float[Array, ""]:
        """U(z) in nats."""
        return self._negative_log_joint(_Linearisable, z)

    def rest(self, z: Float[Array, " k"]) -> Float[Array, ""]:
        """U(z) without the likelihood, in nats."""
        return self._negative_log_joint(_WithoutData, z)

    def _negative_log_joint(self, handler: type[Messenger], z: Float[Array, " k"]) -> Float[Array, ""]:
        point: Sites = {**self.held, **self.site_values(z)}
        return negative_log_joint(handler(self.model), self.args, self.kwargs, "unconstrained", point)

    def trace(self, z: Float[Array, " k"]) -> dict[str, dict[str, Any]]:
        """NumPyro's trace of the model at z."""
        model = handlers.substitute(self.model, data=self.constrained(z))
        return handlers.trace(model).get_trace(*self.args, **self.kwargs)

    def data(self, z: Float[Array, " k"]) -> Data:
        """The observed sites at z."""
        trace = self.trace(z)
        values = observed_data(trace)
        fns = {name: trace[name]["fn"] for name in values}
        return Data(fns, values, {name: trace[name]["scale"] for name in values if trace[name]["scale"] is not None})

    def outputs(self) -> tuple[Callable[[Float[Array, " k"]], Parameters], Callable[[Parameters], Float[Array, ""]]]:
        """f and loss, so that U = loss(f(z)) + rest(z)."""
        # By leaves: NumPyro's masked distributions do not survive a tree of booleans in their place.
        fixed, structure = jax.tree.flatten(self.data(self.centre()))
        floating = [index for index, leaf in enumerate(fixed) if eqx.is_inexact_array(leaf)]

        def parameters(z: Float[Array, " k"]) -> Parameters:
            leaves = jax.tree.leaves(self.data(z))
            return [leaves[index] for index in floating]

        def loss(outputs: Parameters) -> Float[Array, ""]:
            leaves = list(fixed)
            for index, output in zip(floating, outputs, strict=True):
                leaves[index] = output
            return jax.tree.unflatten(structure, leaves).loss()

        return parameters, loss
