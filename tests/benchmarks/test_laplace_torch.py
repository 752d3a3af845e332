import sys

import equinox as eqx
import jax
import numpy as np
import pytest
from scipy import linalg
from scipy.special import softmax

from benchmarks.laplace_torch import __main__ as command
from benchmarks.laplace_torch.compare import comparison, mean_loss, require_same_logits
from benchmarks.laplace_torch.ours import answer
from benchmarks.laplace_torch.problem import problem, weights
from models import cli
from models.char_gpt import checkpoint
from models.char_gpt.config import Config
from models.char_gpt.laplace import load_run
from models.char_gpt.linear_maps import trained_network
from models.char_gpt.train import initial_state
from models.char_gpt.training_record import new_record
from models.corpus import load
from prob_transformer.inference.laplace.kronecker import combinations, kronecker_factors
from prob_transformer.inference.laplace.network import logit_jacobian

SMALL = Config(layers=1, width=4, heads=2, context=4)
SIZES = {"training_windows": 3, "validation_windows": 2, "validation_length": 3, "batch": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a text and a run stopped before its first step."""
    folder = tmp_path_factory.mktemp("laplace-torch")
    words = np.random.default_rng(0).choice(["attention", "is", "a", "change"], 200)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    text = load(folder / "text.txt", SMALL.context + 1)
    state = initial_state(SMALL, len(text.vocabulary))
    checkpoint.save(folder / "run" / checkpoint.NAME, SMALL.as_dict(), text.sha256, state, 0, new_record())
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_run(folder / "run", folder / "text.txt")


def answers():
    """Two answers to one problem, a little apart."""
    p = np.array([[[0.5, 0.5], [0.25, 0.75]]])
    ours = {"evidence": [-100.0, 20.0, 6.0], "probabilities": p, "seconds": 2.0, "first_seconds": 4.0}
    theirs = {
        "evidence": [-101.0, 20.0, 4.0],
        "probabilities": p[:, ::-1],
        "seconds": 8.0,
        "seconds_of_one_window": 1.0,
    }
    return {**ours, "predictive_seconds": 1.0}, {**theirs, "predictive_seconds": 3.0}


def test_differences_are_relative_to_the_other_side_and_seconds_are_theirs_over_ours():
    targets = np.array([[0, 1]])
    found = comparison(*answers(), targets)
    assert found["log_evidence"]["ours"]["total"] == -113.0
    assert found["log_evidence"]["theirs"]["total"] == -113.0
    assert found["differences"]["log_evidence_relative"] == 0.0
    assert found["differences"]["parts_relative"] == {"log_likelihood": 1 / 101, "log_det_ratio": 0.0, "scatter": 0.5}
    assert found["differences"]["parts_largest_nats"] == 2.0
    assert found["differences"]["probabilities_largest"] == 0.25
    one, other = -np.log(0.5 * 0.75) / 2, -np.log(0.25 * 0.5) / 2
    np.testing.assert_allclose(found["differences"]["predictive_loss_relative"], (other - one) / other, rtol=1e-12)
    assert not found["agree"]
    assert (found["seconds"]["ratio_first"], found["seconds"]["ratio_steady"]) == (2.0, 4.0)
    same = answers()[0] | {"seconds_of_one_window": 1.0}
    assert comparison(same, same, targets)["agree"]


def test_other_logits_are_refused():
    logits = np.array([[1.0, -2.0]])
    assert require_same_logits(logits, logits + 1e-6) < 1e-5
    with pytest.raises(ValueError, match="--torch-python: its model gives other logits"):
        require_same_logits(logits, logits + 1e-3)
    with pytest.raises(ValueError, match="--torch-python: its model gives other logits, nan"):
        require_same_logits(logits, logits * np.nan)


def test_the_weights_handed_over_give_the_logits(loaded):
    """One position attends to itself alone, so the whole model is a few lines of NumPy."""
    model, _, text = loaded
    w = {name: x.astype(float) for name, x in weights(model).items()}

    def norm(x, name):
        centred = x - x.mean()
        return w[f"{name}.scale"] * centred / np.sqrt(np.square(centred).mean() + 1e-5) + w[f"{name}.bias"]

    character = int(text.validation[0])
    stream = w["token_embedding"][character] + w["position_embedding"][0]
    stream = stream + w["0.output"] @ w["0.value"] @ norm(stream, "0.attention_norm")
    hidden = np.asarray(jax.nn.gelu(w["0.up"] @ norm(stream, "0.mlp_norm")))
    stream = stream + w["0.down"] @ hidden
    logits = w["head"] @ norm(stream, "final_norm")
    np.testing.assert_allclose(model(np.array([character]))[0], logits, rtol=1e-5, atol=1e-6)


def test_our_answer_is_the_probit_of_the_dense_covariance(loaded):
    model, config, text = loaded
    given = problem(model, config, text, 2.0, SIZES)
    assert given["training"].shape == (3, 5)
    assert given["validation"].shape == (2, 4)
    found = answer(model, given, "kronecker")
    contexts = given["validation"][:, :-1]
    network = trained_network(model, given["training"])
    jacobian = eqx.filter_jit(logit_jacobian)(network, network.maps, contexts[1], np.array(2))
    rows = combinations("together", jax.random.key(0), *given["training"][:, :-1].shape)
    factors = kronecker_factors(network.logits, model, network.examples, rows)
    blocks = [np.kron(factors[name].output, factors[name].input) for name in network.maps]
    dense = linalg.block_diag(*blocks).astype(float) + 2.0 * np.eye(jacobian.shape[1])
    variance = np.diag(jacobian @ np.linalg.solve(dense, np.asarray(jacobian, float).T))
    logits = np.asarray(jax.vmap(model)(contexts))
    scaled = logits[1, 2] / np.sqrt(1 + np.pi / 8 * variance)
    np.testing.assert_allclose(found["probabilities"][1, 2], softmax(scaled), rtol=1e-4)
    assert found["probabilities"].shape == logits.shape
    by_hand = [
        -np.log(p[t])
        for p, t in zip(found["probabilities"].reshape(6, -1), given["validation"][:, 1:].flat, strict=True)
    ]
    np.testing.assert_allclose(mean_loss(found["probabilities"], given["validation"][:, 1:]), np.mean(by_hand))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run", "missing"), "--run: no checkpoint at missing/checkpoint.eqx"),
        (("--torch-python", "missing"), "--torch-python: missing cannot be run"),
        (
            ("--torch-python", sys.executable, "--training-windows", "0"),
            "--training-windows: got 0; pass an integer of",
        ),
        (("--validation-length", "5"), "--validation-length: got 5; pass at most the context of the run, 4"),
        (("--validation-windows", "99999"), "--validation-windows: got 99999; pass at most"),
        (("--prior-precision", "0"), "--prior-precision: got 0.0; pass a finite number greater than 0"),
    ],
)
def test_bad_arguments_are_named(folder, arguments, message, capsys):
    given = ("--run", folder / "run", "--corpus", folder / "text.txt", "--torch-python", "missing")
    sizes = ("--validation-length", "3", "--out", folder / "out.json")
    with pytest.raises(SystemExit) as info:
        cli.run(lambda: command.main([str(x) for x in (*given, *sizes, *arguments)]))
    assert info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out.json").exists()
