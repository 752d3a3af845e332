"""The NumPyro model of the transformer against the log joint in plain NumPy."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta
from numpyro.infer.util import log_density
from numpyro.optim import Adam

from prob_transformer.inference import MapStatus, find_map
from prob_transformer.inference.laplace import laplace
from prob_transformer.training_barrier import BarrierPenalty
from prob_transformer.transformer import (
    HeadBarrier,
    TokenProcess,
    TransformerConfig,
    default_priors,
    transformer_model,
)
from tests.helpers.tiny_transformer import TINY, strong, trace_of
from tests.transformer.test_dense_transformer import (
    PRIOR_SCALE,
    SIZES,
    THRESHOLD,
    WEIGHT,
    errors,
    latents,  # noqa: F401
    priors_of,
    rounded,
    weights,  # noqa: F401
    windows,  # noqa: F401
)
from theory_checks.truth import transformer as dense_transformer

PLACES = [("embedding", "identity"), ("layers", "identity"), ("layers", "own")]
CASES = [(*place, form) for place in PLACES for form in ("two-sided", "one-sided")]


def sites_of(by_name, dtype=np.float64):
    return {f"transformer/{name}": jnp.asarray(value, dtype) for name, value in by_name.items()}


def names_of(sites):
    return {name.removeprefix("transformer/"): np.asarray(value, np.float64) for name, value in sites.items()}


def potential_and_gradient(sites, tokens, dtype=np.float64, **given):
    """What `log_density` says of the model, and its gradient in all latent sites, compiled."""
    given = {"config": SIZES, "priors": dist.Normal(dtype(0), dtype(PRIOR_SCALE)), "dtype": dtype} | given

    def potential(sites):
        return -log_density(transformer_model, (tokens,), given, sites)[0]

    return jax.jit(jax.value_and_grad(potential))(sites)


def barrier_of(case):
    site, values, form = case
    penalty = HeadBarrier(site=site, values=values, form=form, threshold=THRESHOLD)
    truth = {"site": site, "values": values, "form": form}
    if form == "one-sided":
        truth["threshold"] = THRESHOLD
    return {"barrier_weight": WEIGHT, "penalty": penalty}, {"barrier_weight": WEIGHT, **truth}


@pytest.mark.parametrize("case", [None, *CASES])
@pytest.mark.parametrize(
    ("dtype", "of_value", "of_gradient"), [(np.float64, 1e-10, 1e-9), (np.float32, 1e-5, 1e-5)], ids=["64", "32"]
)
def test_with_latents_in_a_table_the_potential_is_the_negative_log_joint(
    weights,  # noqa: F811
    windows,  # noqa: F811
    case,
    dtype,
    of_value,
    of_gradient,
):
    weights = rounded(weights) if dtype == np.float32 else weights
    given, truth = ({}, {}) if case is None else barrier_of(case)
    truth |= {"smallest": 2.0**-149} if dtype == np.float32 and truth.get("form") == "one-sided" else {}
    value, gradient = potential_and_gradient(sites_of(weights, dtype), jnp.asarray(windows), dtype, **given)
    assert value.dtype == dtype
    joint = lambda w: -dense_transformer.log_joint(w, windows, priors=priors_of(weights), **truth)  # noqa: E731
    value_error, gradient_error = errors(joint, weights, float(value), names_of(gradient))
    assert value_error < of_value
    assert gradient_error < of_gradient


@pytest.mark.parametrize(
    ("attention", "case"), [("free", None), ("free", CASES[0]), ("free", CASES[4]), ("tied", CASES[2])]
)
@pytest.mark.parametrize(
    ("dtype", "of_value", "of_gradient"), [(np.float64, 1e-10, 1e-9), (np.float32, 1e-5, 1e-5)], ids=["64", "32"]
)
def test_with_latents_from_the_process_the_potential_is_the_negative_log_joint(
    weights,  # noqa: F811
    windows,  # noqa: F811
    latents,  # noqa: F811
    attention,
    case,
    dtype,
    of_value,
    of_gradient,
):
    if dtype == np.float32:
        weights, latents = rounded(weights), rounded({"u": latents})["u"]
    unused = ("token_embedding", "position_embedding") + ("prior_stage.",) * (attention == "tied")
    kept = {name: value for name, value in weights.items() if not name.startswith(unused)}
    tokens = windows[:, 1:]
    given, truth = ({}, {}) if case is None else barrier_of(case)
    scales = {"noise_scale": 0.8, "first_scale": 1.7, "attention": attention}
    sites = sites_of(kept, dtype) | {"embeddings": jnp.asarray(latents, dtype)}
    value, gradient = potential_and_gradient(sites, jnp.asarray(tokens), dtype, latents="process", **scales, **given)
    assert value.dtype == dtype

    def joint(w):
        u = w["embeddings"]
        rest = {name: value for name, value in w.items() if name != "embeddings"}
        rest["token_embedding"], rest["position_embedding"] = np.zeros((0, 4)), np.zeros((0, 4))
        priors = priors_of(rest)
        return -dense_transformer.log_joint(
            rest, tokens, priors=priors, latents="process", embeddings=u, **scales, **truth
        )

    value_error, gradient_error = errors(joint, {**kept, "embeddings": latents}, float(value), names_of(gradient))
    assert value_error < of_value
    assert gradient_error < of_gradient


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-6)], ids=["64", "32"])
@pytest.mark.parametrize("latents_of", ["table", "process"])
def test_the_mean_potential_of_all_minibatches_is_that_of_the_data(
    weights,  # noqa: F811
    windows,  # noqa: F811
    latents,  # noqa: F811
    latents_of,
    dtype,
    tolerance,
):
    """Exactly, over the six pairs of four sequences; the barrier's mean over pairs is that over sequences."""
    tokens = jnp.asarray(windows)
    latents = jnp.asarray(latents, dtype)
    sites = sites_of(weights, dtype)
    if latents_of == "process":
        tokens = tokens[:, 1:]
        for name in ("token_embedding", "position_embedding"):
            del sites[f"transformer/{name}"]
    given = {"config": SIZES, "latents": latents_of, "barrier_weight": WEIGHT, "penalty": HeadBarrier("layers")}
    given |= {"priors": dist.Normal(dtype(0), dtype(PRIOR_SCALE)), "dtype": dtype}

    @jax.jit
    def of_pair(pair):
        model = handlers.substitute(partial(transformer_model, subsample_size=2), data={"sequences": pair})
        own = sites | ({"embeddings": latents[pair]} if latents_of == "process" else {})
        return log_density(model, (tokens,), given, own)[0]

    own = sites | ({"embeddings": latents} if latents_of == "process" else {})
    expected = jax.jit(lambda: log_density(transformer_model, (tokens,), given, own)[0])()
    pairs = [of_pair(jnp.asarray(pair)) for pair in itertools.combinations(range(4), 2)]
    assert expected.dtype == dtype
    assert np.std(pairs) > 0.1
    np.testing.assert_allclose(np.mean(pairs, dtype=np.float64), expected, rtol=tolerance)


