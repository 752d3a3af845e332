"""What inference of the transformer's model gives, read by the installed ArviZ."""

import warnings
from importlib.metadata import version

import arviz
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import logsumexp

from prob_transformer.inference import find_map, for_arviz, nuts
from prob_transformer.inference.laplace import laplace
from prob_transformer.transformer import TokenProcess, TransformerConfig, transformer_model, with_weights
from prob_transformer.transformer.weight_sites import weights_of

mpl.use("Agg")
CONFIG = TransformerConfig(vocabulary=2, context=3, layers=1, width=3, heads=1, head_size=1, hidden=1)
TEXTS = jnp.asarray([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
# Narrow, so that no text dominates its importance weights.
GIVEN = {"config": CONFIG, "priors": dist.Normal(jnp.float64(0.5), jnp.float64(0.3)), "dtype": jnp.float64}


@pytest.fixture(scope="module")
def chains():
    # Short; that they may not have mixed matters to nothing here.
    return nuts(0, transformer_model, model_args=(TEXTS,), model_kwargs=GIVEN, warmup=200, draws=400, progress=False)


def test_every_weight_is_summarised_under_its_site_with_a_dot(chains):
    table = arviz.summary(for_arviz(chains.to_datatree(allow=True)), round_to="none")
    rows = set(table.index)
    sites = weights_of(with_weights({name: value[0, 0] for name, value in chains.posterior.items()}, CONFIG))
    for site, value in sites.items():
        name = site.replace("/", ".")
        for index in np.ndindex(value.shape):
            row = f"{name}[{', '.join(map(str, index))}]"
            assert row in rows
            found = table.loc[row]
            mean = chains.posterior[site][(..., *index)].mean()
            np.testing.assert_allclose(float(found["mean"]), mean, rtol=1e-6, atol=1e-9)
    assert len(rows) == sum(value.size for value in sites.values())


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
@pytest.mark.filterwarnings("ignore:Shape validation failed")
def test_a_weight_is_traced(chains):
    arviz.plot_trace(for_arviz(chains.to_datatree(allow=True)), var_names=["transformer.head"])


def test_the_log_likelihood_of_a_sequence_is_that_of_the_token_process(chains):
    tree = chains.to_datatree(allow=True)
    assert tree.log_likelihood["tokens"].dims == ("chain", "draw", "sequence")
    draw = with_weights({name: jnp.asarray(value[1, 7]) for name, value in chains.posterior.items()}, CONFIG)
    expected = [TokenProcess(draw, text[:1], 3).log_prob(text[1:]) for text in TEXTS]
    np.testing.assert_allclose(tree.log_likelihood["tokens"][1, 7], expected, rtol=1e-10)


def test_leave_one_out_leaves_out_a_sequence(chains):
    """Next to importance sampling without Pareto smoothing, which is close where weights are bounded."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = arviz.loo(for_arviz(chains.to_datatree(allow=True)), pointwise=True)
    likelihood = chains.log_likelihood["tokens"].reshape(-1, len(TEXTS))
    plain = np.log(len(likelihood)) - logsumexp(-likelihood, axis=0)
    pointwise, total = (found.elpd_i, found.elpd) if version("arviz") >= "1" else (found.loo_i, found.elpd_loo)
    assert pointwise.shape == (len(TEXTS),)
    np.testing.assert_allclose(pointwise, plain, atol=0.02)
    np.testing.assert_allclose(total, plain.sum(), atol=0.05)


def test_laplace_is_read_as_well():
    mode = find_map(
        transformer_model, space="unconstrained", model_args=(TEXTS,), model_kwargs=GIVEN, key=0, max_steps=3000
    )
    result = laplace(mode, curvature="ggn", key=1, draws=50)
    tree = result.to_datatree()
    np.testing.assert_array_equal(tree.posterior["transformer.head"], result.posterior["transformer/head"])
    table = arviz.summary(for_arviz(tree), var_names=["transformer.head"], round_to="none")
    np.testing.assert_allclose(
        table["mean"].astype(float), result.posterior["transformer/head"].mean((0, 1)).ravel(), rtol=1e-6
    )
