import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from models import cli
from models.char_gpt import __main__ as command
from models.char_gpt import checkpoint, laplace, last_layer, linear_maps
from models.char_gpt.config import Config
from models.char_gpt.evidence import Evidence, tuned_prior_precision
from models.char_gpt.laplace import covered, curvature, evidence_of, tuned
from models.char_gpt.predictive import calibration_error, probit, sampled, score
from models.char_gpt.train import initial_state
from models.char_gpt.training_record import new_record
from models.corpus import load
from prob_transformer.inference import results
from prob_transformer.inference.laplace import Precision
from prob_transformer.inference.laplace.kronecker import KroneckerPrecision
from tests.support.tiny_gpt import compiled_logits, made_wide

SMALL = Config(layers=2, width=4, heads=2, context=4, steps=2, batch=2, evaluation_windows=3)
VOCABULARY, TAU = 5, 0.6
WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, (6, SMALL.context + 1))


@pytest.fixture(scope="module")
def model():
    return made_wide(SMALL, VOCABULARY)


@pytest.fixture(scope="module")
def seen(model):
    """Inputs of the head and logits at all positions of all windows."""
    return last_layer.head_inputs(model, jnp.asarray(WINDOWS[:, :-1]))


@pytest.fixture(scope="module")
def dense(seen):
    """The Gauss-Newton matrix of the head by its definition, position by position."""
    inputs, logits = (np.asarray(x) for x in seen)
    p = softmax(logits, axis=-1)
    return sum(
        np.kron(np.diag(p_n) - np.outer(p_n, p_n), np.outer(phi, phi)) for p_n, phi in zip(p, inputs, strict=True)
    )


def test_maps_as_matrices_and_back_leave_the_model_as_it_is(model):
    names = linear_maps.names(model)
    assert len(names) == 2 * 6 + 1
    at = linear_maps.matrices(model, names)
    doubled = linear_maps.with_matrices(model, {name: 2 * matrix for name, matrix in at.items()})
    again = linear_maps.matrices(doubled, names)
    for name in names:
        np.testing.assert_array_equal(again[name], 2 * at[name])
    back = linear_maps.with_matrices(doubled, linear_maps.unflat(linear_maps.flat(at), at))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True))