def test_a_guide_of_the_subsampled_model_learns_latents_from_the_process_in_minibatches(windows):  # noqa: F811
    """The six losses that pairs of four sequences have average to the loss of all; a guide of all is refused."""
    model = partial(transformer_model, config=SIZES, latents="process")
    tokens, of_pairs = jnp.asarray(windows[:, 1:]), partial(model, subsample_size=2)
    whole, part = AutoDelta(model), AutoDelta(of_pairs)
    start = SVI(model, whole, Adam(0.1), Trace_ELBO())
    state = start.init(jax.random.key(0), tokens)
    params, expected = start.get_params(state), float(start.evaluate(state, tokens))
    subsampled = SVI(of_pairs, part, Adam(0.1), Trace_ELBO())
    state = subsampled.init(jax.random.key(1), tokens, init_params=params)
    assert subsampled.get_params(state)["embeddings_auto_loc"].shape[0] == 4
    loss = jax.jit(lambda key: Trace_ELBO().loss(key, params, of_pairs, part, tokens))
    found = np.unique(np.round([float(loss(jax.random.key(seed))) for seed in range(60)], 9))
    assert len(found) == 6
    np.testing.assert_allclose(found.mean(), expected, rtol=1e-10)
    refused = pytest.raises(ValueError, match=r"subsample_size: got 2, but a guide or a handler gave .* \(4,\)")
    with refused, pytest.warns(UserWarning, match="subsample_size does not match"):
        SVI(of_pairs, whole, Adam(0.1), Trace_ELBO()).init(jax.random.key(1), tokens)


