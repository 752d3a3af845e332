import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta
from numpyro.infer.util import log_density
from scipy.special import log_softmax
from scipy.stats import norm

from prob_transformer import Attention, EmbeddingProcess, LinearDecoder, map_objective, token_model
from tests.helpers.dense import dense_truth, draw

SHAPE = (2, 2, 3, 4, True)
TOKENS = np.array([0, 3, 1, 2])
SCALES = {"noise_scale": 0.6, "first_scale": 1.3}


def parts(seed=0, scale=0.4):
    query, key, value, embeddings = draw(seed, SHAPE, scale=scale)
    rng = np.random.default_rng(seed)
    return Attention(query, key, value), LinearDecoder(rng.normal(size=(5, 3)), rng.normal(size=5)), embeddings


def by_hand(attention, decoder, embeddings, tokens, barrier_weight, density):
    """The log joint from autodiff and SciPy."""
    residual, blocks, _ = dense_truth(attention.query, attention.key, attention.value, embeddings)
    log_dets = np.linalg.slogdet(blocks)[1]
    logits = embeddings @ np.asarray(decoder.weight).T + np.asarray(decoder.bias)
    total = log_softmax(logits, axis=-1)[np.arange(4), tokens].sum() + barrier_weight * log_dets.sum()
    if density:
        total += norm.logpdf(residual, 0, np.array([1.3, 0.6, 0.6, 0.6])[:, None]).sum() + log_dets.sum()
    return total


@pytest.mark.parametrize("objective", ["full", "margin"])
@pytest.mark.parametrize("barrier_weight", [0.0, 0.7])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_log_density_and_objective_equal_the_joint_written_by_hand(objective, barrier_weight, batch):
    attention, decoder, alone = parts(scale=1.0)
    tokens, embeddings = (TOKENS, alone) if not batch else (np.array([TOKENS, TOKENS[::-1]]), np.stack([alone, -alone]))
    expected = sum(
        by_hand(attention, decoder, u, x, barrier_weight, objective == "full")
        for u, x in zip(embeddings.reshape(-1, 4, 3), tokens.reshape(-1, 4), strict=True)
    )
    options = {"objective": objective, "barrier_weight": barrier_weight, **SCALES}
    joint, trace = log_density(
        token_model, (attention, decoder, jnp.asarray(tokens)), options, {"embeddings": embeddings}
    )
    np.testing.assert_allclose(joint, expected, atol=1e-11)
    np.testing.assert_allclose(map_objective(attention, decoder, embeddings, tokens, **options), -expected, atol=1e-11)
    assert ("barrier" in trace) == (barrier_weight > 0)


def test_the_weight_prior_is_counted_once_and_reaches_every_array():
    attention, decoder, _ = parts()
    tokens, embeddings = np.array([TOKENS, TOKENS]), np.random.default_rng(0).normal(size=(2, 4, 3))
    leaves = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves((attention, decoder))])
    with_prior = map_objective(attention, decoder, embeddings, tokens, weight_scale=0.8)
    without = map_objective(attention, decoder, embeddings, tokens)
    np.testing.assert_allclose(with_prior - without, -norm.logpdf(leaves, 0, 0.8).sum(), atol=1e-11)


def test_on_the_boundary_without_a_barrier_the_margin_objective_stays_finite():
    attention, decoder = Attention(np.ones((1, 1, 1)), np.ones((1, 1, 1))), LinearDecoder(np.ones((2, 1)), np.zeros(2))
    embeddings, tokens = np.array([[-1.0], [1.0], [0.0]]), np.array([0, 1, 0])
    options = {"objective": "margin", "barrier_weight": 0.0}
    assert np.isfinite(map_objective(attention, decoder, embeddings, tokens, **options))
    joint, _ = log_density(token_model, (attention, decoder, jnp.asarray(tokens)), options, {"embeddings": embeddings})
    assert np.isfinite(joint)


def test_prior_predictive_draws_embeddings_and_tokens():
    attention, decoder, _ = parts()
    draws = Predictive(token_model, num_samples=3)(jax.random.key(0), attention, decoder, length=4, noise_scale=0.3)
    assert draws["embeddings"].shape == (3, 4, 3)
    assert draws["tokens"].shape == (3, 4)
    assert ((draws["tokens"] >= 0) & (draws["tokens"] < 5)).all()


