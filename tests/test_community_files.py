"""Citation, workflows and links say what the package, the Makefile and the files say."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import prob_transformer

ROOT = Path(prob_transformer.__file__).resolve().parent.parent
_FENCED, _CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL), re.compile(r"`[^`]*`")
_LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]:\s+(\S+)", re.MULTILINE)


def is_of_the_repository(path):
    return not any(part.startswith(".") and part != ".github" for part in path.relative_to(ROOT).parts)


PAGES = [path for path in sorted(ROOT.rglob("*.md")) if is_of_the_repository(path)]


def anchors(page):
    """The anchors that GitHub gives to the headings of a page; a repeated heading gets a number."""
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", _FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{name}-{number}"
        found.add(anchor)
    return found


def links(page):
    """The relative links of a page, outside code."""
    text = _CODE.sub("", _FENCED.sub("", page.read_text(encoding="utf-8")))
    found = [inline or defined for inline, defined in _LINK.findall(text)]
    return [link for link in found if "://" not in link and not link.startswith("mailto:")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading_that_exist(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_links_and_anchors_are_found_as_github_finds_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `name`: log|det J|, (twice)\n## [Linked](x.md) part\n## Twice\n## Twice\n"
        "![picture](a.png) [one](b.md#c) `[no](code)` [far](https://example.org) [defined]\n"
        "```\n# no heading\n[no](fence)\n```\n\n[defined]: d.md\n"
    )
    assert anchors(page) == {"a-name-logdet-j-twice", "linked-part", "twice", "twice-1"}
    assert links(page) == ["x.md", "a.png", "b.md#c", "d.md"]


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == prob_transformer.__version__


def test_ci_runs_on_the_oldest_python_supported_and_on_the_newer_ones_of_the_local_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newer = re.search(r"^for minor in ([\d ]+);", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    expected = {project["requires-python"].removeprefix(">="), *(f"3.{minor}" for minor in newer[1].split())}
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert set(ci["jobs"]["check"]["strategy"]["matrix"]["python"]) == expected


def test_workflows_and_the_pull_request_template_call_targets_of_the_makefile_alone():
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    files = [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / ".github" / "pull_request_template.md"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    called = {name for names in re.findall(r"\bmake((?: [a-z][a-z0-9-]*)+)", text) for name in names.split()}
    assert called
    assert called <= targets
