"""The code on the pages runs as a reader runs it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    ("page", "count"), [("docs/accelerated.md", 1), ("docs/inference.md", 2), ("docs/own_model.md", 3)]
)
def test_the_code_on_a_page_runs_from_top_to_bottom(page, count, tmp_path, monkeypatch):
    # What the code writes goes under the current folder.
    monkeypatch.chdir(tmp_path)
    code = blocks(page, "python")
    assert len(code) == count
    exec(compile("\n".join(code), page, "exec"), {})
