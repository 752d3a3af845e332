from dataclasses import replace

import numpy as np
import pytest

from prob_transformer.inspection import Setting
from prob_transformer.inspection.terminal_table import terminal_tables
from prob_transformer.inspection.text_margins import QUANTILES


def cells(text):
    """Of every line of a table its cells; a row of numbers has its layer first."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0].isdecimal()]


def test_layers_and_heads_with_their_figures_worst_head_first(made_up):
    layers, heads = cells(terminal_tables(made_up, 10, 100))[:2], cells(terminal_tables(made_up, 10, 100))[2:]
    assert layers[0] == ["3", "75.0%", "1 of 1", "2", "-2.00", "1.00", "4.00", "0"]
    assert [head[0] for head in heads] == ["3", "7"]
    assert heads[0][:8] == ["3", "0", "75.0%", "2", "-2.00", "1.00", "4.00", "4.00"]
    assert heads[1][7:] == ["inf", "2 '\\x00\\n'"]
    assert len(cells(terminal_tables(made_up, 1, 100))) == 3


@pytest.mark.parametrize("width", [80, 40])
def test_no_number_is_cut_in_a_narrow_terminal(made_up, width):
    # Two thousand tokens, a barrier of six digits, a layer and a head of two.
    rng = np.random.default_rng(0)
    log_det = -rng.uniform(1000, 100000, (40, 12, 2000)).astype(np.float32)
    sign = rng.choice(np.array([-1, 1], np.int8), log_det.shape)
    pieces = ("of a long word",) * 2000
    large = replace(made_up, pieces=pieces, tokens=np.arange(2000), layers=tuple(range(40)), sign=sign, log_det=log_det)
    text = terminal_tables(large, 10, width)
    layers, heads = cells(text)[:40], cells(text)[40:]
    assert len(heads) == 10
    for row, shown in enumerate(layers):
        quantiles = np.quantile(-log_det[row, :, 1:], QUANTILES, method="inverted_cdf")
        np.testing.assert_array_equal([float(x) for x in shown[4:7]], np.rint(quantiles))
        assert shown[2:4] == ["12 of 12", str(large.summary.crossings[row].sum())]
    for shown in heads:
        row, head = int(shown[0]), int(shown[1])
        quantiles = np.quantile(-log_det[row, head, 1:], QUANTILES, method="inverted_cdf")
        np.testing.assert_array_equal([float(x) for x in shown[4:7]], np.rint(quantiles))
        assert float(shown[7]) == np.rint(-log_det[row, head].min())
    assert width < 80 or max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("signs", ["some", "none"])
@pytest.mark.parametrize("inclusive", [False, True])
def test_what_negative_signs_mean_depends_on_the_map(made_up, signs, inclusive):
    shown = replace(made_up, setting=Setting("identity", inclusive))
    if signs == "none":
        shown = replace(shown, sign=abs(shown.sign))
    text = " ".join(terminal_tables(shown, 10, 100).split())
    assert ("mass above 1" in text) == (signs == "some" and not inclusive)
    assert ("No density is claimed" in text) == inclusive
    assert ("no proof" in text) == (signs == "none" and not inclusive)
    assert ("37.50%" in text) == (signs == "some")
    assert "not the residual block" in text
    assert ("strict past" in text) != inclusive
