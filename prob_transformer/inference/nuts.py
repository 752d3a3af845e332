"""NUTS: NumPyro's transition, in one compiled loop over chains side by side.

    potential    U(z) = -log p(theta(z), y) - log|d theta / d z|                       in nats, z unconstrained

Embeddings are sampled "direct", with the density of the EmbeddingProcess, or through their "noise" (see reparam). In
the safe region both have one posterior. Past the boundary they differ: "direct" has the |det J| density, whose mass
exceeds 1 and whose walls det J = 0 the chain may jump; "noise" has the law of the root finder. Draws that show it have
a status that says so.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.infer.util import constrain_fn

from prob_transformer._validation import is_concrete, require_count
from prob_transformer.change_of_variables import residual_and_log_det
from prob_transformer.inference.chains import Settings, run_chains
from prob_transformer.inference.gauge import gauges
from prob_transformer.inference.joint import key_and_seed, negative_log_joint, observed_data, starting_point
from prob_transformer.inference.law import NO_LAW, Law, law_of, processes
from prob_transformer.inference.nuts_result import NutsResult, diagnose
from prob_transformer.inference.reparam import embedding_process, noise_name, position_scales, through_noise

Embeddings = Literal["direct", "noise"]


def _through_their_noise(trace: Mapping[str, Any], start: dict[str, Array]) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The start with embeddings replaced by the noise that gives them, and the names of their sites."""
    start, names = dict(start), []
    for name, site in trace.items():
        process = embedding_process(site)
        if process is not None and not site["is_observed"]:
            residual = residual_and_log_det(process.attention, site["value"]).residual
            del start[name]
            start[noise_name(name)] = residual / position_scales(process)
            names.append(name)
    if not names:
        raise ValueError("embeddings: is 'noise', but no latent site is an EmbeddingProcess; pass 'direct'.")
    return start, tuple(names)


