import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from models import cli
from models.char_gpt import __main__ as command
from models.char_gpt import checkpoint, linear_maps
from models.char_gpt.config import Config
from models.char_gpt.laplace import calibration_error, score
from models.char_gpt.train import initial_state
from models.char_gpt.training_record import new_record
from models.corpus import load
from prob_transformer.inference.laplace import laplace, network
from prob_transformer.inference.laplace.last_layer import CholeskyPrecision, gauss_newton
from prob_transformer.inference.laplace.precision import BlockPrecision
from prob_transformer.inference.laplace.predictive import probit_logits
from prob_transformer.inference.laplace.tuning import coarse_prior_precision
from prob_transformer.inference.result_tree import load as load_tree
from tests.helpers.tiny_gpt import compiled_logits, made_wide

SMALL = Config(layers=2, width=4, heads=2, context=4, steps=2, batch=2, evaluation_windows=3)
VOCABULARY, TAU = 5, 0.6
WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, (6, SMALL.context + 1))
CONTEXTS, TARGETS = jnp.asarray(WINDOWS[:, :-1]), jnp.asarray(WINDOWS[:, 1:])


@pytest.fixture(scope="module")
def model():
    return made_wide(SMALL, VOCABULARY)


@pytest.fixture(scope="module")
def trained(model):
    return linear_maps.trained_network(model, jnp.asarray(WINDOWS))


@pytest.fixture(scope="module")
def last_layer(trained):
    return laplace(trained, structure="last-layer", prior_precision=TAU)


@pytest.fixture(scope="module")
def seen(trained):
    """Inputs of the head and logits at all positions of all windows."""
    return network.head_inputs(trained, CONTEXTS)


@pytest.fixture(scope="module")
def dense(seen):
    """The Gauss-Newton matrix of the head by its definition, position by position."""
    inputs, logits = (np.asarray(x) for x in seen)
    p = softmax(logits, axis=-1)
    return sum(
        np.kron(np.diag(p_n) - np.outer(p_n, p_n), np.outer(phi, phi)) for p_n, phi in zip(p, inputs, strict=True)
    )


def test_maps_as_matrices_and_back_leave_the_model_as_it_is(model):
    at = linear_maps.matrices(model)
    assert len(at) == 2 * 6 + 1
    doubled = linear_maps.with_matrices(model, {name: 2 * matrix for name, matrix in at.items()})
    again = linear_maps.matrices(doubled)
    for name in at:
        np.testing.assert_array_equal(again[name], 2 * at[name])
    back = linear_maps.with_matrices(doubled, at)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True))


