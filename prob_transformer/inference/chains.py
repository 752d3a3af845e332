"""Chains of NUTS side by side: starts, NumPyro's transitions and what each draw means, as one compiled function."""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from numpyro import handlers
from numpyro.infer.hmc import HMCState, hmc
from numpyro.infer.util import ParamInfo, constrain_fn, potential_energy

from prob_transformer.change_of_variables import residual_and_log_det
from prob_transformer.inference.embedding_sites import STATUS, processes, through_noise
from prob_transformer.inference.joint import RADIUS, Sites, log_likelihood, observed_data
from prob_transformer.inference.law import statistics
from prob_transformer.root_finder import SolveStatus

# NumPyro's own number of tries to find a start.
_TRIES = 100
_REPORTS = 100
_DESCRIBED_AT_ONCE = 32


# Draws as unconstrained coordinates, their statistics, their values, log-likelihood and new data by site, all of shape
# (chain, draw, ...), and whether all chains found a start.
Kept = tuple[Sites, Sites, Sites, Sites, Sites, Bool[Array, ""]]


# Who is told of the progress of a run. The compiled code knows the number of the run only, so it serves all of them.
_listeners: dict[int, Callable[[int], None]] = {}
_numbers = itertools.count()


def _report(run: Any, done: Any) -> None:
    listener = _listeners.get(int(run))
    if listener is not None:
        listener(int(done))


def _describe(
    model: Callable,
    plain: Callable,
    args: tuple,
    kwargs: dict,
    noise_sites: tuple[str, ...],
    predictive: bool,
    unconstrained: Sites,
    key: PRNGKeyArray,
) -> tuple[Sites, Sites, Sites, Sites]:
    """Values by site, log-likelihood, predictive draws and statistics at one point of the chain.

    `plain` is the model before its embeddings are sampled through their noise.
    """
    constrained = constrain_fn(model, args, kwargs, unconstrained)
    trace = handlers.trace(handlers.substitute(model, data=constrained)).get_trace(*args, **kwargs)
    statuses = [trace[name + STATUS]["value"] for name in noise_sites]
    past = sum(((status == SolveStatus.PAST_BOUNDARY).sum() for status in statuses), jnp.int32(0))
    lost = sum(((status == SolveStatus.NOT_CONVERGED).sum() for status in statuses), jnp.int32(0))
    found = processes(trace)
    for process, value in found.values():
        past = past + (residual_and_log_det(process.attention, value).sign <= 0).sum()
    hidden = {name + STATUS for name in noise_sites}
    values = constrained | {
        name: site["value"] for name, site in trace.items() if site["type"] == "deterministic" and name not in hidden
    }
    # Embeddings that were observed are left out: past the boundary there may be none to draw.
    drawn = [name for name in observed_data(trace) if predictive and name not in found]
    keys = jax.random.split(key, len(drawn) + 1)
    again = {name: trace[name]["fn"].sample(k) for name, k in zip(drawn, keys, strict=False)}
    law = statistics(handlers.trace(handlers.substitute(plain, data=values)).get_trace(*args, **kwargs))
    return values, log_likelihood(trace), again, {"past_boundary": past, "root_lost": lost} | law


