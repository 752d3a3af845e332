"""The joint density of a NumPyro model as a function of its latent sites: what every method of inference starts from.

    constrained      -log p(theta(z), y)
    unconstrained    -log p(theta(z), y) - log|d theta / d z|

z are unconstrained coordinates, theta(z) NumPyro's transforms of them onto the supports of the sites.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import constrain_fn, log_density, potential_energy

from prob_transformer._validation import require_finite, require_floating, require_key, require_seed

Space = Literal["constrained", "unconstrained"]
Sites = Mapping[str, Float[Array, "..."]]

# NumPyro's own radius of random starts.
RADIUS = 2.0


def joint_and_trace(
    model: Callable, args: tuple, kwargs: dict, space: Space, point: Sites
) -> tuple[Float[Array, ""], dict[str, dict[str, Any]]]:
    """Negative log joint in nats at unconstrained values of the latent sites, and the model's trace there, in one run.

    The space decides about the Jacobian.
    """
    run = handlers.trace(model)
    if space == "unconstrained":
        value = potential_energy(run, args, kwargs, point)
    else:
        value = -log_density(run, args, kwargs, constrain_fn(model, args, kwargs, point))[0]
    return value, run.trace


def observed_data(trace: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The values of the observed sites of a trace, factors left out."""
    # A factor is a sample site of the distribution Unit, observed as an empty array.
    return {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "sample" and site["is_observed"] and not isinstance(site["fn"], dist.Unit)
    }


def log_likelihood(trace: Mapping[str, dict[str, Any]]) -> dict[str, Float[Array, "..."]]:
    """The log density in nats of the observed sites of a trace, summed over the event of each alone."""
    return {name: trace[name]["fn"].log_prob(value) for name, value in observed_data(trace).items()}


def key_and_seed(key: PRNGKeyArray | int | None, purpose: str) -> tuple[PRNGKeyArray, int | None]:
    """The random key and None, or the key of an integer and that integer. Raises ValueError for anything else."""
    if isinstance(key, (jax.Array, np.ndarray)):
        return require_key("key", key), None
    if key is None:
        raise ValueError(f"key: got None; pass a JAX random key or an integer of at least 0, the seed of {purpose}.")
    require_seed("key", key, purpose)
    return jax.random.key(key), int(key)


def starting_point(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], init: Mapping[str, Any], key: PRNGKeyArray | None
) -> tuple[dict[str, Float[Array, "..."]], dict[str, dict[str, Any]], dict[str, Any]]:
    """Unconstrained starting values of all latent sites, the model's trace there, and its observed data.

    Running the model on concrete values validates its data.
    """
    if not callable(model):
        raise ValueError(f"model: got {type(model).__name__}; pass a function that is a NumPyro model.")
    if not isinstance(args, tuple):
        raise ValueError(f"model_args: got {type(args).__name__}; pass a tuple of the model's arguments, such as (y,).")
    for option, given in (("model_kwargs", kwargs), ("init", init)):
        if not isinstance(given, Mapping):
            raise ValueError(f"{option}: got {type(given).__name__}; pass a dict by name.")
    # Before the model runs: NumPyro's plates fail an assertion without a name.
    for leaf in jax.tree.leaves((args, kwargs)):
        if isinstance(leaf, (np.ndarray, jax.Array)) and leaf.size == 0:
            raise ValueError(f"model: an argument has shape {leaf.shape}; pass at least one observation.")
    start: dict[str, Float[Array, "..."]] = {}

    def value_of(site: dict[str, Any]) -> Float[Array, "..."] | None:
        if site["type"] != "sample" or site["is_observed"]:
            return None
        name, fn = site["name"], site["fn"]
        if fn.support.is_discrete:
            raise ValueError(f"model: site {name!r} is discrete and not observed; pass its data or sum it out.")
        transform, shape = biject_to(fn.support), fn.shape()
        if name in init:
            value = require_floating(f"init[{name!r}]", init[name])
            require_finite(f"init[{name!r}]", value)
            if value.shape != shape:
                raise ValueError(f"init[{name!r}]: has shape {value.shape}; pass {shape}.")
            if not np.asarray(fn.support(value)).all():
                raise ValueError(f"init[{name!r}]: lies outside {fn.support}; pass values inside the support.")
            point = transform.inv(value)
            if not np.isfinite(np.asarray(point)).all():
                raise ValueError(f"init[{name!r}]: lies on the edge of {fn.support}; pass values inside the support.")
        elif key is None:
            raise ValueError(f"init: has no value for {name!r}; pass one, or a key for a random start.")
        else:
            site_key = jax.random.fold_in(key, len(start))
            point = jax.random.uniform(site_key, transform.inverse_shape(shape), minval=-RADIUS, maxval=RADIUS)
        # Not weakly typed, which a Python number is and which would compile once more.
        start[name] = jnp.asarray(point, point.dtype)
        return transform(point)

    trace = handlers.trace(handlers.substitute(model, substitute_fn=value_of)).get_trace(*args, **kwargs)
    unknown = sorted(set(init) - set(start))
    if unknown:
        raise ValueError(f"init: names {', '.join(unknown)}; the model's latent sites are {', '.join(start)}.")
    if not start:
        raise ValueError("model: has no latent site; leave the parameters to be found unobserved.")
    observed = observed_data(trace)
    for name, value in observed.items():
        if jnp.size(value) == 0:
            raise ValueError(
                f"model: observed site {name!r} has shape {jnp.shape(value)}; pass at least one observation."
            )
    return start, trace, observed
