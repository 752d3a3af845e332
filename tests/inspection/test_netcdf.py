import json

import numpy as np

from prob_transformer.inference.result_tree import load, save
from prob_transformer.inspection.netcdf import inspection_tree


def test_everything_comes_back_from_a_file(made_up, tmp_path):
    save(inspection_tree(made_up, {"model": "m", "packages": {"jax": "1"}}), tmp_path / "inspect.nc")
    back = load(tmp_path / "inspect.nc")
    margins = back["margins"].to_dataset()
    assert margins["log_det"].dims == ("layer", "head", "position")
    assert margins.coords["layer"].values.tolist() == [3, 7]
    np.testing.assert_array_equal(margins["sign"], made_up.sign)
    np.testing.assert_array_equal(margins["log_det"], made_up.log_det)
    np.testing.assert_array_equal(margins["barrier"], -made_up.log_det)
    expected = [[[1, -np.exp(-1), -np.exp(-4), np.exp(2), -np.exp(-3)]], [[1, np.exp(0.5), 0, np.exp(1.5), np.inf]]]
    np.testing.assert_allclose(margins["determinant"], expected, rtol=1e-15)
    np.testing.assert_array_equal(back["carriers/carrier"], made_up.carriers)
    np.testing.assert_array_equal(back["carriers/share"], made_up.shares)
    assert back["carriers/share"].dims == ("layer", "head", "position", "rank")
    assert back["text/token"].values.tolist() == ["</script><!--", ' "${css}&', "␀\n", "😀", ""]
    np.testing.assert_array_equal(back["text/token_number"], made_up.tokens)
    np.testing.assert_array_equal(back["summary/negative_share"], [[0.75], [0]])
    assert back.attrs["model"] == "m"
    assert json.loads(back.attrs["packages"]) == {"jax": "1"}
    assert json.loads(back.attrs["setting"]) == {"values": "identity", "self_inclusive": False}
