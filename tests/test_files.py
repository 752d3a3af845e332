import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prob_transformer import __version__
from prob_transformer.files import atomic_path, provenance, require_writable, wheel_file, write_json, write_text

ROOT = Path(__file__).parents[1]


def half_written(target):
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (half_written, RuntimeError, "killed"),
        (lambda target: write_json(target, {"figure": float("nan")}), ValueError, "not JSON compliant"),
    ],
)
def test_a_failed_write_leaves_the_old_file_whole_and_no_litter(tmp_path, write, error, message):
    target = tmp_path / "result.json"
    write_json(target, {"figure": 1})
    with pytest.raises(error, match=message):
        write(target)
    assert json.loads(target.read_text()) == {"figure": 1}
    assert os.listdir(tmp_path) == ["result.json"]


def test_asking_whether_a_file_can_be_written_leaves_it_and_its_folder_as_they_were(tmp_path):
    target = tmp_path / "result.json"
    write_json(target, {"figure": 1})
    require_writable("--out", target)
    assert json.loads(target.read_text()) == {"figure": 1}
    require_writable("--out", tmp_path / "new" / "folder" / "result.json")
    assert os.listdir(tmp_path) == ["result.json"]
    with pytest.raises(ValueError, match="--out: is a folder; pass the path of a file"):
        require_writable("--out", tmp_path)


def test_a_standard_output_that_takes_nothing_is_said_in_one_line():
    code = (
        "from prob_transformer.files import exit_status, writing_to_standard_output\n"
        "def command():\n"
        "    with writing_to_standard_output('; done'):\n"
        "        print('text')\n"
        "raise SystemExit(exit_status(command, ValueError, interrupted=''))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr == b"error: standard output: cannot be written to (No space left on device); done.\n"


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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "corpus: the x wheel is not installed; do this."),
        ([], "corpus: the installed x wheel has no a.txt; do this."),
        (["b.txt"], "corpus: the installed x wheel has no a.txt; do this."),
        (["a.txt"], "corpus: a.txt is cut off or not the file this was written for; do this."),
    ],
)
def test_a_wheel_without_its_file_or_with_another_is_named(tmp_path, monkeypatch, files, message):
    (tmp_path / "a.txt").write_text("a")
    if files is not None:
        wheel = tmp_path / "x-1.dist-info"
        wheel.mkdir()
        (wheel / "METADATA").write_text("Name: x")
        (wheel / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    monkeypatch.syspath_prepend(tmp_path)
    assert files != ["a.txt"] or wheel_file("corpus", "x", "a.txt", hashlib.sha256(b"a").hexdigest(), "").exists()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        wheel_file("corpus", "x", "a.txt", "0" * 64, "do this")


def repository(folder):
    """The commit of a new git repository that tracks all that is in `folder`."""

    def git(*arguments):
        identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
        done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "all")
    return git("rev-parse", "HEAD")


def recorded_commit(package):
    """The commit that a copy of files.py in the folder `package` records."""
    specification = importlib.util.spec_from_file_location("copy_of_files", package / "files.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.provenance(None, {})["commit"]


def copied_to(package):
    package.mkdir(parents=True)
    shutil.copy(ROOT / "prob_transformer" / "files.py", package)
    return package


@pytest.fixture
def checkout(tmp_path):
    package = copied_to(tmp_path / "checkout" / "prob_transformer")
    shutil.copy(ROOT / "pyproject.toml", package.parent)
    return package


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(checkout):
    commit = repository(checkout.parent)
    assert recorded_commit(checkout) == commit
    with (checkout / "files.py").open("a") as file:
        file.write("\n")
    assert recorded_commit(checkout) == commit + "+changes"


def test_a_git_hook_of_another_repository_does_not_change_the_commit(checkout, tmp_path, monkeypatch):
    commit = repository(checkout.parent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    repository(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other" / ".git" / "index"))
    assert recorded_commit(checkout) == commit


@pytest.mark.parametrize("place", ["venv/lib/python3.11/site-packages", "vendored", "."])
def test_a_repository_of_the_user_is_not_recorded(place, tmp_path):
    package = copied_to(tmp_path / place / "prob_transformer")
    for name in ("pyproject.toml", "vendored/pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('[project]\nname = "work-of-the-user"\n')
    repository(tmp_path)
    assert recorded_commit(package) is None


def test_a_checkout_copied_into_a_repository_of_the_user_has_no_commit(checkout, tmp_path):
    repository(tmp_path)
    assert recorded_commit(checkout) is None


def test_without_git_or_before_the_first_commit_there_is_no_commit(checkout, monkeypatch):
    subprocess.run(["git", "init", "--quiet"], cwd=checkout.parent, check=True)
    assert recorded_commit(checkout) is None
    monkeypatch.setenv("PATH", "")
    assert recorded_commit(checkout) is None
