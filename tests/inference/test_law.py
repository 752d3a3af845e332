"""Every result says whether the likelihood behind it is certified to be a probability law."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from models.scalar.density import NOISE_SCALE, PAST, conditional_masses, scalar_attention
from prob_transformer import Attention, EmbeddingProcess, LinearDecoder
from prob_transformer.inference import find_map, nuts, particle_filter
from prob_transformer.inference.laplace import laplace
from prob_transformer.inference.law import certificate, conditional_mass, law_of

EMBEDDINGS = np.array([*PAST, 0.2])[:, None]


def strength(embeddings, centre):
    a = numpyro.sample("a", dist.Normal(centre, 1.0))
    process = EmbeddingProcess(scalar_attention(a), embeddings.shape[0], NOISE_SCALE)
    numpyro.sample("embeddings", process, obs=embeddings)


def test_the_certificate_is_the_sign_of_the_largest_eigenvalue_up_to_rounding():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        for _ in range(20):
            turn = rng.normal(size=(4, 4))
            antisymmetric, root = turn - turn.T, rng.normal(size=(4, 3))
            # Of rank 3: an eigenvalue of A + A^T is 0, and rounding makes it positive or negative.
            edge = antisymmetric - root @ root.T
            scale = np.abs(edge).max()
            found = certificate(Attention(2 * edge[None].astype(dtype), np.eye(4, dtype=dtype)[None]))
            assert bool(found[1])
            past = edge + 1e-3 * scale * np.eye(4)
            found = certificate(Attention(2 * past[None].astype(dtype), np.eye(4, dtype=dtype)[None]))
            assert not bool(found[1])
            np.testing.assert_allclose(found[0], 2e-3 * scale, rtol=5e-3)


def test_value_maps_are_never_certified():
    head = np.eye(2)[None]
    assert not bool(certificate(Attention(-head, head, head))[1])
    process = EmbeddingProcess(Attention(-head, head, head), 3)
    law = law_of({"embeddings": (process, np.zeros((3, 2)))}, None)
    assert (law.share, law.excess, law.value_maps) == (0.0, None, True)
    assert law.line.startswith("law: not certified: with value maps, Popoviciu's bound certifies single conditionals")


@pytest.mark.parametrize("a", [-2.0, 1.0, 1.5, 4.0])
def test_the_mass_of_a_conditional_is_that_of_quadrature(a):
    process = EmbeddingProcess(scalar_attention(a), 4, NOISE_SCALE)
    found = conditional_mass(process, jnp.asarray(EMBEDDINGS))
    np.testing.assert_allclose(found, conditional_masses(a)["absolute"], atol=1e-5)


@pytest.mark.parametrize(("centre", "certified"), [(-6.0, True), (6.0, False)])
def test_the_mode_says_it_and_so_does_its_tree(centre, certified):
    found = find_map(strength, model_args=(EMBEDDINGS, centre), space="unconstrained", key=0)
    assert found.converged
    a = float(found.parameters["a"])
    assert (a <= 0) == certified == (found.law.share == 1)
    line = found.to_datatree().attrs["law"]
    if certified:
        assert found.law.excess is None
        assert line.startswith("law: certified up to rounding: no eigenvalue of A + A^T exceeds its rounding")
        return
    assert line.startswith("law: not certified: A + A^T has a positive eigenvalue")
    excess = conditional_masses(a)["absolute"] - 1
    np.testing.assert_allclose(found.law.excess, excess, atol=1e-5)
    assert f"above 1 by {found.law.excess:.3g}" in line


def test_laplace_gives_the_share_of_its_draws():
    # Of the two modes the one before the boundary, whose draws reach beyond it.
    at = find_map(strength, model_args=(EMBEDDINGS, 0.0), space="unconstrained", init={"a": -1.0})
    fit, key = laplace(at), jax.random.key(3)
    a, law = np.asarray(fit.sample(key, 200)["a"]), fit.law(key, 200)
    assert 0 < law.share < 1
    np.testing.assert_allclose(law.share, (a <= 0).mean())
    assert law.excess > 0.1
    np.testing.assert_allclose(law.excess, conditional_masses(a.max())["absolute"] - 1, atol=1e-5)


def test_nuts_gives_the_share_of_its_draws():
    result = nuts(0, strength, model_args=(EMBEDDINGS, -0.5), warmup=200, draws=400, predictive=False)
    a = result.posterior["a"]
    np.testing.assert_array_equal(result.sample_stats["certified"], a <= 0)
    np.testing.assert_allclose(result.sample_stats["symmetric_eigenvalue"], 2 * a, rtol=1e-12)
    assert 0 < result.law.share < 1
    np.testing.assert_allclose(result.law.share, (a <= 0).mean())
    np.testing.assert_allclose(result.law.excess, conditional_masses(a.max())["absolute"] - 1, atol=1e-5)
    tree = result.to_datatree(allow=result.problems)
    assert tree.attrs["law"].startswith(f"law: certified in {result.law.share:.1%} of 800 draws; in the others")
    np.testing.assert_array_equal(tree["sample_stats/certified"], a <= 0)


@pytest.mark.parametrize(("a", "text"), [(-2.0, "law: certified"), (0.1, "law: not certified")])
def test_particles_say_it_of_the_process_they_were_given(a, text):
    decoder = LinearDecoder(jnp.array([[1.0], [-1.0]]), jnp.zeros(2))
    tokens = jnp.array([0, 1, 0])
    found = particle_filter(0, scalar_attention(a), decoder, tokens, particles=50, noise_scale=0.3)
    assert found.law.line.startswith(text)
    tree = found.to_datatree(draws=10, allow=True)
    assert tree.attrs["law"] == found.law.line


def mean_of(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 1.0).expand(y.shape), obs=y)


def test_a_model_without_embeddings_has_no_law_to_certify():
    found = find_map(mean_of, model_args=(np.ones(3),), space="unconstrained", key=0)
    assert found.law.share is None
    assert found.to_datatree().attrs["law"] == "law: the model has no embedding process"