def test_the_hook_is_called_at_every_map_with_its_own_inputs_and_outputs(model):
    """With inputs a_s and a loss whose gradient in the outputs is g_s, the gradient in the matrix is sum g_s a_s^T."""
    window, at = CONTEXTS[0], linear_maps.matrices(model)
    zeros = {name: jnp.zeros((len(window), matrix.shape[0])) for name, matrix in at.items()}

    def perturbed(perturbations):
        inputs = {}

        def hook(name, x, y):
            inputs[name] = x
            return y + perturbations[name]

        return jnp.sin(linear_maps.logits(hook, model, window)).sum(), inputs

    gradients, inputs = jax.jit(jax.grad(perturbed, has_aux=True))(zeros)
    truth = jax.jit(jax.grad(lambda m: jnp.sin(linear_maps.with_matrices(model, m)(window)).sum()))(at)
    for name in at:
        np.testing.assert_allclose(gradients[name].T @ inputs[name], truth[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_gauss_newton_matrix_of_the_head_is_its_definition_and_that_of_autodiff(model, seen, dense):
    np.testing.assert_allclose(gauss_newton(*seen, chunk=7), dense, rtol=0, atol=1e-12)
    narrow = gauss_newton(*(x.astype(jnp.float32) for x in seen))
    np.testing.assert_allclose(narrow, dense, rtol=0, atol=1e-5 * np.abs(dense).max())

    def loss(head):
        return -jax.nn.log_softmax(seen[0] @ head.T)[:, 0].sum()

    # The loss is convex in linear logits, so its Hessian is the Gauss-Newton matrix.
    hessian = jax.jit(jax.hessian(loss))(model.head)
    np.testing.assert_allclose(hessian.reshape(dense.shape), dense, rtol=0, atol=1e-12)


def test_variances_of_the_logits_are_those_by_the_jacobian(trained, last_layer, dense):
    np.testing.assert_allclose(last_layer.precision.variance(), CholeskyPrecision(dense, TAU).variance(), rtol=1e-10)
    covariance = np.linalg.inv(dense + TAU * np.eye(len(dense)))
    variance = last_layer.logit_variance(CONTEXTS)
    for position in (0, 3):
        jacobian = jacobian_of(trained, last_layer.mean, CONTEXTS[1], jnp.asarray(position))
        np.testing.assert_allclose(variance[1, position], np.diag(jacobian @ covariance @ jacobian.T), atol=1e-12)


jacobian_of = eqx.filter_jit(network.logit_jacobian)


def test_the_jacobian_of_every_map_is_a_difference_quotient(model, trained):
    at, position = linear_maps.matrices(model), 2
    jacobian = np.asarray(jacobian_of(trained, at, CONTEXTS[0], jnp.asarray(position)))
    rng = np.random.default_rng(2)
    direction = {name: rng.normal(size=matrix.shape) for name, matrix in at.items()}

    @jax.jit
    def logits(step):
        moved = {name: matrix + step * direction[name] for name, matrix in at.items()}
        return linear_maps.with_matrices(model, moved)(CONTEXTS[0])[position]

    along = jacobian @ np.concatenate([each.ravel() for each in direction.values()])
    np.testing.assert_allclose(along, (logits(1e-6) - logits(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-7)


def test_evidence_is_the_gaussian_integral(model, last_layer, dense):
    logits = np.asarray(compiled_logits(model, jnp.asarray(WINDOWS)))
    log_likelihood = np.take_along_axis(log_softmax(logits, axis=-1), WINDOWS[:, 1:, None], -1).sum()
    k, square = len(dense), np.square(model.head).sum()
    by_hand = (
        log_likelihood
        - 0.5 * TAU * square
        + 0.5 * k * np.log(TAU / (2 * np.pi))
        + 0.5 * k * np.log(2 * np.pi)
        - 0.5 * np.linalg.slogdet(dense + TAU * np.eye(k))[1]
    )
    np.testing.assert_allclose(last_layer.log_evidence, by_hand, rtol=1e-10)
    np.testing.assert_allclose(last_layer.evidence.log_likelihood, log_likelihood, rtol=1e-10)
    np.testing.assert_allclose(last_layer.evidence.scatter, TAU * square, rtol=1e-12)


GRID = np.exp(np.arange(np.log(1e-3), np.log(1e3), 0.005))


def test_kronecker_evidence_is_that_of_the_dense_blocks_and_tuning_that_of_a_grid(model, trained):
    found = laplace(trained, structure="kronecker", positions="apart")
    at = linear_maps.matrices(model)
    assert found.precision.size == sum(matrix.size for matrix in at.values())
    ratio = found.precision.log_det - found.precision.size * np.log(found.prior_precision)
    np.testing.assert_allclose(found.evidence.log_det_ratio, ratio, rtol=1e-10)
    ones = jnp.ones(found.precision.size)
    eigenvalues = np.asarray(found.precision.curvature_eigenvalues(found.prior_precision * ones))
    square = sum(float(np.square(matrix).sum()) for matrix in at.values())
    best = GRID[np.argmax([-np.log1p(eigenvalues / tau).sum() - tau * square for tau in GRID])]
    np.testing.assert_allclose(found.prior_precision, best, rtol=0.03)


def test_tuning_of_the_head_is_that_of_a_grid(model, trained, dense):
    eigenvalues, square = np.linalg.eigvalsh(dense), np.square(model.head).sum()
    best = GRID[np.argmax([-np.log1p(np.maximum(eigenvalues, 0) / tau).sum() - tau * square for tau in GRID])]
    np.testing.assert_allclose(laplace(trained, structure="last-layer").prior_precision, best, rtol=0.03)


def test_predictions_are_refused_without_a_key_or_draws(last_layer):
    for key, draws, message in ((None, 1, "key: got None"), (jax.random.key(0), 0, "draws: got 0")):
        with pytest.raises(ValueError, match=message):
            last_layer.predictive(key, draws, CONTEXTS, TARGETS)


def test_tuning_looks_beyond_a_bad_guess_and_refuses_an_evidence_without_a_maximum():
    for near in (None, 20.0, 1e-3):
        found = coarse_prior_precision(lambda tau: -(np.log(tau / 30.0) ** 2), near)
        np.testing.assert_allclose(found, 30.0, rtol=0.03)
    with pytest.raises(ValueError, match="prior_precision: the evidence has no maximum between"):
        coarse_prior_precision(lambda tau: -tau / 2)
    with pytest.raises(ValueError, match=r"prior_precision: the evidence at .* is nan"):
        coarse_prior_precision(lambda tau: float("nan"))


def test_sampled_predictions_average_the_softmax_of_moved_heads(last_layer, seen):
    found = last_layer.predictive(jax.random.key(3), 4, CONTEXTS, TARGETS)
    logits = np.einsum("nd,svd->snv", seen[0], found.posterior["head"]).reshape(4, *TARGETS.shape, -1)
    np.testing.assert_allclose(found.probabilities, softmax(logits, axis=-1).mean(0), rtol=1e-10)
    truth = np.take_along_axis(log_softmax(logits, axis=-1), WINDOWS[None, :, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(found.log_likelihood, truth, rtol=1e-10)
    draws = last_layer.mean["head"].ravel() + last_layer.precision.sample(jax.random.key(3), 4)
    np.testing.assert_allclose(found.posterior["head"].reshape(4, -1), draws, rtol=1e-12)


def test_probit_loss_and_calibration_error_by_hand(last_layer, seen):
    scaled = probit_logits(np.array([[2 * np.log(3), 0.0]]), np.array([[24 / np.pi, 0.0]]))
    np.testing.assert_allclose(softmax(scaled, axis=-1), [[0.75, 0.25]], rtol=1e-14)
    flat = softmax(probit_logits(np.asarray(seen[1]), last_layer.logit_variance(CONTEXTS).reshape(24, -1)), axis=-1)
    np.testing.assert_allclose(last_layer.probit_probabilities(CONTEXTS).reshape(24, -1), flat, rtol=1e-12)
    # Two of confidence 0.9, one of them right; two of confidence 0.6, both right.
    p = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.6, 0.4]])
    np.testing.assert_allclose(calibration_error(p, np.array([0, 0, 0, 0])), 0.5 * 0.4 + 0.5 * 0.4, rtol=1e-12)
    of_map = np.array([0.1, 2.0, 0.3, 0.4])
    found = score(p[:, None], np.zeros((4, 1), int), of_map)
    losses = -np.log([0.9, 0.1, 0.6, 0.6])
    np.testing.assert_allclose(found["nats_per_character"], losses.mean(), rtol=1e-12)
    np.testing.assert_allclose(found["standard_error"], losses.std(ddof=1) / 2, rtol=1e-12)
    np.testing.assert_allclose(found["minus_map"], losses.mean() - 0.7, rtol=1e-12)
    np.testing.assert_allclose(found["minus_map_standard_error"], (losses - of_map).std(ddof=1) / 2, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "diagonal"}, "structure: got 'diagonal'; pass one of last-layer, kronecker"),
        ({"structure": "kronecker", "sites": ("head",)}, "sites: is no option for a TrainedNetwork"),
        ({"structure": "kronecker", "positions": "all"}, "positions: got 'all'"),
        ({"structure": "last-layer", "prior_precision": 0.0}, "prior_precision: got 0.0; pass a value greater than 0"),
        ({"structure": "last-layer", "prior_precision": np.nan}, "prior_precision: contains NaN"),
    ],
)
def test_bad_options_of_a_network_are_refused_by_name(trained, options, message):
    with pytest.raises(ValueError, match=message):
        laplace(trained, **options)