@pytest.mark.parametrize(
    ("indices", "size", "message"),
    [
        ([0, 9], 2, r"sequences: got the indices \[0, 9\]; pass integers in 0..1"),
        ([0, -1], 2, "sequences: got the indices"),
        ([0.0, 1.0], 2, "sequences: has dtype float64; pass integers"),
        ([0], None, r"subsample_size: got None, but a guide or a handler gave sequences of shape \(1,\)"),
        ([[0, 1], [1, 0]], 2, r"subsample_size: got 2, but a guide or a handler gave sequences of shape \(2, 2\)"),
        ([1, 1], None, "sequences: got the indices .*; pass subsample_size=2"),
    ],
)
def test_indices_of_sequences_that_do_not_fit_are_refused(indices, size, message):
    model = partial(transformer_model, config=TINY, subsample_size=size)
    given = handlers.substitute(handlers.seed(model, jax.random.key(0)), data={"sequences": jnp.asarray(indices)})
    with pytest.raises(ValueError, match=message):
        given(jnp.zeros((2, 4), int))


def test_tokens_in_narrow_integers_count_as_in_wide_ones():
    """A vocabulary of 200, whose size int8 does not hold."""
    config = TransformerConfig(vocabulary=200, context=5, layers=1, width=2, heads=1)
    tokens = np.arange(120, 128).reshape(2, 4)
    model = handlers.seed(partial(transformer_model, config=config), jax.random.key(0))
    dtypes = (np.int8, np.uint64, np.int64)
    narrow, unsigned, wide = (log_density(model, (tokens.astype(dtype),), {}, {})[0] for dtype in dtypes)
    assert narrow == unsigned == wide


