import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import numpyro.infer
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy import stats

from models.scalar.density import scalar_attention
from prob_transformer import Attention, EmbeddingProcess, ImplicitSolveError, SolveStatus, named_solve_errors
from prob_transformer.inference import NoiseReparam, Predictive, through_noise
from tests.helpers.dense import dense_map, draw


def batch(attention, y):
    with numpyro.plate("sequences", y.shape[0]):
        u = numpyro.sample("embeddings", EmbeddingProcess(attention, 4, 0.3, 1.5))
        numpyro.sample("y", dist.Normal(u, 1.0).to_event(2), obs=y)


def test_the_embeddings_of_a_batch_are_roots_of_their_noise_and_the_density_is_that_of_standard_normals():
    query, key, value, _ = draw(0, (2, 2, 2, 4, True), scale=0.3)
    attention = Attention(query, key, value)
    noise = np.random.default_rng(1).normal(size=(2, 4, 2))
    y = np.random.default_rng(2).normal(size=(2, 4, 2))
    density, trace = log_density(through_noise(batch), (attention, y), {}, {"embeddings_noise": jnp.asarray(noise)})
    u = trace["embeddings"]["value"]
    assert trace["embeddings"]["type"] == trace["embeddings_solve_status"]["type"] == "deterministic"
    np.testing.assert_array_equal(trace["embeddings_solve_status"]["value"], np.zeros((2, 4)))
    scales = np.array([1.5, 0.3, 0.3, 0.3])[:, None]
    for sequence in range(2):
        np.testing.assert_allclose(dense_map(query, key, value, u[sequence]), scales * noise[sequence], atol=1e-8)
    np.testing.assert_allclose(density, stats.norm.logpdf(noise).sum() + stats.norm.logpdf(y, u).sum(), rtol=1e-10)


def test_a_lost_root_is_reported_and_leaves_no_nan():
    attention = Attention(np.full((1, 1, 1), 100.0), np.ones((1, 1, 1)))
    noise = jax.random.normal(jax.random.key(0), (100, 4, 1))
    substituted = handlers.substitute(through_noise(batch), {"embeddings_noise": noise})
    trace = handlers.trace(substituted).get_trace(attention, jnp.zeros((100, 4, 1)))
    lost = np.asarray(trace["embeddings_solve_status"]["value"]) == SolveStatus.NOT_CONVERGED
    assert 0 < lost.mean() < 0.5
    u = np.asarray(trace["embeddings"]["value"])
    assert np.isfinite(u).all()
    scaled = np.asarray(noise) * np.array([1.5, 0.3, 0.3, 0.3])[:, None]
    np.testing.assert_allclose(u[lost], scaled[lost], rtol=1e-12)
    assert (u[:, 1:][~lost[:, 1:]] != scaled[:, 1:][~lost[:, 1:]]).any()


def test_observed_embeddings_are_left_alone():
    def model(y):
        numpyro.sample("embeddings", EmbeddingProcess(Attention(np.zeros((1, 1, 1)), np.zeros((1, 1, 1))), 3), obs=y)

    trace = handlers.trace(through_noise(model)).get_trace(np.zeros((3, 1)))
    assert trace["embeddings"]["is_observed"]
    assert set(trace) == {"embeddings"}


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (("x", dist.Normal(), None), "x: is drawn from Normal; NoiseReparam takes an EmbeddingProcess"),
        (("embeddings", EmbeddingProcess(scalar_attention(0.0), 3), np.zeros((3, 1))), "embeddings: is observed"),
    ],
    ids=["of another law", "observed"],
)
def test_other_sites_are_refused_by_name(site, message):
    with pytest.raises(ValueError, match=message):
        NoiseReparam()(*site)


def embeddings(a):
    numpyro.sample("embeddings", EmbeddingProcess(scalar_attention(a), 6, 0.5))


@pytest.mark.parametrize("parallel", [False, True])
def test_past_the_boundary_the_first_line_names_status_and_remedy(parallel):
    with pytest.raises(ImplicitSolveError) as info:
        Predictive(embeddings, num_samples=20, parallel=parallel)(jax.random.key(0), 8.0)
    first = str(info.value).splitlines()[0]
    assert first.startswith(f"{info.value.status.name.lower()}: ")
    assert info.value.status in (SolveStatus.PAST_BOUNDARY, SolveStatus.NOT_CONVERGED)
    assert "scale query or key down" in first


def test_before_it_the_draws_are_those_of_numpyro():
    ours, theirs = (kind(embeddings, num_samples=4) for kind in (Predictive, numpyro.infer.Predictive))
    found, expected = ours(jax.random.key(1), -1.0), theirs(jax.random.key(1), -1.0)
    np.testing.assert_array_equal(found["embeddings"], expected["embeddings"])


def test_other_errors_are_left_as_they_are():
    def callback(x):
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind") as info, named_solve_errors():
        jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(callback, x, x))(jnp.ones(())))
    assert not isinstance(info.value, ImplicitSolveError)
