import numpy as np
import pytest

from prob_transformer.inspection import Setting
from prob_transformer.inspection.text_margins import Inspection
from prob_transformer.pretrained.load import load_pretrained
from tests.helpers.tiny_models import LLAMA, llama_weights, write


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of a random model of the Llama family with one token a byte and a context of 32."""
    return write(tmp_path_factory.mktemp("models") / "tiny & <small>", LLAMA, llama_weights(LLAMA))


@pytest.fixture(scope="session")
def loaded(model):
    return load_pretrained(str(model))


@pytest.fixture
def made_up():
    """Two layers of one head on five tokens; the numbers are chosen, not computed."""
    sign = np.array([[[1, -1, -1, 1, -1]], [[1, 1, 1, 1, 1]]], np.int8)
    log_det = np.array([[[0.0, -1.0, -4.0, 2.0, -3.0]], [[0.0, 0.5, -np.inf, 1.5, 800.0]]], np.float32)
    sign[1, 0, 2] = 0
    carriers = np.zeros((2, 1, 5, 3), int)
    carriers[:, :, 3:] = [2, 0, 1]
    shares = np.zeros((2, 1, 5, 3), np.float32)
    shares[:, :, 3:] = [0.5, 0.25, 0.125]
    pieces = ("</script><!--", ' "${css}&', "\0\n", "😀", "")
    return Inspection(pieces, np.arange(5), (3, 7), sign, log_det, carriers, shares, Setting())