@contextlib.contextmanager
def _bar(transitions: int) -> Iterator[Callable[[int], None] | None]:
    """What to tell of progress: a bar on standard error where that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=transitions, desc="nuts, compiling", unit="transition") as bar:

        def show(done: int) -> None:
            bar.set_description("nuts", refresh=False)
            bar.update(done - bar.n)

        yield show


def _law(model: Callable, args: tuple, kwargs: dict, values: dict[str, Any], stats: dict[str, Any]) -> Law:
    """The law behind all draws, whose mass is that of the draw with the largest eigenvalue of A + A^T."""
    if "certified" not in stats:
        return NO_LAW
    worst = np.unravel_index(np.argmax(stats["symmetric_eigenvalue"]), stats["certified"].shape)
    point = {name: value[worst] for name, value in values.items()}
    trace = handlers.trace(handlers.substitute(model, data=point)).get_trace(*args, **kwargs)
    return law_of(processes(trace), stats["certified"])


_potential = eqx.filter_jit(negative_log_joint)


def nuts(
    key: PRNGKeyArray | int,
    model: Callable,
    *,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] = {},
    warmup: int = 500,
    draws: int = 1000,
    chains: int = 2,
    embeddings: Embeddings = "direct",
    target_accept: Float[Array, ""] | float = 0.8,
    init: Mapping[str, Float[Array, "..."]] | None = None,
    dense_mass: bool = False,
    max_tree_depth: int = 10,
    predictive: bool = True,
    progress: Callable[[int], None] | bool = True,
) -> NutsResult:
    """Draws from the posterior of a NumPyro model given its arguments; look at the result's `status`.

    `key` is a JAX random key, or an integer seed, which results are then labelled with. All chains start at the
    values in `init`, by site and in their supports, and at random where it has none. `embeddings` says how sites of an
    EmbeddingProcess are sampled: "direct", or by their "noise"; these have one posterior in the safe region, and past
    the boundary the |det J| density and the law of the root finder (module docstring). `predictive` draws observed
    sites anew given each draw. `progress` is True for a bar where standard error is a terminal, False for none, or a
    function that is called with the number of transitions made, about a hundred times.

    Compiled once for a model, the shapes of its arrays and the counts given: pass the same function again, not a new
    closure. Chains that go wrong are returned with their `NutsStatus`. Raises ValueError for unknown names, shapes or
    values in `init`, discrete latent sites, empty data, and other bad arguments.
    """
    require_count("warmup", warmup, 0, "the number of transitions that adapt and are dropped")
    require_count("draws", draws, 4, "halves of chains are compared")
    require_count("chains", chains, 1, "the number of chains")
    require_count("max_tree_depth", max_tree_depth, 1, "the number of doublings of a trajectory")
    if embeddings not in get_args(Embeddings):
        raise ValueError(f"embeddings: got {embeddings!r}; pass one of {', '.join(get_args(Embeddings))}.")
    if is_concrete(target_accept) and not 0 < float(target_accept) < 1:
        raise ValueError(f"target_accept: got {target_accept}; pass a share of steps between 0 and 1.")
    random_key, seed = key_and_seed(key, "the draws")
    args, kwargs = model_args, dict(model_kwargs)
    init = {} if init is None else init
    point_key, run_key = jax.random.split(random_key)
    start = starting_point(model, args, kwargs, init, point_key)
    here = constrain_fn(model, args, kwargs, start)
    trace = handlers.trace(handlers.substitute(model, data=here)).get_trace(*args, **kwargs)
    given, noise_sites = set(init), tuple[str, ...]()
    if embeddings == "noise":
        start, noise_sites = _through_their_noise(trace, start)
        given = {noise_name(name) if name in noise_sites else name for name in given}
    # NumPyro draws momenta in JAX's default precision whatever that of the positions.
    start = {name: jnp.asarray(value, jnp.result_type(float)) for name, value in start.items()}
    shown = _bar(warmup + draws) if progress is True else contextlib.nullcontext(progress or None)
    with shown as listener:
        settings = Settings(
            warmup=warmup,
            draws=draws,
            chains=chains,
            max_tree_depth=max_tree_depth,
            dense_mass=dense_mass,
            predictive=predictive,
            given=tuple(sorted(given)),
            noise_sites=noise_sites,
            reports=listener is not None,
        )
        kept = jax.tree.map(
            np.asarray, run_chains(model, args, kwargs, start, run_key, target_accept, settings, listener)
        )
    arrays = [*kept.unconstrained.values(), *kept.values.values(), kept.stats["potential_energy"]]
    finite = bool(kept.started) and all(np.isfinite(array).all() for array in arrays)
    r_hat, ess = diagnose(kept.unconstrained)
    latent = {name for name, site in trace.items() if site["type"] == "sample"} | set(kept.unconstrained)
    result = NutsResult(
        draws=kept.values,
        sample_stats=kept.stats,
        r_hat=r_hat,
        ess=ess,
        log_likelihood=kept.log_likelihood,
        posterior_predictive=kept.predictive,
        observed_data=observed_data(trace),
        finite=finite,
        configuration={
            "warmup": warmup,
            "draws": draws,
            "chains": chains,
            "embeddings": embeddings,
            "target_accept": float(target_accept),
        },
        seed=seed,
        deterministic=diagnose({name: value for name, value in kept.values.items() if name not in latent}),
        law=_law(model, args, kwargs, kept.values, kept.stats) if finite else NO_LAW,
    )
    if not finite or not result.not_mixed:
        return result
    sampled = through_noise(model) if noise_sites else model
    last = {name: jnp.asarray(value[0, -1]) for name, value in kept.unconstrained.items()}

    def potential(point: Mapping[str, Array]) -> Array:
        return _potential(sampled, args, kwargs, "unconstrained", dict(point))

    return result._replace(gauges=gauges(potential, last, result.not_mixed))
