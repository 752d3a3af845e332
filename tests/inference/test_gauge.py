"""W_Q and W_K are identified up to a common rotation only: Laplace and NUTS count that, name it, and offer A."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer.util import potential_energy

from prob_transformer import Attention, EmbeddingProcess, sampled_attention
from prob_transformer.inference import NutsStatus, find_map, nuts
from prob_transformer.inference.gauge import gauges
from prob_transformer.inference.laplace import FlatDirectionsError, laplace

WIDTH = 3
RNG = np.random.default_rng(0)
KEYS, QUERIES = RNG.normal(size=(2, 60, WIDTH))
LOGITS = np.einsum("na,ab,nb->n", KEYS, RNG.normal(size=(WIDTH, WIDTH)), QUERIES) + 0.3 * RNG.normal(size=60)


def observed(attention, logits):
    """Noisy attention logits, which attention enters as in the process: by its interaction alone."""
    mean = jnp.einsum("na,ab,nb->n", KEYS, attention.interaction[0], QUERIES)
    numpyro.sample("logits", dist.Normal(mean, 0.3).to_event(1), obs=logits)


def one_head(logits, head_size):
    observed(sampled_attention(WIDTH, head_size, 0.7), logits)


def rows_of_different_scale(logits):
    """No rotation of the rows leaves this prior as it is."""
    prior = dist.Normal(0.0, jnp.array([[0.5], [1.0]])).expand([2, WIDTH]).to_event(2)
    observed(Attention(numpyro.sample("query", prior)[None], numpyro.sample("key", prior)[None]), logits)


def interaction_itself(logits):
    interaction = numpyro.sample("interaction", dist.Normal(0.0, 0.5).expand([WIDTH, WIDTH]).to_event(2))
    observed(Attention(jnp.sqrt(WIDTH) * interaction[None], jnp.eye(WIDTH)[None]), logits)


def process(embeddings):
    numpyro.sample("embeddings", EmbeddingProcess(sampled_attention(2, 2), len(embeddings)), obs=embeddings)


def hessian_eigenvalues(model, *args, at):
    flat, unravel = ravel_pytree(at.unconstrained)
    return np.linalg.eigvalsh(jax.hessian(lambda z: potential_energy(model, args, {}, unravel(z)))(flat))


@pytest.mark.parametrize("tolerance", [1e-6, 1e-9])
@pytest.mark.parametrize("head_size", [1, 2, 3])
def test_laplace_counts_the_directions_that_the_hessian_has_none_of(head_size, tolerance):
    at = find_map(one_head, model_args=(LOGITS, head_size), space="unconstrained", key=1, tolerance=tolerance)
    assert at.converged
    eigenvalues = hessian_eigenvalues(one_head, LOGITS, head_size, at=at)
    flat = int((np.abs(eigenvalues) < 1e-6 * eigenvalues.max()).sum())
    assert flat == head_size * (head_size - 1) // 2
    if not flat:
        found = laplace(at)
        np.testing.assert_allclose(found.precision.log_det, np.log(eigenvalues).sum(), rtol=1e-8)
        return
    with pytest.raises(FlatDirectionsError, match=rf"^precision: .* with {flat} flat .*'key' and 'query'") as info:
        laplace(at)
    assert info.value.directions == flat
    for remedy in ("numpyro.deterministic('interaction'", "sampled_attention", "`sites`"):
        assert remedy in str(info.value)
    assert np.isfinite(laplace(at, sites=("query",)).log_evidence)
    # The Gauss-Newton matrix has the curvature of the prior, 1 / 0.7^2, wherever A stays: along W_Q -> G W_Q,
    # W_K -> G^-T W_K for any invertible G.
    ggn = laplace(at, curvature="ggn").precision.eigenvalues
    assert (np.abs(ggn - 0.7**-2) < 1e-6).sum() == head_size**2


def test_directions_are_counted_in_every_head_and_are_fewer_where_a_head_has_a_low_rank():
    # Orthogonal p x p matrices that leave r directions alone are those of the other p - r, so [W_Q W_K] of rank r has
    # p (p - 1) / 2 - (p - r) (p - r - 1) / 2 flat directions: of p = 4, five with r = 2 and three with r = 1.
    rng = np.random.default_rng(2)
    query, key = rng.normal(size=(2, 2, 4, 1))
    key[1] = 3 * query[1]

    def potential(point):
        interaction = jnp.einsum("hpa,hpb->hab", point["key"], point["query"])
        return jnp.sin(interaction).sum() + jnp.square(point["query"]).sum()

    (found,) = gauges(potential, {"query": jnp.asarray(query), "key": jnp.asarray(key)}, ("query", "key"))
    assert found.directions == 5 + 3


@pytest.mark.parametrize(("size", "dtype"), [(0.0, jnp.float64), (1e-7, jnp.float64), (3e-5, jnp.float32)])
def test_weights_that_are_0_at_the_mode_are_not_taken_for_rotations(size, dtype):
    """Every rotation leaves a 0 alone, but no direction is flat there."""
    rng = np.random.default_rng(0)
    small = {name: jnp.asarray(size * rng.normal(size=(1, 2, 3)), dtype) for name in ("key", "query", "value")}

    def potential(point):
        attended = jnp.einsum("hpa,hpb->ab", point["key"], point["query"])
        prior = sum((x**2).sum() / 2 for x in point.values())
        return jnp.sin(0.2 * attended).sum() + jnp.cosh(point["value"]).sum() + prior

    flat, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, small))
    assert not jax.grad(lambda z: potential(unravel(z)))(flat).any()
    assert np.linalg.eigvalsh(jax.hessian(lambda z: potential(unravel(z)))(flat)).min() > 0.3
    (found,) = gauges(potential, small, tuple(small))
    assert found == (("key", "query"), 0)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_so_it_is_for_the_query_and_key_of_a_process(curvature):
    walk = np.random.default_rng(1).normal(size=(5, 2))
    at = find_map(process, model_args=(walk,), space="unconstrained", key=1)
    with pytest.raises(FlatDirectionsError, match="with 1 flat directions"):
        laplace(at, curvature=curvature)


@pytest.mark.parametrize("model", [rows_of_different_scale, interaction_itself])
def test_a_model_without_flat_directions_is_not_refused(model):
    at = find_map(model, model_args=(LOGITS,), space="unconstrained", key=1, tolerance=1e-9)
    eigenvalues = hessian_eigenvalues(model, LOGITS, at=at)
    assert eigenvalues.min() > 1e-6 * eigenvalues.max()
    found = laplace(at)
    np.testing.assert_allclose(found.precision.log_det, np.log(eigenvalues).sum(), rtol=1e-8)


def test_nuts_names_what_is_not_identified_and_gives_the_diagnostics_of_what_is():
    # 40 draws a chain are too few for an effective sample size of 100 a chain, whatever the chains do.
    result = nuts(0, one_head, model_args=(LOGITS, 2), warmup=40, draws=40, predictive=False, max_tree_depth=4)
    assert NutsStatus.NOT_MIXED in result.problems
    assert set(result.not_mixed) == {"key", "query"}
    ((sites, directions),) = result.gauges
    assert (sites, directions) == (("key", "query"), 1)
    query, key = result.posterior["query"], result.posterior["key"]
    interaction = np.einsum("cnpa,cnpb->cnab", key, query) / np.sqrt(2)
    np.testing.assert_allclose(result.posterior["interaction"], interaction, atol=1e-12)
    r_hat, ess = result.deterministic
    np.testing.assert_allclose(r_hat["interaction"], split_gelman_rubin(interaction), rtol=1e-10)
    np.testing.assert_allclose(ess["interaction"], effective_sample_size(interaction), rtol=1e-10)
    with pytest.raises(ValueError, match=r"sites (query, key|key, query)\): 'key' and 'query' \(1 flat dir") as info:
        result.to_datatree(allow=[p for p in result.problems if p != NutsStatus.NOT_MIXED])
    assert f"interaction has R-hat {np.max(r_hat['interaction']):.3f}" in str(info.value)


def test_nuts_does_not_blame_rotations_for_sites_that_are_identified():
    result = nuts(
        0, rows_of_different_scale, model_args=(LOGITS,), warmup=10, draws=10, predictive=False, max_tree_depth=2
    )
    assert NutsStatus.NOT_MIXED in result.problems
    assert result.gauges == ()
    with pytest.raises(ValueError, match="draw more, warm up longer"):
        result.to_datatree(allow=[p for p in result.problems if p != NutsStatus.NOT_MIXED])
