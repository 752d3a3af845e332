import io

import pytest
from rich.console import Console

from prob_transformer.inspect.inspection import Setting
from prob_transformer.inspect.table import tables


def printed(inspection, rows=10):
    console = Console(file=io.StringIO(), width=100)
    console.print(tables(inspection, rows))
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
    assert ("never a density" in text) == inclusive
    assert ("no proof" in text) == (signs == "none" and not inclusive)
    assert ("37.50%" in text) == (signs == "some")
    assert "not the residual block" in text
    assert ("strict past" in text) != inclusive
