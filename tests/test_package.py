import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module, metadata
from pathlib import Path

import hatchling.build
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import prob_transformer
from prob_transformer._extras import MissingExtraError, require

ROOT = Path(prob_transformer.__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ABOUT = f"prob_transformer-{prob_transformer.__version__}.dist-info"


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def core_distributions():
    """What pip installs for the dependencies of the core on this interpreter, by name."""
    found, pending = set(), names(PROJECT["dependencies"])
    while pending:
        name = pending.pop()
        found.add(name)
        wanted = [Requirement(text) for text in metadata.requires(name) or []]
        applies = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
        pending |= names(map(str, applies)) - found
    return found


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A folder with the built wheel unpacked and links to the core's dependencies, as in an environment of its own."""
    folder, built = tmp_path_factory.mktemp("core"), tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        wheel = hatchling.build.build_wheel(str(built))
    with zipfile.ZipFile(built / wheel) as archive:
        archive.extractall(folder)
    for name in core_distributions():
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def run(core, code, *arguments):
    """Run code in a Python that has the standard library and the core, and nothing else."""
    begin = f"import sys; sys.path.append({str(core)!r})\n"
    command = [sys.executable, "-I", "-S", "-c", begin + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=core)


def test_public_names_are_few_and_each_is_there_once_and_documented():
    packages = ["", ".inference", ".inference.laplace", ".inspection", ".transformer"]
    modules = [import_module(f"prob_transformer{package}") for package in packages]
    public = [(module, name) for module in modules for name in getattr(module, "__all__", ())]
    assert len(set(public)) == len(public) <= 60
    for module, name in public:
        assert getattr(module, name).__doc__, name


def test_the_wheel_holds_the_library_and_nothing_else(core):
    unpacked = {path for path in core.iterdir() if not path.is_symlink()}
    assert {path.name for path in unpacked} == {"prob_transformer", ABOUT}
    assert {path.name for path in (core / "prob_transformer").glob("py.typed")} == {"py.typed"}
    assert {path.name for path in (core / "prob_transformer/inspection").glob("page.*")} == {
        "page.css",
        "page.html",
        "page.js",
    }
    assert "prob-transformer = prob_transformer.__main__:main" in (core / ABOUT / "entry_points.txt").read_text()
    described = (core / ABOUT / "METADATA").read_text(encoding="utf-8")
    assert f"\nVersion: {prob_transformer.__version__}\n" in described
    assert "\nLicense-Expression: Apache-2.0\n" in described


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


def test_every_module_but_the_models_from_disk_imports_with_the_core_alone(core):
    done = run(
        core,
        """
import pkgutil, prob_transformer
from importlib import import_module
for module in pkgutil.walk_packages(prob_transformer.__path__, "prob_transformer.", onerror=lambda name: None):
    try:
        import_module(module.name)
    except ImportError as error:
        print(module.name, type(error).__name__)
""",
    )
    assert (done.stdout.splitlines(), done.stderr) == (
        [
            "prob_transformer.inspection.terminal_table ModuleNotFoundError",
            "prob_transformer.pretrained MissingExtraError",
            "prob_transformer.tables ModuleNotFoundError",
        ],
        "",
    )


@pytest.mark.slow
def test_map_laplace_and_nuts_work_with_the_core_alone(core):
    done = run(
        core,
        """
import jax.numpy as jnp, numpyro, numpyro.distributions as dist
from prob_transformer.inference import find_map, nuts
from prob_transformer.inference.laplace import laplace

def model(seen):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    numpyro.sample("seen", dist.Normal(mean, 1.0), obs=seen)

seen = jnp.array(2.0)
mode = find_map(model, model_args=(seen,), space="unconstrained", key=0)
draws = nuts(0, model, model_args=(seen,), warmup=20, draws=20, chains=1).posterior["mean"]
# Prior and likelihood have variance 1, so the posterior is N(1, 1/2).
print(f"{mode.parameters['mean']:.4f} {laplace(mode).precision.variance()[0]:.4f} {draws.shape}")
""",
    )
    assert (done.stdout, done.stderr) == ("1.0000 0.5000 (1, 20)\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"]], ids=" ".join)
