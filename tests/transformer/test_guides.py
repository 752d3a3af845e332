"""NumPyro's guides on the transformer's model: they fit, and their draws are weights of a transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation, AutoLowRankMultivariateNormal, AutoNormal
from numpyro.optim import Adam

from prob_transformer.transformer import HeadBarrier, TransformerConfig, transformer_model, with_weights

SIZES = TransformerConfig(vocabulary=3, context=5, layers=1, width=4, heads=1, head_size=1, hidden=3)


@pytest.mark.parametrize("make", [AutoNormal, AutoLaplaceApproximation, AutoLowRankMultivariateNormal])
def test_a_guide_learns_texts_that_count_and_draws_weights(make):
    """After 0 1 2 0 1 comes 2, at the median of a guide; draws of Laplace's Gaussian are too wide for that."""
    texts = (jnp.arange(6) + jnp.arange(60)[:, None]) % 3
    given = {"config": SIZES, "barrier_weight": 0.01, "penalty": HeadBarrier("layers")}
    guide = make(transformer_model)
    fit = SVI(transformer_model, guide, Adam(0.03), Trace_ELBO()).run(
        jax.random.key(0), 400, texts, progress_bar=False, **given
    )
    assert np.isfinite(fit.losses).all()
    learnt = with_weights(guide.median(fit.params), SIZES)(jnp.array([0, 1, 2, 0, 1]))[-1]
    assert float(jax.nn.softmax(learnt)[2]) > 0.6
    draws = with_weights(guide.sample_posterior(jax.random.key(1), fit.params, sample_shape=(50,)), SIZES)
    assert all((np.asarray(array).std(0) > 0).all() for array in jax.tree.leaves(draws))
