import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import Predictive
from numpyro.infer.util import log_density
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp
from scipy.stats import kstest, lognorm, norm

from models import cli, scalar
from models.scalar import __main__ as command
from models.scalar import infer
from models.scalar.dataset import WEIGHT, generate
from prob_transformer import residual_and_log_det
from prob_transformer.inference import load
from tests.helpers.error_lines import assert_refused


def test_the_library_gives_the_scalar_closed_form():
    for a in (-2.0, 0.7, 3.0):
        embeddings = np.random.default_rng(0).normal(size=6)
        got = residual_and_log_det(scalar.scalar_attention(a), embeddings[:, None])
        for i in range(1, 6):
            weights = np.exp(a * embeddings[:i] * embeddings[i])
            weights /= weights.sum()
            mean = weights @ embeddings[:i]
            jacobian = 1 - a * (weights @ (embeddings[:i] - mean) ** 2)
            np.testing.assert_allclose(got.residual[i, 0], embeddings[i] - mean, atol=1e-13)
            np.testing.assert_allclose(got.sign[i] * np.exp(got.log_det[i]), jacobian, atol=1e-12)


def test_draws_follow_the_process_and_say_where_it_is_no_law():
    embeddings, solved = scalar.draw(jax.random.key(0), -1.0, 64, length=6)
    assert solved == 1.0
    assert embeddings.shape == (64, 6)
    u = np.asarray(embeddings)[:, :3]
    alpha = np.exp(-u[:, :2] * u[:, 2:])
    alpha /= alpha.sum(1, keepdims=True)
    noise = np.stack([u[:, 1] - u[:, 0], u[:, 2] - (alpha * u[:, :2]).sum(1)]).ravel() / scalar.NOISE_SCALE
    assert kstest(noise, "norm").pvalue > 1e-3
    assert scalar.draw(jax.random.key(0), 8.0, 64, length=6)[1] < 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_interaction_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match="a: contains NaN or inf"):
        scalar.scalar_attention(bad)


@pytest.mark.parametrize(("a", "mass"), [(-2.0, 1.0), (0.5, 1.0), (1.5, 1.0313), (4.0, 2.1239)])
def test_masses_on_both_sides_of_the_boundary(a, mass):
    found = scalar.conditional_masses(a)
    assert abs(found["signed"] - 1) < 1e-6
    assert abs(found["absolute"] - mass) < 5e-5
    assert (found["smallest_determinant"] > 0) == (mass == 1.0)


def test_the_models_log_joint_written_by_hand():
    tokens, embeddings = np.array([0, 1, 1]), np.array([[0.3], [-0.8], [1.1]])
    a, weight = 0.6, np.array([[0.4], [-1.2]])
    sites = {"a": jnp.asarray(a), "weight": jnp.asarray(weight), "embeddings": jnp.asarray(embeddings)}
    joint, _ = log_density(scalar.scalar_model, (jnp.asarray(tokens),), {}, sites)
    u = embeddings[:, 0]
    alpha = np.exp(a * u[:2] * u[2])
    alpha /= alpha.sum()
    mean = alpha @ u[:2]
    expected = norm.logpdf(a) + norm.logpdf(weight).sum()
    expected += norm.logpdf(u[0]) + norm.logpdf(u[1] - u[0], 0, 0.5) + norm.logpdf(u[2] - mean, 0, 0.5)
    expected += np.log(abs(1 - a * alpha @ (u[:2] - mean) ** 2))
    expected += log_softmax(embeddings @ weight.T, axis=1)[np.arange(3), tokens].sum()
    np.testing.assert_allclose(joint, expected, atol=1e-11)


def test_prior_draws_of_the_model_inside_the_safe_region():
    model = Predictive(scalar.scalar_model, posterior_samples={"a": -jnp.ones(3)})
    draws = model(jax.random.key(0), length=4)
    assert draws["embeddings"].shape == (3, 4, 1)
    assert set(np.unique(draws["tokens"])) <= {0, 1}


def test_integrals_that_miss_the_density_are_refused():
    # The signed mass is 1 for every a (docs/theory.md section 3).
    with pytest.raises(ValueError, match=r"a: got 100000; .* signed mass"):
        command.main(["100000", "--draws", "1"])


