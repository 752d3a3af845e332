"""docs/changes.md: no page contains an old sentence, each new one is where it says, each guard exists."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "changes.md"
COUNTEREXAMPLES = "tests/theory_checks/test_counterexamples.py"


def words(text):
    """The text with every run of spaces and line breaks as one space, and without emphasis."""
    return " ".join(text.replace("*", "").split())


# Sentences that a page or a docstring shows to its reader.
SHOWN = {
    path.relative_to(ROOT).as_posix(): words(path.read_text(encoding="utf-8"))
    for pattern in ("README.md", "docs/**/*.md", "prob_transformer/**/*.py", "theory_checks/*.py")
    for path in ROOT.glob(pattern)
    if path != PAGE
}
ENTRY = re.compile(
    r"(?:^- \*\*Was\*\* \((?P<was_in>[^)]+)\): (?P<was>.+)\n)?"
    r"^- \*\*Is\*\* \((?P<is_in>[^)]+)\), (?:weaker|stronger|new): (?P<now>.+)\n"
    r"^- \*\*Guarded by\*\* `(?P<guard>[^`]+)`$",
    re.MULTILINE,
)
TEXT = PAGE.read_text(encoding="utf-8")
ENTRIES = [match.groupdict() for match in ENTRY.finditer(TEXT)]


def test_every_line_of_the_page_belongs_to_an_entry():
    for name, key in (("Was", "was"), ("Is", "now"), ("Guarded by", "guard")):
        assert TEXT.count(f"- **{name}**") == sum(entry[key] is not None for entry in ENTRIES) > 0


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: words(entry["now"])[:50])
def test_the_old_sentence_is_gone_the_new_one_is_there_and_the_guard_exists(entry):
    if entry["was"] is not None:
        assert [name for name, text in SHOWN.items() if words(entry["was"]) in text] == []
    assert words(entry["now"]) in SHOWN[entry["is_in"]]
    file, _, name = entry["guard"].rpartition("::")
    assert f"def {name}(" in (ROOT / (file or COUNTEREXAMPLES)).read_text(encoding="utf-8")


def test_the_share_of_places_stands_beside_the_count_of_heads():
    result = json.loads((ROOT / "results/reference/smollm2/behaviour.json").read_text(encoding="utf-8"))
    negative = np.array(result["negative_share"]["strict"])
    counted = (
        f"at {negative.mean():.1%} of places".replace("%", " %"),
        f"in {(negative > 0).sum()} of {negative.size} heads",
    )
    for name in ("README.md", "docs/inspect.md", "docs/findings.md"):
        text = SHOWN[name].replace("all places", "places")
        assert all(each in text for each in counted), name
        assert re.search("not the (model's map|map that the model computes)", text), name