def test_every_map_is_tapped_with_its_own_inputs_and_outputs(model):
    """With inputs a_s and a loss whose gradient in the outputs is g_s, the gradient in the matrix is sum g_s a_s^T."""
    window = jnp.asarray(WINDOWS[0, :-1])
    at = linear_maps.matrices(model, linear_maps.names(model))
    zeros = {name: jnp.zeros((len(window), matrix.shape[0])) for name, matrix in at.items()}

    def perturbed(perturbations):
        inputs = {}

        def tap(name, x, y):
            inputs[name] = x
            return y + perturbations[name]

        return jnp.sin(linear_maps.network(tap, model, window)).sum(), inputs

    gradients, inputs = jax.jit(jax.grad(perturbed, has_aux=True))(zeros)
    truth = jax.jit(jax.grad(lambda m: jnp.sin(linear_maps.with_matrices(model, m)(window)).sum()))(at)
    for name in at:
        np.testing.assert_allclose(gradients[name].T @ inputs[name], truth[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_gauss_newton_matrix_of_the_head_is_its_definition_and_that_of_autodiff(model, seen, dense):
    found = last_layer.gauss_newton(*seen, chunk=7)
    np.testing.assert_allclose(found, dense, rtol=0, atol=1e-12)

    def loss(head):
        return -jax.nn.log_softmax(seen[0] @ head.T)[:, 0].sum()

    # The loss is convex in linear logits, so its Hessian is the Gauss-Newton matrix.
    hessian = jax.jit(jax.hessian(loss))(model.head)
    np.testing.assert_allclose(hessian.reshape(found.shape), dense, rtol=0, atol=1e-12)


def test_the_gauss_newton_matrix_in_float32(seen, dense):
    narrow = last_layer.gauss_newton(*(x.astype(jnp.float32) for x in seen))
    np.testing.assert_allclose(narrow, dense, rtol=0, atol=1e-5 * np.abs(dense).max())


def test_head_precision_is_the_dense_matrix(dense):
    precision = last_layer.HeadPrecision(dense, TAU)
    matrix = dense + TAU * np.eye(len(dense))
    inverse = np.linalg.inv(matrix)
    rng = np.random.default_rng(1)
    vectors, jacobian = rng.normal(size=(len(dense), 3)), rng.normal(size=(4, len(dense)))
    assert isinstance(precision, Precision)
    np.testing.assert_allclose(precision.log_det, np.linalg.slogdet(matrix)[1], rtol=1e-12)
    np.testing.assert_allclose(precision.solve(vectors), inverse @ vectors, atol=1e-12)
    np.testing.assert_allclose(precision.variance(), np.diag(inverse), rtol=1e-10)
    np.testing.assert_allclose(precision.covariance_of(jacobian), jacobian @ inverse @ jacobian.T, atol=1e-12)
    white = precision.sample(jax.random.key(0), 20_000) @ np.linalg.cholesky(matrix)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(len(dense)), atol=5 * np.sqrt(2 / len(white)))


jacobian_of = jax.jit(linear_maps.logit_jacobian)


def test_moments_of_the_logits_are_those_by_the_jacobian(model, seen, dense):
    precision = last_layer.HeadPrecision(dense, TAU)
    covariance = last_layer.logit_covariance(precision, seen[0])
    at = covered(model, "last-layer")
    for position in (0, 3):
        jacobian = jacobian_of(model, at, jnp.asarray(WINDOWS[1, :-1]), jnp.asarray(position))
        truth = precision.covariance_of(jacobian)
        np.testing.assert_allclose(covariance[SMALL.context + position], truth, atol=1e-12)
    variance = last_layer.logit_variance(precision, seen[0])
    np.testing.assert_allclose(variance, np.diagonal(covariance, axis1=1, axis2=2), atol=1e-12)


def test_the_jacobian_of_every_map_is_a_difference_quotient(model):
    at = covered(model, "kronecker")
    window, position = jnp.asarray(WINDOWS[0, :-1]), 2
    jacobian = jacobian_of(model, at, window, jnp.asarray(position))
    direction = np.random.default_rng(2).normal(size=jacobian.shape[1])

    @jax.jit
    def logits(step):
        moved = linear_maps.unflat(linear_maps.flat(at) + step * direction, at)
        return linear_maps.with_matrices(model, moved)(window)[position]

    np.testing.assert_allclose(jacobian @ direction, (logits(1e-6) - logits(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-7)


def log_likelihood(model):
    logits = np.asarray(compiled_logits(model, jnp.asarray(WINDOWS)))
    return np.take_along_axis(log_softmax(logits, axis=-1), WINDOWS[:, 1:, None], -1).sum()


def test_evidence_is_the_gaussian_integral(model, dense):
    windows, at = jnp.asarray(WINDOWS), covered(model, "last-layer")
    found = curvature(model, windows, "last-layer")
    k, square = len(dense), np.square(model.head).sum()
    by_hand = (
        log_likelihood(model)
        - 0.5 * TAU * square
        + 0.5 * k * np.log(TAU / (2 * np.pi))
        + 0.5 * k * np.log(2 * np.pi)
        - 0.5 * np.linalg.slogdet(dense + TAU * np.eye(k))[1]
    )
    parts = evidence_of(model, windows, at, found.log_det_ratio)(TAU)
    np.testing.assert_allclose(parts.total, by_hand, rtol=1e-10)
    np.testing.assert_allclose(parts.log_likelihood, log_likelihood(model), rtol=1e-10)
    np.testing.assert_allclose(parts.scatter, TAU * square, rtol=1e-12)


def test_kronecker_evidence_is_that_of_the_dense_blocks_and_tuning_that_of_a_grid(model):
    windows, at = jnp.asarray(WINDOWS), covered(model, "kronecker")
    found = curvature(model, windows, "kronecker", "apart")
    precision = found.at(TAU)
    assert precision.size == sum(matrix.size for matrix in at.values())
    ratio = precision.log_det - precision.size * np.log(TAU)
    np.testing.assert_allclose(found.log_det_ratio(TAU), ratio, rtol=1e-10)
    evidence = evidence_of(model, windows, at, found.log_det_ratio)
    grid = np.exp(np.arange(np.log(1e-3), np.log(1e3), 0.005))
    best = grid[np.argmax([evidence(tau).total for tau in grid])]
    np.testing.assert_allclose(tuned(model, windows, at, found), best, rtol=0.03)


def test_tuning_of_the_head_is_that_of_a_grid(model, dense):
    windows, at = jnp.asarray(WINDOWS), covered(model, "last-layer")
    eigenvalues, square = np.linalg.eigvalsh(dense), np.square(model.head).sum()
    grid = np.exp(np.arange(np.log(1e-3), np.log(1e3), 0.005))
    values = [-np.log1p(np.maximum(eigenvalues, 0) / tau).sum() - tau * square for tau in grid]
    best = grid[np.argmax(values)]
    np.testing.assert_allclose(tuned(model, windows, at, curvature(model, windows, "last-layer")), best, rtol=0.03)


def test_tuning_looks_beyond_a_bad_guess_and_refuses_an_evidence_without_a_maximum():
    def peak(tau):
        return -(np.log(tau / 30.0) ** 2)

    for near in (None, 20.0, 1e-3):
        np.testing.assert_allclose(tuned_prior_precision(peak, near), 30.0, rtol=0.03)
    with pytest.raises(ValueError, match="--prior-precision: the evidence has no maximum between"):
        tuned_prior_precision(lambda tau: Evidence(0.0, 0.0, tau).total)
    with pytest.raises(ValueError, match=r"--prior-precision: the evidence at .* is nan"):
        tuned_prior_precision(lambda tau: float("nan"))


def test_sampled_predictions_average_the_softmax_of_moved_heads(model, seen):
    at = covered(model, "last-layer")
    draws = {"head": jnp.asarray(np.random.default_rng(3).normal(size=(4, *model.head.shape)))}
    probabilities, log_p = sampled(model, at, draws, jnp.asarray(WINDOWS))
    logits = np.einsum("nd,svd->snv", seen[0], model.head + draws["head"]).reshape(4, *WINDOWS[:, 1:].shape, -1)
    np.testing.assert_allclose(probabilities, softmax(logits, axis=-1).mean(0), rtol=1e-10)
    truth = np.take_along_axis(log_softmax(logits, axis=-1), WINDOWS[None, :, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(log_p, truth, rtol=1e-10)


def test_probit_loss_and_calibration_error_by_hand():
    np.testing.assert_allclose(probit(np.array([[np.log(3), 0.0]]), np.zeros((1, 2))), [[0.75, 0.25]], rtol=1e-14)
    variances = np.array([[24 / np.pi, 0.0]])
    np.testing.assert_allclose(probit(np.array([[2 * np.log(3), 0.0]]), variances), [[0.75, 0.25]], rtol=1e-14)
    # Two of confidence 0.9, one of them right; two of confidence 0.6, both right.
    p = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.6, 0.4]])
    np.testing.assert_allclose(calibration_error(p, np.array([0, 0, 0, 0])), 0.5 * 0.4 + 0.5 * 0.4, rtol=1e-12)
    found = score(p[:, None], np.zeros((4, 1), int))
    losses = -np.log([0.9, 0.1, 0.6, 0.6])
    np.testing.assert_allclose(found.nats_per_character, losses.mean(), rtol=1e-12)
    np.testing.assert_allclose(found.standard_error, losses.std(ddof=1) / 2, rtol=1e-12)


def stopped_before_its_first_step(folder, config):
    """The folder, with a text of a few words and a run on it."""
    words = np.random.default_rng(0).choice(["attention", "is", "a", "change"], 200)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    text = load(folder / "text.txt", config.context + 1)
    state = initial_state(config, len(text.vocabulary))
    checkpoint.save(folder / "run" / checkpoint.NAME, config.as_dict(), text.sha256, state, 0, new_record())
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return stopped_before_its_first_step(tmp_path_factory.mktemp("laplace"), SMALL)


def run_command(folder, *arguments):
    """Exit status of the command on the run, with what is given last winning."""
    given = ("--corpus", folder / "text.txt", "--run", folder / "run", "--characters", "40", "--draws", "3")
    with pytest.raises(SystemExit) as info:
        cli.run(lambda: command.main(["laplace", *(str(argument) for argument in (*given, *arguments))]))
    return info.value.code


@pytest.mark.parametrize("structure", ["last-layer", "kronecker"])
def test_the_command_prints_a_table_and_writes_a_tree(trained, structure, capsys):
    out = trained / f"{structure}.nc"
    assert run_command(trained, "--structure", structure, "--prior-precision", "2", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "MAP" in printed
    assert "linearised, 3" in printed
    assert ("probit" in printed) == (structure == "last-layer")
    tree = results.load(out)
    summary = json.loads(tree.attrs["laplace"])
    assert summary["prior_precision"] == 2.0
    assert summary["training_characters"] == 40
    assert ("0.query" in summary["covered"]) == (structure == "kronecker")
    assert summary["parameters"] == sum(int(np.prod(shape)) for shape in summary["covered"].values())
    assert tree["posterior"]["head"].shape == (1, 3, *summary["covered"]["head"])
    by_draw = tree["log_likelihood"]["tokens"]
    assert by_draw.shape == (1, 3, *tree["observed_data"]["tokens"].shape)
    mixture = np.log(np.exp(by_draw.to_numpy().astype(float)).mean((0, 1))).mean()
    np.testing.assert_allclose(summary["scores"]["linearised, 3 draws"]["nats_per_character"], -mixture, rtol=1e-4)


def test_the_draws_do_not_come_from_the_key_of_the_signs(trained, monkeypatch):
    used = []

    def noting(function, place):
        return lambda *arguments: used.append(jax.random.key_data(arguments[place]).tolist()) or function(*arguments)

    monkeypatch.setattr(laplace, "combinations", noting(laplace.combinations, 1))
    monkeypatch.setattr(KroneckerPrecision, "sample", noting(KroneckerPrecision.sample, 1))
    out = trained / "keys.nc"
    assert run_command(trained, "--structure", "kronecker", "--prior-precision", "2", "--out", out) == 0
    signs, draws = used
    assert signs != draws


def test_of_one_window_the_command_says_that_the_standard_error_is_undefined(tmp_path, capsys):
    folder = stopped_before_its_first_step(tmp_path, dataclasses.replace(SMALL, evaluation_windows=1))
    out = tmp_path / "one.nc"
    assert run_command(folder, "--structure", "last-layer", "--prior-precision", "2", "--out", out) == 0
    shown = [row for row in capsys.readouterr().out.splitlines() if "undefined" in row]
    assert [row.split("│")[3].strip() for row in shown] == ["undefined"] * 3
    scores = json.loads(results.load(out).attrs["laplace"])["scores"]
    assert {score["standard_error"] for score in scores.values()} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run", "missing"), "--run: no checkpoint at missing/checkpoint.eqx; make one with train"),
        (("--characters", "0"), "--characters: got 0; pass at least 4, one window"),
        (("--characters", "1000000"), "--characters: got 1000000; pass at least 4, one window, and at most"),
        (("--prior-precision", "0"), "--prior-precision: got 0.0; pass a finite number greater than 0"),
        (("--prior-precision", "nan"), "--prior-precision: got nan"),
        (("--draws", "0"), "--draws: got 0; pass an integer of at least 1"),
        (("--seed", "-1"), "--seed: got -1"),
        (("--out", "laplace.json"), "--out: got laplace.json; pass the path of a netCDF file"),
    ],
)
def test_bad_arguments_are_named(trained, arguments, message, capsys):
    assert run_command(trained, "--structure", "last-layer", "--out", trained / "x.nc", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_another_text_is_refused(trained, capsys):
    other = trained / "other.txt"
    other.write_text((trained / "text.txt").read_text(encoding="utf-8") + " attention", encoding="utf-8")
    assert run_command(trained, "--structure", "kronecker", "--out", trained / "x.nc", "--corpus", other) == 2
    assert "error: --run: " in capsys.readouterr().err


def test_another_structure_is_refused(trained, model, capsys):
    assert run_command(trained, "--structure", "diagonal", "--out", trained / "x.nc") == 2
    assert "'diagonal'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--structure: got 'diagonal'; pass one of last-layer, kronecker"):
        curvature(model, jnp.asarray(WINDOWS), "diagonal")
