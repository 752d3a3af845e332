"""Central path of the support tokens: the picture of the claim, drawn once, as a figure of its own."""

from pathlib import Path

from matplotlib.figure import Figure

from paper_figures.figures.claims import support_tokens
from paper_figures.saved_results import load_checks

NAME = "central_path"
SOURCE = "checks"
CAPTION = (
    "Along the central path of the barrier problem, as lambda falls, the multipliers lambda / m_i settle on the support tokens, "
    "as dual variables do on support vectors: the share of them that the positions of smallest margin carry, over small "
    "problems with a known solution. At the barrier weights of training, on the left, they are far from settled."
)


def draw(checks: Path) -> Figure:
    """The figure from the saved checks; ValueError if they lack this claim."""
    for check in load_checks(checks)["checks"]:
        if check["id"] == "support-tokens":
            return support_tokens.draw(check)
    raise ValueError(f"--checks: {checks} lacks support-tokens; run python -m theory_checks --json {checks}.")