def test_the_command_prints_the_table(capsys):
    command.main(["1.5", "--draws", "4"])
    printed = capsys.readouterr().out
    assert "1.0313" in printed
    assert "1.0000" in printed


SMALL = ["--sequences", "6", "--positions", "4", "--seed", "3"]


def data_of(options=SMALL):
    sequences, positions, seed = (int(options[i]) for i in (1, 3, 5))
    return generate(jax.random.split(jax.random.key(seed))[0], sequences, positions, -1.0, 0.5)


def run(method, out, *options):
    status = command.main(["infer", "--method", method, *SMALL, "--out", str(out), *options])
    return status, load(out) if status == 0 else None


def log_joint(a, scale, embeddings):
    """Written by hand, for one a and any scales: the prior of -a and of the scale, and each u_i given its past."""
    total = lognorm.logpdf(-a, 1.0) + lognorm.logpdf(scale, 1.0)
    for u in np.asarray(embeddings)[..., 0]:
        total += norm.logpdf(u[0])
        for i in range(1, len(u)):
            weights = np.exp(a * u[:i] * u[i])
            weights /= weights.sum()
            mean = weights @ u[:i]
            total += norm.logpdf(u[i], mean, scale) + np.log(1 - a * weights @ (u[:i] - mean) ** 2)
    return total


@pytest.fixture(scope="module")
def grid():
    """On a grid of (a, scale), evenly spaced in log(-a): the largest log joint; mean and deviation of both unknowns."""
    b, scale = np.geomspace(0.002, 80, 160), np.linspace(0.15, 1.5, 100)
    log_joints = np.array([log_joint(-x, scale, data_of().embeddings) for x in b])
    weights = np.exp(log_joints - log_joints.max()) * b[:, None]
    weights /= weights.sum()
    moments = {}
    for name, values, share in (("a", -b, weights.sum(1)), ("noise_scale", scale, weights.sum(0))):
        mean = share @ values
        moments[name] = mean, np.sqrt(share @ (values - mean) ** 2)
    return log_joints.max(), moments


@pytest.mark.slow
def test_the_data_follow_the_process_and_the_decoder():
    drawn = [generate(jax.random.key(seed), 6, 4, -2.0, 0.4) for seed in range(150)]
    embeddings, tokens = np.concatenate([d.embeddings for d in drawn]), np.concatenate([d.tokens for d in drawn])
    residual, sign, log_det = residual_and_log_det(drawn[0].attention, embeddings)
    scaled = np.asarray(residual)[..., 0] / [1.0, 0.4, 0.4, 0.4]
    assert kstest(scaled.ravel(), "norm").pvalue > 1e-3
    later = np.square(scaled[:, 1:])
    assert abs(later.mean() - 1) < 4 * np.sqrt(2 / later.size)
    assert (np.asarray(sign) * np.exp(np.asarray(log_det)) >= 1).all()
    probability = np.exp(log_softmax(embeddings @ np.array(WEIGHT).T, axis=-1))
    for token in range(3):
        expected = probability[..., token]
        error = (tokens == token).sum() - expected.sum()
        assert abs(error) < 4 * np.sqrt((expected * (1 - expected)).sum())


def test_the_same_seed_gives_the_same_data():
    one, same = data_of(), data_of()
    np.testing.assert_array_equal(one.embeddings, same.embeddings)
    np.testing.assert_array_equal(one.tokens, same.tokens)
    assert one.embeddings.shape == (6, 4, 1)
    assert not np.allclose(one.embeddings, data_of([*SMALL[:-1], "4"]).embeddings)


def test_map_is_the_highest_point_of_the_density_written_by_hand(grid, tmp_path, capsys):
    status, tree = run("map", tmp_path / "map.nc")
    assert status == 0
    data, found = data_of(), tree["posterior"].to_dataset()
    a, scale = -found["b"].item(), found["noise_scale"].item()
    here = log_joint(a, scale, data.embeddings)
    np.testing.assert_allclose(-tree["sample_stats/objective"].item(), here, atol=1e-9)
    assert here >= grid[0]
    for step in ((1e-3, 0.0), (-1e-3, 0.0), (0.0, 1e-3), (0.0, -1e-3)):
        assert log_joint(a + step[0], scale + step[1], data.embeddings) < here
    printed = capsys.readouterr().out
    for text in ("map given 6 sequences of 4 embeddings", f"{a:.4f}", f"{scale:.4f}", "constrained coordinates"):
        assert text in printed
    assert json.loads(tree.attrs["dataset"]) == {"a": -1.0, "noise_scale": 0.5, "sequences": 6, "positions": 4}
    assert tree.attrs["seed"] == "3"
    np.testing.assert_array_equal(tree["observed_data/embeddings"], data.embeddings)


