"""The sites of the weights: one for each array, its prior by name or pattern, and back to a transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import norm

from prob_transformer.transformer import Transformer, default_priors, with_weights
from prob_transformer.transformer.weight_sites import weights_of
from tests.helpers.tiny_transformer import TINY, trace_of


def test_every_array_is_a_site_and_nothing_else_is():
    sites = trace_of()
    drawn = {name for name, site in sites.items() if name.startswith("transformer")}
    assert drawn == set(weights_of(Transformer(jax.random.key(0), TINY)))
    assert sites.keys() - drawn == {"sequences", "tokens"}
    assert trace_of(barrier_weight=0.1).keys() - drawn == {
        "sequences", "tokens", "barrier", "barrier_mean", "barrier_negative_share", "barrier_variance",
    }  # fmt: skip


def test_default_priors_have_the_scale_of_the_inputs_of_each_map():
    sites = trace_of()
    scales = {"token_embedding": 1.0, "head": 2**-0.5, "blocks[1].down": 3**-0.5, "blocks[0].output": 1.0}
    for name, scale in scales.items():
        site = sites[f"transformer/{name}"]
        expected = norm.logpdf(np.asarray(site["value"]), 0, scale).sum()
        np.testing.assert_allclose(site["fn"].log_prob(site["value"]), expected, rtol=1e-6)


def test_a_name_goes_before_a_pattern_and_a_pattern_before_later_ones():
    priors = {"blocks.*": dist.Normal(5.0, 1e-9), "blocks[1].up": dist.Normal(7.0, 1e-9), "*": dist.Normal(0.0, 1e-9)}
    sites = trace_of(priors=priors)
    for name, mean in {"blocks[0].up": 5, "blocks[1].up": 7, "blocks[1].mlp_norm.scale": 5, "head": 0}.items():
        np.testing.assert_allclose(sites[f"transformer/{name}"]["value"], mean, atol=1e-6)


def test_default_priors_are_changed_by_a_name_after_them_or_a_pattern_before_them():
    mine = dist.Normal(7.0, 1e-9)
    for priors, changed in (
        (default_priors(TINY) | {"head": mine}, {"head"}),
        ({"blocks.*.query": mine} | default_priors(TINY), {"blocks[0].query", "blocks[1].query"}),
    ):
        sites = trace_of(priors=priors)
        means = {name: np.mean(np.asarray(site["value"])) for name, site in sites.items() if "/" in name}
        assert {name for name, mean in means.items() if abs(mean - 7) < 1e-6} == {f"transformer/{x}" for x in changed}


def test_a_prior_over_whole_rows_is_one_of_a_weight():
    rows = dist.MultivariateNormal(jnp.zeros(2), 0.01 * jnp.eye(2))
    sites = trace_of(priors={"head": rows, "*": dist.Normal()})
    assert sites["transformer/head"]["value"].shape == (3, 2)
    assert sites["transformer/head"]["fn"].event_dim == 2


def test_weights_go_to_sites_and_back_and_missing_ones_are_refused():
    transformer = Transformer(jax.random.key(0), TINY)
    sites = weights_of(transformer)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), with_weights(sites, TINY), transformer))
    del sites["transformer/head"]
    with pytest.raises(ValueError, match="lack transformer/head"):
        with_weights(sites, TINY)


def test_weights_of_other_sizes_are_refused():
    sites = weights_of(Transformer(jax.random.key(0), TINY))
    for config, message in (
        (dataclasses.replace(TINY, layers=1), r"weights: have transformer/blocks\[1\]"),
        (dataclasses.replace(TINY, vocabulary=4), "weights: transformer/token_embedding has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            with_weights(sites, config)
    draws = {name: jnp.stack([value, value]) for name, value in sites.items()}
    assert with_weights(draws, TINY).head.shape == (2, *sites["transformer/head"].shape)
    with pytest.raises(ValueError, match=r"transformer/head has shape \(3, 2\); this configuration has \(2, 3, 2\)"):
        with_weights(draws | {"transformer/head": sites["transformer/head"]}, TINY)
