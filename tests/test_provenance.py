import json
import os

import pytest

from prob_transformer import __version__
from prob_transformer.provenance import atomic_path, provenance, write_json, write_text


def test_a_failed_write_leaves_the_old_file_whole_and_no_litter(tmp_path):
    target = tmp_path / "result.json"
    write_json(target, {"figure": 1})

    def write_and_die():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_and_die()
    assert json.loads(target.read_text()) == {"figure": 1}
    assert os.listdir(tmp_path) == ["result.json"]


def test_nan_is_refused_and_the_old_file_stays(tmp_path):
    target = tmp_path / "result.json"
    write_json(target, {"figure": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"figure": float("nan")})
    assert json.loads(target.read_text()) == {"figure": 1}


def test_folders_are_made_and_an_unwritable_one_is_named(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "text")
    assert (tmp_path / "a" / "b.txt").read_text() == "text"
    with pytest.raises(ValueError, match="a: is a folder; pass the path of a file"):
        write_text(tmp_path / "a", "text")
    with pytest.raises(ValueError, match=r"b\.txt.c\.txt: cannot be written"):
        write_text(tmp_path / "a" / "b.txt" / "c.txt", "text")


def test_results_are_readable_by_others_as_far_as_the_umask_lets_them(tmp_path):
    write_text(tmp_path / "result.txt", "text")
    (tmp_path / "plain.txt").write_text("text")
    assert (tmp_path / "result.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


def test_provenance_names_version_command_seed_configuration_and_packages():
    record = provenance(seed=3, configuration={"steps": 5}, command="python -m models.scalar")
    assert record["version"] == __version__
    assert record["command"] == "python -m models.scalar"
    assert (record["seed"], record["configuration"]) == (3, {"steps": 5})
    assert {"jax", "numpyro", "numpy", "scipy"} <= record["packages"].keys()
    json.dumps(record, allow_nan=False)
