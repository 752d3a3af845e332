import subprocess
import sys


def test_what_the_output_cannot_show_is_replaced():
    shown = "from models import cli; cli.run(lambda: print('written: Łódź'))"
    done = subprocess.run(
        [sys.executable, "-c", shown], capture_output=True, check=False, env={"PYTHONIOENCODING": "cp1252", "PATH": ""}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"written: ?\xf3d?\n", b"")
