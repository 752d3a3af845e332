import ast
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import hatchling.build
import pytest

import prob_transformer

ROOT = Path(prob_transformer.__file__).resolve().parent.parent


def test_every_public_name_is_there_once_and_documented():
    assert len(set(prob_transformer.__all__)) == len(prob_transformer.__all__)
    for name in prob_transformer.__all__:
        assert getattr(prob_transformer, name).__doc__, name


def test_the_version_is_the_one_of_pyproject():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == prob_transformer.__version__


def test_the_wheel_holds_the_library_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    wheel = hatchling.build.build_wheel(str(tmp_path))
    about = f"prob_transformer-{prob_transformer.__version__}.dist-info"
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        names = archive.namelist()
        scripts = archive.read(f"{about}/entry_points.txt").decode()
    assert {Path(name).parts[0] for name in names} == {"prob_transformer", about}
    assert {f"prob_transformer/inspect/page.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert "prob-transformer = prob_transformer.__main__:main" in scripts


def test_the_library_imports_nothing_that_is_in_a_checkout_only():
    checkout = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()} - {"prob_transformer"}
    assert "models" in checkout
    for path in (ROOT / "prob_transformer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in checkout, path
            elif isinstance(node, ast.Import):
                assert not {name.name.partition(".")[0] for name in node.names} & checkout, path


@pytest.mark.parametrize("path", sorted((ROOT / "prob_transformer").glob("*.py")), ids=lambda path: path.stem)
def test_modules_are_documented_and_short(path):
    module = import_module(f"prob_transformer.{path.stem}") if path.stem != "__init__" else prob_transformer
    assert module.__doc__
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", ["prob_transformer.inference", "models.char_gpt.__main__"])
def test_importing_does_not_start_the_backend(module):
    # Once it runs, jax.distributed.initialize refuses.
    look = f"import {module}; from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", look], check=True, cwd=ROOT)
