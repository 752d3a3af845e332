import subprocess
import sys

# In a process of its own: taking modules away and importing them again would leave two copies behind for other tests.
_WITHOUT = """
import sys
from prob_transformer.__main__ import main

for package in sys.argv[1:]:
    for name in list(sys.modules):
        if name.startswith(("prob_transformer.inspect", "prob_transformer.decoder_models", f"{package}.")):
            del sys.modules[name]
    there = sys.modules.pop(package, None)
    sys.modules[package] = None
    assert main(["inspect", "--model", "smollm2", "--text", "x", "--out", "y"]) == 2
    del sys.modules[package]
    if there is not None:
        sys.modules[package] = there
"""


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_a_missing_package_is_one_line_that_names_the_extra():
    packages = ("gguf", "msgspec", "rich", "safetensors", "tokenizers")
    done = run("-c", _WITHOUT, *packages)
    assert (done.returncode, done.stdout) == (0, "")
    remedy = 'pip install "prob-transformer[inspect]".'
    assert done.stderr.splitlines() == [f"error: {package} is not installed; {remedy}" for package in packages]


def test_a_fault_of_the_installation_itself_is_not_hidden():
    done = run("-c", _WITHOUT, "xarray")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_the_module_is_the_command():
    done = run("-m", "prob_transformer", "inspect", "--model", "none", "--text", __file__, "--out", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --model: none is not there; pass smollm2, a GGUF file or a Hugging Face folder.\n"
