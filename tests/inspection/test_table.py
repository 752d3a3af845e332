import io

import numpy as np
import pytest
from rich.console import Console

from prob_transformer.inspection.inspection import Setting
from prob_transformer.inspection.summary import QUANTILES, summary
from prob_transformer.inspection.table import print_tables


def printed(inspection, rows=10, width=100):
    console = Console(file=io.StringIO(), width=width)
    print_tables(console, inspection, rows)
    return console.file.getvalue()


def row_of(text, title, layer):
    below = text[text.index(title) :].splitlines()
    return next(
        [cell.strip() for cell in line.split("│")[1:-1]] for line in below if line.startswith(f"│     {layer} ")
    )


def test_layers_and_heads_with_their_figures_worst_head_first(made_up):
    text = printed(made_up)
    assert row_of(text, "Layers", 3) == ["3", "75.0%", "1 of 1", "2", "-2.00", "1.00", "4.00", "0"]
    assert row_of(text, "Heads", 3)[:8] == ["3", "0", "75.0%", "2", "-2.00", "1.00", "4.00", "4.00"]
    assert row_of(text, "Heads", 7)[7:] == ["inf", "2 '\\x00\\n'"]
    heads = text[text.index("Heads") :]
    assert heads.index("│     3 ") < heads.index("│     7 ")
    assert "│     7 " not in printed(made_up, rows=1)[text.index("Heads") :]


@pytest.mark.parametrize("width", [80, 40])
def test_no_number_is_cut_in_a_narrow_terminal(made_up, width):
    # Two thousand tokens, a barrier of six digits, a layer and a head of two.
    rng = np.random.default_rng(0)
    log_det = -rng.uniform(1000, 100000, (40, 12, 2000)).astype(np.float32)
    sign = rng.choice(np.array([-1, 1], np.int8), log_det.shape)
    places = np.zeros((*log_det.shape, 3), int)
    large = made_up._replace(
        pieces=("of a long word",) * 2000,
        tokens=np.arange(2000),
        layers=tuple(range(40)),
        sign=sign,
        log_det=log_det,
        carriers=places,
        shares=places.astype(np.float32),
    )
    text = printed(large, width=width)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    layers, heads = [row for row in rows if len(row) == 8], [row for row in rows if len(row) == 9]
    assert (len(layers), len(heads)) == (40, 10)
    found = summary(large)
    for row, shown in enumerate(layers):
        barrier = -log_det[row, :, 1:]
        np.testing.assert_array_equal(
            [float(x) for x in shown[4:7]], np.rint(np.quantile(barrier, QUANTILES, method="inverted_cdf"))
        )
        assert shown[2:4] == ["12 of 12", str(found.crossings[row].sum())]
    for shown in heads:
        row, head = int(shown[0]), int(shown[1])
        np.testing.assert_array_equal([float(x) for x in shown[4:7]], np.rint(found.quantiles[row, head]))
        assert float(shown[7]) == np.rint(-log_det[row, head].min())
    assert width < 80 or max(map(len, text.splitlines())) <= 80


def test_tokens_that_look_like_markup_are_text(made_up):
    pieces = ("a", "b", "[bold]x[/nothing]", "c", "d")
    assert "[bold]x[/nothing]" in printed(made_up._replace(pieces=pieces))


@pytest.mark.parametrize("signs", ["some", "none"])
@pytest.mark.parametrize("inclusive", [False, True])
def test_what_negative_signs_mean_depends_on_the_map(made_up, signs, inclusive):
    shown = made_up._replace(setting=Setting("identity", inclusive))
    if signs == "none":
        shown = shown._replace(sign=abs(shown.sign))
    text = " ".join(printed(shown).split())
    assert ("mass above 1" in text) == (signs == "some" and not inclusive)
    assert ("No density is claimed" in text) == inclusive
    assert ("no proof" in text) == (signs == "none" and not inclusive)
    assert ("37.50%" in text) == (signs == "some")
    assert "not the residual block" in text
    assert ("strict past" in text) != inclusive
