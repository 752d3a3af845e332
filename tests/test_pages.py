"""The code on the pages runs as a reader runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


PAGES = {
    "docs/accelerated.md": 1,
    "docs/inference.md": 4,
    "docs/own_model.md": 3,
    "docs/theory.md": 1,
    "docs/transformer.md": 1,
    "docs/transformer_posterior.md": 1,
}
# These sample, which takes long.
SLOW = ("docs/inference.md", "docs/transformer_posterior.md")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in PAGES]
)
def test_the_code_on_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    # What the code writes goes under the current folder.
    monkeypatch.chdir(tmp_path)
    code = blocks(page, "python")
    assert len(code) == PAGES[page]
    exec(compile("\n".join(code), page, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_code_on_a_page_runs_in_the_default_precision_in_a_process_of_its_own(page, tmp_path):
    code = "\n".join(blocks(page, "python"))
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    assert found.returncode == 0, found.stderr.decode()