@eqx.filter_jit
def _run(
    model: Callable,
    args: tuple,
    kwargs: dict,
    start: Sites,
    key: PRNGKeyArray,
    target_accept: Float[Array, ""],
    run: Int[Array, ""],
    *,
    warmup: int,
    draws: int,
    chains: int,
    max_tree_depth: int,
    dense_mass: bool,
    predictive: bool,
    given: tuple[str, ...],
    noise_sites: tuple[str, ...],
    reports: bool,
) -> Kept:
    # One compilation a model, settings and shapes: all that changes between calls comes in as an argument.
    plain = model
    model = through_noise(model) if noise_sites else model
    start_key, chain_key, predictive_key = jax.random.split(key, 3)

    def potential(z: Sites) -> Float[Array, ""]:
        return potential_energy(model, args, kwargs, z)

    def find_start(key: PRNGKeyArray) -> tuple[ParamInfo, Bool[Array, ""]]:
        def again(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            tried, key, _, _ = carry
            key, here = jax.random.split(key)
            keys = jax.random.split(here, len(start))
            z = {
                name: value if name in given else jax.random.uniform(k, value.shape, value.dtype, -RADIUS, RADIUS)
                for k, (name, value) in zip(keys, start.items(), strict=True)
            }
            value, slope = jax.value_and_grad(potential)(z)
            finite = jnp.isfinite(value) & jnp.stack([jnp.isfinite(g).all() for g in slope.values()]).all()
            return tried + 1, key, ParamInfo(z, value, slope), finite

        # Filled in by the first try, so that the density is compiled once.
        blank = ParamInfo(start, jnp.asarray(jnp.inf, float), jax.tree.map(jnp.zeros_like, start))
        untried = (jnp.int32(0), key, blank, jnp.asarray(False))
        return jax.lax.while_loop(lambda carry: ~carry[3] & (carry[0] < _TRIES), again, untried)[2:]

    starts, found = jax.vmap(find_start)(jax.random.split(start_key, chains))
    begin, transition = hmc(potential, algo="NUTS")

    def step(states: HMCState, i: Int[Array, ""]) -> tuple[HMCState, tuple[Sites, dict[str, Array]]]:
        states = jax.vmap(transition)(states)
        if reports:
            every = max(1, (warmup + draws) // _REPORTS)
            jax.lax.cond((i + 1) % every == 0, lambda: jax.debug.callback(_report, run, i + 1), lambda: None)
        stats = {
            name: getattr(states, name)
            for name in ("diverging", "num_steps", "accept_prob", "energy", "potential_energy")
        }
        return states, (states.z, stats | {"step_size": states.adapt_state.step_size})

    settings = {"target_accept_prob": target_accept, "dense_mass": dense_mass, "max_tree_depth": max_tree_depth}
    states = jax.vmap(lambda point, key: begin(point, warmup, step_size=1.0, rng_key=key, **settings))(
        starts, jax.random.split(chain_key, chains)
    )
    _, kept = jax.lax.scan(step, states, jnp.arange(warmup + draws))
    unconstrained, stats = jax.tree.map(lambda leaf: jnp.swapaxes(leaf[warmup:], 0, 1), kept)

    keys = jax.random.split(predictive_key, (chains, draws))

    # A few draws at a time: what describes one holds arrays of the size of the data and more.
    describe = partial(_describe, model, plain, args, kwargs, noise_sites, predictive)
    values, likelihood, again, troubled = jax.vmap(
        lambda chain: jax.lax.map(lambda draw: describe(*draw), chain, batch_size=_DESCRIBED_AT_ONCE)
    )((unconstrained, keys))
    return unconstrained, stats | troubled, values, likelihood, again, found.all()


def run_chains(
    model: Callable,
    args: tuple,
    kwargs: dict,
    start: Mapping[str, Float[Array, "..."]],
    key: PRNGKeyArray,
    target_accept: Float[Array, ""] | float,
    progress: Callable[[int], None] | None,
    **settings: Any,
) -> Kept:
    """All draws after warm-up; sites of `start` that are not `given` start at random, where the density is finite.

    `settings` are the keyword arguments of the compiled function, except `reports`: what a compilation is for, besides
    the model and shapes.
    """
    run = next(_numbers)
    if progress is not None:
        _listeners[run] = progress
    accept, number = jnp.asarray(target_accept, float), jnp.asarray(run)
    try:
        kept = _run(model, args, kwargs, start, key, accept, number, reports=progress is not None, **settings)
        if progress is not None:
            jax.effects_barrier()
    finally:
        _listeners.pop(run, None)
    return kept
