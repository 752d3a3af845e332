"""What every method returns goes into the installed ArviZ in one call, and a long call shows that it works."""

import io
import sys
from importlib.metadata import version

import arviz
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

from prob_transformer import Attention, LinearDecoder
from prob_transformer.inference import find_map, nuts, particle_filter
from prob_transformer.inference.laplace import laplace

mpl.use("Agg")
Y = np.array([0.3, -0.2, 1.1])
ONE = np.ones((1, 1, 1))


def pair(y):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("cases", y.shape[0]):
        numpyro.sample("y", dist.Normal(z.sum(), 1.0), obs=y)


def with_nuts():
    result = nuts(0, pair, model_args=(Y,), warmup=200, draws=500)
    return result.to_inferencedata(), result.draws["z"]


def with_laplace():
    fit = laplace(find_map(pair, model_args=(Y,), space="unconstrained", key=0))
    return fit.to_inferencedata(1, draws=300), fit.sample(jax.random.key(1), 300)["z"][None]


def with_particles():
    decoder = LinearDecoder(jnp.array([[1.0], [-1.0]]), jnp.zeros(2))
    found = particle_filter(Attention(-ONE, ONE), decoder, jnp.array([0, 1, 0]), jax.random.key(0), particles=100)
    data = found.to_inferencedata(draws=50)
    return data, found.to_datatree(draws=50)["posterior/embeddings"].values[..., 0]


# ArviZ 0.23 with Matplotlib 3.11.
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
@pytest.mark.filterwarnings("ignore:Shape validation failed")
@pytest.mark.parametrize("method", [with_nuts, with_laplace, with_particles])
def test_arviz_summarises_and_draws_every_result(method):
    data, draws = method()
    assert isinstance(data, xr.DataTree if version("arviz") >= "1" else arviz.InferenceData)
    table = arviz.summary(data, round_to="none")
    np.testing.assert_allclose(table["mean"].astype(float), draws.mean((0, 1)).ravel(), rtol=1e-6)
    np.testing.assert_allclose(table["sd"].astype(float), draws.std((0, 1), ddof=1).ravel(), rtol=1e-2)
    assert "r_hat" in table
    arviz.plot_trace(data)


def test_the_mode_goes_into_arviz_too():
    found = find_map(pair, model_args=(Y,), space="unconstrained", key=0)
    np.testing.assert_array_equal(found.to_inferencedata().posterior["z"], found.parameters["z"][None, None])
    failed = find_map(pair, model_args=(Y,), space="unconstrained", key=0, max_steps=1)
    with pytest.raises(ValueError, match="max_steps"):
        failed.to_inferencedata()
    failed.to_inferencedata(allow_unconverged=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.slow
def test_nuts_shows_a_bar_on_a_terminal_and_nothing_elsewhere(monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        nuts(0, pair, model_args=(Y,), warmup=20, draws=80)
        assert ("nuts, compiling" in stream.getvalue()) == ("100/100" in stream.getvalue()) == shown
    monkeypatch.setattr(sys, "stderr", Terminal())
    nuts(0, pair, model_args=(Y,), warmup=20, draws=80, progress=False)
    assert sys.stderr.getvalue() == ""
