import subprocess
import sys


def test_the_module_is_the_command():
    arguments = ["inspect", "--model", "none", "--text", __file__, "--out", "out"]
    command = [sys.executable, "-m", "prob_transformer", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --model: none is not there; pass smollm2, a GGUF file or a Hugging Face folder.\n"