def test_the_command_answers_with_the_core_alone(core, arguments):
    done = run(core, "from prob_transformer.__main__ import main; main()", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    expected = f"prob-transformer {prob_transformer.__version__}\n" if arguments == ["--version"] else "usage: "
    assert done.stdout.startswith(expected)


def test_the_command_names_a_missing_extra_in_one_line(core):
    code = "from prob_transformer.__main__ import main; sys.exit(main())"
    done = run(core, code, "inspect", "--model", "smollm2", "--text", __file__, "--out", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'error: gguf is not installed; run: pip install "prob-transformer[inspect]"\n'


_USES = {
    "particle_filter": (
        "blackjax",
        "inference",
        "particle_filter(0, Attention(jnp.eye(2)[None], jnp.eye(2)[None]), LinearDecoder(jnp.eye(2), jnp.zeros(2)),"
        " jnp.array([0, 1]))",
    ),
    "datatree": ("xarray", "inference", "datatree({}, None, {})"),
    "save": ("xarray", "inference", "save(None, 'result.nc')"),
    "load": ("xarray", "inference", "load('result.zarr')"),
    "pretrained": ("gguf", "inspect", "import prob_transformer.pretrained.load"),
    "tree": ("xarray", "inspect", "prob_transformer.inspection.inspection_tree(None, {})"),
}


def test_every_use_of_a_missing_package_names_the_extra(core):
    done = run(
        core,
        f"""
import jax, jax.numpy as jnp, prob_transformer.inspection
from prob_transformer import Attention, LinearDecoder
from prob_transformer.inference import load, particle_filter, save
from prob_transformer.inference.result_tree import datatree
for use in {[use for *_, use in _USES.values()]!r}:
    try:
        exec(use)
    except ImportError as error:
        print(type(error).__name__, error)
""",
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f'MissingExtraError {package} is not installed; run: pip install "prob-transformer[{extra}]"'
        for package, extra, _ in _USES.values()
    ]


# What pip writes into direct_url.json (PEP 610), and the requirement that installs the same again with the extra.
_ORIGINS = {
    "folder": ({"url": "file:///a%20b/c", "dir_info": {}}, "file:///a%20b/c"),
    "wheel": ({"url": "file:///a/b.whl", "archive_info": {"hash": "sha256=0"}}, "file:///a/b.whl"),
    "git": (
        {"url": "https://example.org/x", "subdirectory": "y", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}},
        "git+https://example.org/x@0a1b#subdirectory=y",
    ),
}


@pytest.mark.slow
def test_the_remedy_works_from_where_the_package_came(core):
    try:
        for origin, requirement in _ORIGINS.values():
            (core / ABOUT / "direct_url.json").write_text(json.dumps(origin))
            done = run(core, "from prob_transformer._extras import require; require('inspect', 'gguf')")
            assert done.stderr.splitlines()[-1].endswith(
                f'run: pip install "prob-transformer[inspect] @ {requirement}"'
            )
            assert Requirement(f"prob-transformer[inspect] @ {requirement}").url == requirement
    finally:
        (core / ABOUT / "direct_url.json").unlink()
    with pytest.raises(MissingExtraError, match=re.escape(f'run: pip install --editable "{ROOT.as_uri()}[inspect]"')):
        require("inspect", "a_module_that_is_not_installed")


def test_a_package_that_is_there_but_broken_is_not_taken_for_a_missing_extra():
    broken = "import sys; sys.modules['pandas'] = None; from prob_transformer.inference.result_tree import datatree; "
    done = subprocess.run(
        [sys.executable, "-c", broken + "datatree({}, None, {})"], capture_output=True, text=True, check=False
    )
    assert "pandas" in done.stderr
    assert "MissingExtraError" not in done.stderr


def test_an_extra_is_what_the_library_requires_of_it():
    required = {"inference": set(), "inspect": set()}
    for path in (ROOT / "prob_transformer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                extra, *modules = (argument.value for argument in node.args if isinstance(argument, ast.Constant))
                required[extra] |= set(modules)
    formats = import_module("prob_transformer.inference.result_tree")._MODULES
    required["inference"] |= {module for modules in formats.values() for module in modules}
    extras = PROJECT["optional-dependencies"]
    # All these distributions are named like their module.
    assert required == {extra: names(extras[extra]) for extra in required}
    assert extras["all"] == ["prob-transformer[inference,inspect]"]


def test_plain_make_prints_every_target():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
    rules = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    printed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert {"help", "reproduce", "test"} <= set(rules) <= printed.keys()


def test_the_readme_example_prints_what_the_readme_shows_with_the_core_alone(core):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    assert len(code.splitlines()) <= 15
    assert len(readme.split()) <= 700
    done = run(core, code)
    assert (done.stdout, done.stderr) == (printed, "")


def old_modules():
    """The modules of the library in the first column of the table of renamed names, `.b` after `a.x` read as `a.b`."""
    table = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("| old | new |")[1].split("\n\n")[0]
    for old in re.findall(r"^\| (`prob_transformer.*?) \|", table, re.MULTILINE):
        first, *others = re.findall(r"`((?:prob_transformer)?(?:\.[a-z_]+)+)`", old) or [""]
        parent = first.rpartition(".")[0]
        for whole in (first, *(parent + name if name.startswith(".") else name for name in others)):
            # Those two are there still, and a function of a module that is there.
            if parent != "prob_transformer.files" and whole not in {
                "",
                "prob_transformer.sampling",
                "prob_transformer.inference.laplace",
            }:
                yield whole


@pytest.mark.parametrize("old", list(old_modules()))
def test_a_module_of_version_0_1_names_the_new_one(old):
    with pytest.raises(ImportError, match=f"^{old} is now prob_transformer") as refusal:
        import_module(old)
    import_module(re.findall(r"is now (prob_transformer[a-z_.]+)", str(refusal.value))[0])