def test_map_in_unconstrained_coordinates_includes_the_jacobian(tmp_path):
    _, tree = run("map", tmp_path / "map.zarr", "--space", "unconstrained")
    a, scale = -tree["posterior/b"].item(), tree["posterior/noise_scale"].item()
    joint = log_joint(a, scale, data_of().embeddings)
    np.testing.assert_allclose(-tree["sample_stats/objective"].item(), joint + np.log(-a * scale), atol=1e-9)


@pytest.mark.parametrize("count", [100, pytest.param(4000, marks=pytest.mark.slow)])
def test_laplace_draws_have_the_covariance_of_finite_differences_at_the_mode(count, request, tmp_path, capsys):
    if count > 1000:
        request.getfixturevalue("optimised")
    data = data_of()
    status, tree = run("laplace", tmp_path / "laplace.nc", "--draws", str(count))
    assert status == 0

    def density(z):
        return log_joint(-np.exp(z[0]), np.exp(z[1]), data.embeddings) + z.sum()

    mode = minimize(lambda z: -density(z), np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}).x
    steps = 1e-3 * np.eye(2)
    precision = [
        [
            -(density(mode + r + c) - density(mode + r - c) - density(mode - r + c) + density(mode - r - c)) / 4e-6
            for c in steps
        ]
        for r in steps
    ]
    covariance = np.linalg.inv(precision)
    draws = np.log([tree[f"posterior/{name}"].values[0] for name in ("b", "noise_scale")])
    deviations = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(draws.mean(1), mode, atol=5 * deviations.max() / np.sqrt(count))
    scales = np.outer(deviations, deviations)
    np.testing.assert_allclose(np.cov(draws) / scales, covariance / scales, atol=0.12 * np.sqrt(4000 / count))
    evidence = density(mode) + np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1]
    shown = re.search(r"log-evidence (-[0-9.]+) nats", capsys.readouterr().out)
    np.testing.assert_allclose(float(shown[1]), evidence, atol=2e-4)


def test_nuts_has_the_moments_of_the_sum_over_a_grid(grid, tmp_path, capsys):
    status, tree = run("nuts", tmp_path / "nuts.nc", "--warmup", "200", "--draws", "300")
    assert status == 0
    found = tree["posterior"].to_dataset()
    assert found["b"].shape == (2, 300)
    for name, draws in (("a", -found["b"].values), ("noise_scale", found["noise_scale"].values)):
        mean, deviation = grid[1][name]
        # At least 100 of the 600 draws are worth an independent one.
        assert abs(draws.mean() - mean) < 4 * deviation / np.sqrt(100)
        np.testing.assert_allclose(draws.std(), deviation, rtol=0.35)
    captured = capsys.readouterr()
    assert "nuts given 6 sequences" in captured.out
    assert captured.err.startswith("nuts: compiling, then 500 transitions a chain\n")
    printed = " ".join(captured.out.split())
    unconstrained = {name: np.log(found[name].values) for name in ("b", "noise_scale")}
    diagnostics = ", ".join(
        f"{name} {split_gelman_rubin(values):.3f} and {effective_sample_size(values):.0f}"
        for name, values in unconstrained.items()
    )
    assert f"R-hat and effective sample size: {diagnostics}; 0 divergences" in printed
    assert "law: certified up to rounding in all 600 draws" in printed


