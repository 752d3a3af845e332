import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("page", "blocks"), [("README.md", 3), ("docs/inference.md", 1), ("docs/own_model.md", 3)])
def test_the_code_on_a_page_runs_from_top_to_bottom(page, blocks, tmp_path, monkeypatch):
    # What the code writes goes under the current folder.
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == blocks
    exec(compile("\n".join(found), page, "exec"), {})