def stopped_before_its_first_step(folder, config):
    """The folder, with a text of a few words and a run on it."""
    words = np.random.default_rng(0).choice(["attention", "is", "a", "change"], 200)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    text = load(folder / "text.txt", config.context + 1)
    state = initial_state(config, len(text.vocabulary))
    checkpoint.save(folder / "run" / checkpoint.NAME, config.as_dict(), text, state, 0, new_record())
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return stopped_before_its_first_step(tmp_path_factory.mktemp("laplace"), SMALL)


def run_command(folder, *arguments):
    """Exit status of the command on the run, with what is given last winning."""
    given = ("--corpus", folder / "text.txt", "--run", folder / "run", "--characters", "40", "--draws", "3")
    with pytest.raises(SystemExit) as info:
        cli.run(lambda: command.main(["laplace", *(str(argument) for argument in (*given, *arguments))]))
    return info.value.code


@pytest.mark.parametrize("structure", ["last-layer", "kronecker"])
def test_the_command_prints_a_table_and_writes_a_tree(run_folder, structure, capsys):
    out = run_folder / f"{structure}.nc"
    assert run_command(run_folder, "--structure", structure, "--prior-precision", "2", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "MAP" in printed
    assert "linearised, 3" in printed
    assert ("probit" in printed) == (structure == "last-layer")
    tree = load_tree(out)
    summary = json.loads(tree.attrs["laplace"])
    assert (summary["prior_precision"], summary["training_characters"]) == (2.0, 40)
    assert ("0.query" in summary["covered"]) == (structure == "kronecker")
    assert summary["parameters"] == sum(int(np.prod(shape)) for shape in summary["covered"].values())
    assert tree["posterior"]["head"].shape == (1, 3, *summary["covered"]["head"])
    by_draw = tree["log_likelihood"]["tokens"]
    assert by_draw.shape == (1, 3, *tree["observed_data"]["tokens"].shape)
    mixture = np.log(np.exp(by_draw.to_numpy().astype(float)).mean((0, 1))).mean()
    np.testing.assert_allclose(summary["scores"]["linearised, 3 draws"]["nats_per_character"], -mixture, rtol=1e-4)


def test_the_draws_do_not_come_from_the_key_of_the_signs(run_folder, monkeypatch):
    used = []

    def noting(function, place):
        return lambda *arguments: used.append(jax.random.key_data(arguments[place]).tolist()) or function(*arguments)

    monkeypatch.setattr(network, "combinations", noting(network.combinations, 1))
    monkeypatch.setattr(BlockPrecision, "sample", noting(BlockPrecision.sample, 1))
    out = run_folder / "keys.nc"
    assert run_command(run_folder, "--structure", "kronecker", "--prior-precision", "2", "--out", out) == 0
    signs, draws = used
    assert signs != draws


def test_of_one_window_the_command_says_that_the_standard_error_is_undefined(tmp_path, capsys):
    folder = stopped_before_its_first_step(tmp_path, dataclasses.replace(SMALL, evaluation_windows=1))
    out = tmp_path / "one.nc"
    assert run_command(folder, "--structure", "last-layer", "--prior-precision", "2", "--out", out) == 0
    shown = [row for row in capsys.readouterr().out.splitlines() if "undefined" in row]
    assert [row.split("│")[3].strip() for row in shown] == ["undefined"] * 3
    scores = json.loads(load_tree(out).attrs["laplace"])["scores"]
    assert {score["standard_error"] for score in scores.values()} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run", "missing"), "--run: no checkpoint at missing/checkpoint.eqx (No such file or directory); start one"),
        (("--characters", "0"), "--characters: got 0; pass at least 4, one window"),
        (("--characters", "1000000"), "--characters: got 1000000; pass at least 4, one window, and at most"),
        (("--prior-precision", "0"), "--prior-precision: got 0.0; pass a finite number greater than 0"),
        (("--prior-precision", "nan"), "--prior-precision: got nan"),
        (("--draws", "0"), "--draws: got 0; pass an integer of at least 1"),
        (("--seed", "-1"), "--seed: got -1"),
        (("--seed", "4294967296"), "--seed: got 4294967296; pass an integer below 2^32"),
        (("--out", "/proc/laplace.nc"), "--out: /proc/laplace.nc: cannot be written"),
        (("--out", "laplace.json"), "--out: laplace.json: ends in '.json'; pass a path ending in .nc"),
    ],
)
def test_bad_arguments_are_named(run_folder, arguments, message, capsys):
    assert run_command(run_folder, "--structure", "last-layer", "--out", run_folder / "x.nc", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_another_text_is_refused(run_folder, capsys):
    other = run_folder / "other.txt"
    other.write_text((run_folder / "text.txt").read_text(encoding="utf-8") + " attention", encoding="utf-8")
    assert run_command(run_folder, "--structure", "kronecker", "--out", run_folder / "x.nc", "--corpus", other) == 2
    assert "error: --run: " in capsys.readouterr().err


def test_another_structure_is_refused(run_folder, capsys):
    assert run_command(run_folder, "--structure", "diagonal", "--out", run_folder / "x.nc") == 2
    assert "'diagonal'" in capsys.readouterr().err
