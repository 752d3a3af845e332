"""Sites of an EmbeddingProcess in a NumPyro model: finding them, sampling them by their noise, drawing from the prior.

    z ~ N(0, I),    u = root of u_i - mu_i(u_i; u_<i) = scale_i z_i        instead of        u ~ EmbeddingProcess

Where det J > 0 everywhere this is the same law in other coordinates, in which the prior is a standard normal. Past the
boundary u has the law of the root finder, which is not the |det J| density (docs/theory.md section 3).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import numpyro.infer
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.infer.reparam import Reparam

from prob_transformer.embedding_process import EmbeddingProcess
from prob_transformer.root_finder import SolveStatus
from prob_transformer.sampling import CausalAttentionTransform, named_solve_errors

# A site "u" that is sampled by its noise becomes the site "u_noise", the deterministic "u", and "u_solve_status" with
# the `SolveStatus` of every position.
NOISE, STATUS = "_noise", "_solve_status"

Processes = dict[str, tuple[EmbeddingProcess, Float[Array, "... n d"]]]


def unwrapped(fn: Any) -> Any:
    """The distribution behind expansion and masks; anything else as it is."""
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


def embedding_process(site: dict[str, Any]) -> EmbeddingProcess | None:
    """The process that a site of a trace is drawn from, behind expansion or masks; None for any other site."""
    fn = unwrapped(site.get("fn"))
    return fn if isinstance(fn, EmbeddingProcess) else None


def processes(trace: Mapping[str, dict[str, Any]]) -> Processes:
    """The embedding processes of a trace by site, each with its embeddings."""
    return {name: (process, site["value"]) for name, site in trace.items() if (process := embedding_process(site))}


def position_scales(process: EmbeddingProcess) -> Float[Array, "... n 1"]:
    """Standard deviation of the noise at every position, to be multiplied with noise (..., n, d)."""
    is_first = jnp.arange(process.length) == 0
    return jnp.where(is_first, process.first_scale[..., None], process.noise_scale[..., None])[..., None]


class NoiseReparam(Reparam):
    """NumPyro reparameterisation of an unobserved EmbeddingProcess site; the embeddings become a deterministic site.

    Besides the site "<name>_noise" (..., n, d) the model gains the deterministic "<name>_solve_status" (..., n), a
    `SolveStatus` a position. A position whose root was not found keeps its noise as its embedding, so that nothing is
    NaN: look at the status. Gradients follow the implicit function theorem. Raises ValueError for an observed site or
    another distribution.
    """

    def __call__(self, name: str, fn: dist.Distribution, obs: Any) -> tuple[None, Float[Array, "... n d"]]:
        process = embedding_process({"fn": fn})
        if process is None:
            raise ValueError(f"{name}: is drawn from {type(fn).__name__}; NoiseReparam takes an EmbeddingProcess.")
        if obs is not None:
            raise ValueError(f"{name}: is observed; only embeddings that are sampled can be sampled by their noise.")
        noise = numpyro.sample(name + NOISE, dist.Normal(0.0, 1.0).expand(fn.shape()).to_event(2))
        scaled = noise * position_scales(process)
        roots, status = CausalAttentionTransform(process.attention).solve(scaled)
        numpyro.deterministic(name + STATUS, status)
        embeddings = jnp.where((status == SolveStatus.NOT_CONVERGED)[..., None], scaled, roots)
        return None, embeddings


def through_noise(model: Callable) -> Callable:
    """The model with every unobserved EmbeddingProcess site sampled through its noise by `NoiseReparam`."""
    reparam = NoiseReparam()
    return handlers.reparam(
        model, config=lambda site: reparam if site["value"] is None and embedding_process(site) is not None else None
    )


class Predictive(numpyro.infer.Predictive):
    """NumPyro's `Predictive` for models with an `EmbeddingProcess`, with the same arguments.

    Where embeddings cannot be drawn, because det J <= 0 was met or no root was found, the call raises
    `ImplicitSolveError` with the status and its remedy, where NumPyro's own shows the traceback of a callback.
    """

    def __call__(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> dict[str, Array]:
        with named_solve_errors():
            return jax.block_until_ready(super().__call__(rng_key, *args, **kwargs))