def test_handlers_see_the_sites():
    attention, decoder, embeddings = parts()
    model = handlers.substitute(handlers.seed(token_model, jax.random.key(0)), {"embeddings": embeddings})
    trace = handlers.trace(model).get_trace(attention, decoder, jnp.asarray(TOKENS), barrier_weight=0.1)
    assert {name for name, site in trace.items() if site["type"] == "sample"} == {"embeddings", "barrier", "tokens"}
    assert isinstance(trace["embeddings"]["fn"], EmbeddingProcess)
    assert trace["tokens"]["is_observed"]


def test_svi_with_a_point_guide_lowers_the_objective():
    attention, decoder, _ = parts()
    svi = SVI(token_model, AutoDelta(token_model), optax.adam(0.05), Trace_ELBO())
    result = svi.run(jax.random.key(0), 200, attention, decoder, jnp.asarray(TOKENS), progress_bar=False)
    # The site is unconstrained, so the ELBO of a point is the negative log joint itself.
    found = svi.get_params(result.state)["embeddings_auto_loc"]
    np.testing.assert_allclose(
        svi.evaluate(result.state, attention, decoder, jnp.asarray(TOKENS)),
        map_objective(attention, decoder, found, TOKENS),
        rtol=1e-10,
    )
    assert result.losses[-1] < result.losses[0] - 1.0


def test_nuts_runs_over_parameters_and_embeddings_and_arviz_reads_it():
    _, decoder, _ = parts()

    def model(tokens):
        strength = numpyro.sample("strength", dist.HalfNormal(1.0))
        attention = Attention(-strength * jnp.eye(3)[None], jnp.eye(3)[None])
        token_model(attention, decoder, tokens, **SCALES)

    mcmc = MCMC(NUTS(model), num_warmup=50, num_samples=50, progress_bar=False)
    mcmc.run(jax.random.key(0), jnp.asarray(TOKENS))
    posterior = arviz.from_numpyro(mcmc).posterior
    assert posterior["embeddings"].shape == (1, 50, 4, 3)
    assert np.isfinite(posterior["embeddings"].values).all()
    assert posterior["embeddings"].values.std() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "both"}, "objective: got 'both'; pass 'full' or 'margin'"),
        ({"barrier_weight": -1.0}, "barrier_weight: got -1.0; pass 0 or more"),
        ({"barrier_weight": np.nan}, "barrier_weight: contains NaN or inf"),
        ({"noise_scale": 0.0}, "noise_scale: got 0.0"),
        ({"first_scale": -2.0}, "first_scale: got -2.0"),
        ({"tokens": np.array([0, 1, 2, 9])}, "tokens: contains tokens outside 0..4"),
        ({"tokens": np.array([0, -1, 2, 3])}, "tokens: contains tokens outside 0..4"),
        ({"tokens": np.ones(4)}, r"tokens: has shape \(4,\) and dtype float64"),
    ],
)
def test_bad_input_is_refused_by_name_in_model_and_objective(change, message):
    attention, decoder, embeddings = parts()
    tokens = change.pop("tokens", TOKENS) if "tokens" in change else TOKENS
    with pytest.raises(ValueError, match=message):
        map_objective(attention, decoder, embeddings, tokens, **change)
    with pytest.raises(ValueError, match=message):
        log_density(token_model, (attention, decoder, tokens), change, {"embeddings": embeddings})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, d, u: map_objective(a, d, u, TOKENS[:3]), r"tokens: has shape \(3,\); pass \(4,\)"),
        (lambda a, d, u: map_objective(a, d, u, TOKENS, weight_scale=0.0), "scale: got 0.0"),
        (lambda a, d, u: token_model(a, d, TOKENS, length=3), "length: got 3 with tokens of length 4"),
        (lambda a, d, u: token_model(a, d), "length: got None"),
        (lambda a, d, u: LinearDecoder(np.ones(2), np.ones(2)), r"weight: has shape \(2,\)"),
        (lambda a, d, u: LinearDecoder(np.ones((2, 3)), np.array([np.nan, 0.0])), "bias: contains NaN or inf"),
    ],
)
def test_bad_input_of_one_of_the_two_only_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*parts())