def test_a_minibatch_that_the_caller_has_drawn_counts_for_all_tokens(weights, windows):  # noqa: F811
    sites = sites_of(weights)
    prior = -dense_transformer.log_prior(weights, priors_of(weights))
    whole, part = (
        potential_and_gradient(sites, jnp.asarray(windows), barrier_weight=WEIGHT, total_tokens=total)[0]
        for total in (None, 60)
    )
    np.testing.assert_allclose(part - prior, (whole - prior) * 60 / 20, rtol=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"priors": {"head": dist.Normal()}}, "priors: have none for token_embedding"),
        ({"priors": default_priors(TINY) | {"haed": dist.Normal()}}, "priors: haed fits no weight"),
        ({"priors": 0.1}, "priors: got float; pass a distribution"),
        ({"priors": {"*": 0.1}}, r"priors: \* has float; pass a NumPyro distribution"),
        ({"priors": {"*": dist.Normal(jnp.zeros(7), 1.0)}}, r"priors: \* has batch shape \(7,\) .*token_embedding has"),
        ({"priors": dist.Normal(jnp.zeros((9, 1)), 1.0)}, "priors: the prior of all weights has batch shape"),
        ({"priors": dist.Normal().expand([1]).to_event(1)}, r"event shape \(1,\), but token_embedding has shape"),
        ({"priors": dist.Normal().expand([3, 1]).to_event(1)}, r"event shape \(1,\), but token_embedding has shape"),
        ({"latents": "tables"}, "latents: got 'tables'"),
        ({"barrier_weight": 0.1, "penalty": HeadBarrier("layer")}, "site: got 'layer'"),
        ({"latents": "process", "attention": "bound"}, "attention: got 'bound'"),
        ({"attention": "tied"}, "attention: got 'tied' with latents in a table"),
        ({"remat": "layers"}, "remat: got 'layers'; pass one of none, blocks"),
        ({"subsample_size": 0}, "subsample_size: got 0; pass an integer of at least 1"),
        ({"subsample_size": 2.0}, "subsample_size: got 2.0; pass an integer"),
        ({"subsample_size": 99}, "subsample_size: got 99; pass at most"),
        ({"total_tokens": 10, "subsample_size": 1}, "total_tokens: given without"),
        ({"total_tokens": float("nan")}, "total_tokens: contains NaN or inf"),
        ({"total_tokens": 0}, "total_tokens: got 0; pass a value greater than 0"),
        ({"total_tokens": "7"}, "total_tokens: got str"),
        ({"barrier_weight": jnp.ones(2)}, r"barrier_weight: has shape \(2,\)"),
        ({"barrier_weight": 0.1, "penalty": lambda *_: 2.0}, "penalty: gave float; give a BarrierPenalty"),
        (
            {"barrier_weight": 0.1, "penalty": lambda *_: BarrierPenalty(jnp.ones(2), 0, 0)},
            "penalty: gave BarrierPenalty of shape",
        ),
        ({"barrier_weight": 0.1, "penalty": "layers"}, "penalty: got 'layers'; pass a callable"),
        ({"config": {"vocabulary": 3}}, "config: got dict; pass a TransformerConfig"),
        (
            {"priors": {"head": dist.Bernoulli(0.5), "*": dist.Normal()}},
            "priors: head is .*, which is discrete",
        ),
        ({"priors": dist.Poisson(1.0)}, "priors: the prior of all weights is Poisson, which is discrete"),
        ({"prompt": jnp.zeros(1, int)}, "prompt: given with tokens"),
        ({"length": 3}, "length: given with tokens"),
        ({"barrier_weight": float("nan")}, "barrier_weight: contains NaN"),
        ({"barrier_weight": -1.0}, "barrier_weight: got -1.0"),
        ({"latents": "process", "attention": "tied", "barrier_weight": 0.1}, "site: got 'embedding'"),
    ],
)
def test_bad_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        trace_of(**given)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (jnp.full((2, 4), 3), "tokens: contains tokens outside"),
        (jnp.zeros((2, 7), int), r"tokens: has shape \(2, 7\)"),
        (jnp.zeros(4, int), r"tokens: has shape \(4,\); pass sequences"),
        (jnp.zeros((0, 4), int), r"tokens: has shape \(0, 4\); pass at least one sequence"),
        ([[0, 1, 2], [1, 2]], "tokens: got a list that forms no array; pass integers"),
        (["abc"], "tokens: has shape .* and dtype <U3; pass integers"),
        # Where JAX has no 64 bits they would wrap around to tokens of the vocabulary.
        (np.array([[0, 1, 2, 0]]) + 2**32, "tokens: contains integers that 32 bits do not hold"),
        (np.array([[0, 1, 2, 0]], np.uint64) + 2**40, "tokens: contains integers that 32 bits do not hold"),
    ],
)
def test_bad_tokens_are_refused(tokens, message):
    model = handlers.seed(partial(transformer_model, config=TINY), jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        model(tokens)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "prompt: got None"),
        ({"prompt": jnp.zeros(1, int)}, "length: got None"),
        ({"latents": "process"}, "length: got None"),
        ({"latents": "process", "length": 6}, "length: got 6; pass at most the context, 5"),
        ({"latents": "process", "length": 3, "prompt": jnp.zeros(1, int)}, "prompt: given with latents"),
        ({"prompt": jnp.zeros(1, int), "length": 3, "total_tokens": 6}, "total_tokens: given without"),
    ],
)
def test_drawing_with_bad_arguments_is_refused(given, message):
    model = handlers.seed(partial(transformer_model, config=TINY), jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        model(**given)


@pytest.mark.parametrize("given", [{"prompt": jnp.asarray([0, 1])}, {"latents": "process", "noise_scale": 0.1}])
def test_predictive_draws_texts_without_the_barrier(given):
    model = partial(transformer_model, config=TINY, length=4, barrier_weight=0.5, **given)
    priors = default_priors(TINY) if "prompt" in given else {"*": dist.Normal(0.0, 0.1)}
    drawn = Predictive(partial(model, priors=priors), num_samples=6)(jax.random.key(1))
    assert drawn["tokens"].shape == (6, 4)
    assert ((drawn["tokens"] >= 0) & (drawn["tokens"] < 3)).all()
    assert len({text.tobytes() for text in np.asarray(drawn["tokens"])}) > 1
    assert not [site for site in drawn if "barrier" in site]


def data(count=24, key=3):
    """Texts of a strong model, so that there is something to learn."""
    process = TokenProcess(strong(), jnp.asarray([0]), 5)
    drawn = process.sample(jax.random.key(key), (count,))
    return jnp.concatenate([jnp.zeros((count, 1), drawn.dtype), drawn], axis=1)


def test_svi_on_minibatches_lowers_the_potential_of_all_the_data():
    texts, model = data(), partial(transformer_model, config=TINY)
    guide = AutoDelta(model)
    svi = SVI(partial(model, subsample_size=6), guide, Adam(0.05), Trace_ELBO())
    result = svi.run(jax.random.key(0), 150, texts, progress_bar=False)
    assert not [name for name in result.params if "$params" in name]
    start = SVI(model, guide, Adam(0.05), Trace_ELBO())
    first, last = (
        start.evaluate(start.init(jax.random.key(0), texts, init_params=params), texts)
        for params in (None, result.params)
    )
    assert last < first - 10


def test_map_and_laplace_find_the_model():
    texts = data()
    given = {"config": TINY, "dtype": jnp.float64}
    mode = find_map(
        transformer_model, space="unconstrained", model_args=(texts,), model_kwargs=given, key=0, max_steps=3000
    )
    assert mode.status is MapStatus.CONVERGED, mode.note
    gradient = jax.grad(lambda sites: log_density(transformer_model, (texts,), given, sites)[0])(mode.parameters)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) < 1e-4
    result = laplace(mode, structure="diagonal")
    assert np.isfinite(result.log_evidence)