@pytest.mark.slow
def test_particles_give_evidence_and_moments_of_the_sum_over_a_grid(tmp_path, capsys):
    out = tmp_path / "particles.nc"
    options = ["--positions", "2", "--particles", "500", "--repeats", "8", "--draws", "300"]
    assert (
        command.main(["infer", "--method", "particles", "--seed", "1", "--sequences", "3", *options, "--out", str(out)])
        == 0
    )
    data, tree = data_of(["", "3", "", "2", "", "1"]), load(out)
    u = np.linspace(-5, 5, 801)
    log_tokens = log_softmax(u[:, None] @ np.array(WEIGHT).T, axis=-1)[:, np.asarray(data.tokens[0])]
    # With one past token the mean is that token: u_2 ~ N(u_1, noise_scale^2).
    log = (norm.logpdf(u) + log_tokens[:, 0])[:, None] + norm.logpdf(u, u[:, None], 0.5) + log_tokens[:, 1]
    evidence = logsumexp(log) + 2 * np.log(u[1] - u[0])
    found = json.loads(tree.attrs["log_evidence"])
    assert abs(found["estimate"] - evidence) < 4 * found["standard_error"] < 0.1
    weights = np.exp(log - logsumexp(log))
    draws = tree["posterior/embeddings"].values[0, :, :, 0]
    for i, marginal in enumerate((weights.sum(1), weights.sum(0))):
        mean = marginal @ u
        assert abs(draws[:, i].mean() - mean) < 5 * np.sqrt(marginal @ (u - mean) ** 2 / 300)
    printed = capsys.readouterr().out
    for text in ("particles given 2 tokens", "embedding 2", f"{draws[:, 1].mean():.4f}", f"{found['estimate']:.4f}"):
        assert text in printed


def test_combined_evidence_of_numbers_known():
    z = np.array([1.0, 2.0, 3.0, 6.0])
    log_mean, error = infer.combined_evidence(np.log(z) - 1000)
    np.testing.assert_allclose(log_mean, np.log(3.0) - 1000, rtol=1e-14)
    np.testing.assert_allclose(error, z.std(ddof=1) / 2 / 3.0)


@pytest.mark.parametrize(("truth", "inside"), [(0.5, "yes"), (0.98, "no"), (0.02, "no")])
def test_rows_say_whether_the_truth_is_inside(truth, inside):
    draws = np.linspace(0, 1, 1001).reshape(7, 143)
    # The sample standard deviation of 1001 evenly spaced points is sqrt(1001 * 1002 / 12) / 1000.
    spread = [f"{np.sqrt(1001 * 1002 / 12) / 1000:.4f}", "0.0250, 0.9750", inside]
    assert infer.row("a", truth, draws) == ["a", f"{truth:.4f}", "0.5000", *spread]
    assert infer.row("a", truth, draws[:1, :1]) == ["a", f"{truth:.4f}", "0.0000", "-", "-", "-"]


@pytest.mark.parametrize("method", ["map", "laplace"])
def test_a_method_that_fails_says_how_and_writes_nothing(method, tmp_path, capsys):
    status, _ = run(method, tmp_path / "result.nc", "--max-steps", "1")
    captured = capsys.readouterr()
    assert status == 1
    assert f"{method}: status: max_steps after 1 steps" in captured.err
    assert "raise max_steps" in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--a", "0"], "--a: got 0.0; pass a number below 0"),
        (["--a", "nan"], "--a: got nan"),
        (["--noise-scale", "0"], "--noise-scale: got 0.0"),
        (["--sequences", "0"], "--sequences: got 0"),
        (["--positions", "1"], "--positions: got 1"),
        (["--repeats", "1"], "--repeats: got 1"),
        (["--particles", "1"], "--particles: got 1"),
        (["--draws", "1"], "--draws: got 1"),
        (["--max-steps", "0"], "--max-steps: got 0"),
        (["--warmup", "0"], "--warmup: got 0"),
        (["--chains", "0"], "--chains: got 0"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--seed", str(2**32)], f"--seed: got {2**32}; pass an integer below 2^32"),
        (["--noise-scale", "1e30"], "not_converged at position"),
        (["--out", "result.csv"], "--out: result.csv: ends in '.csv'"),
    ],
)
def test_bad_arguments_end_with_one_line_and_status_2(options, message, capsys):
    with pytest.raises(SystemExit) as info:
        cli.run(lambda: command.main(["infer", "--method", "map", *options]))
    assert info.value.code == 2
    assert_refused(capsys, f"error: {message}")
