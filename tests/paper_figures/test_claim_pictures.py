"""Every claim has a picture, drawn from the saved results alone."""

import json
from pathlib import Path

import matplotlib as mpl
import pytest

from paper_figures.figures import claim_pictures, style
from tests.helpers.figures import assert_nothing_is_cut_off
from theory_checks import claims

RESULTS = Path(claim_pictures.__file__).resolve().parents[2] / "results" / "reference" / "theory_checks.json"


@pytest.fixture(scope="module")
def checks():
    return {check["id"]: check for check in json.loads(RESULTS.read_text(encoding="utf-8"))["checks"]}


@pytest.mark.parametrize("identifier", [check.id for check in claims.CHECKS])
def test_axes_are_labelled_and_nothing_is_cut_off(checks, identifier):
    with mpl.rc_context(style.RC):
        figure = claim_pictures.picture(checks[identifier])
        assert all(axes.get_xlabel() for axes in figure.axes)
        assert_nothing_is_cut_off(figure)


@pytest.mark.slow
def test_every_claim_is_drawn(tmp_path):
    claim_pictures.main(["--json", str(RESULTS), "--out", str(tmp_path)])
    assert {path.stem for path in tmp_path.iterdir()} == {check.id for check in claims.CHECKS}


def test_missing_and_quick_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--json: no checks at"):
        claim_pictures.main(["--json", str(tmp_path / "none.json")])
    quick = tmp_path / "quick.json"
    quick.write_text(json.dumps({"provenance": {"configuration": {"quick": True}}, "checks": []}))
    with pytest.raises(ValueError, match="is of quick checks"):
        claim_pictures.main(["--json", str(quick)])
