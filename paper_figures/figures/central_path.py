"""Central path of the support tokens: the picture of the claim, drawn once, as a figure of its own."""

from typing import Any

from matplotlib.figure import Figure

from paper_figures.figures.claim_pictures import picture

CAPTION = (
    "Along the central path of the barrier problem, as lambda falls, the multipliers lambda / m_i settle on the support tokens, "
    "as dual variables do on support vectors: the share of them that the positions of smallest margin carry, over small "
    "problems with a known solution. At the barrier weights of training, on the left, they are far from settled."
)


def draw(checks: dict[str, Any]) -> Figure:
    """The figure from the saved checks; ValueError if they lack this claim."""
    for check in checks["checks"]:
        if check["id"] == "support-tokens":
            return picture(check)
    raise ValueError("--checks: support-tokens is not among them; run python -m theory_checks --json FILE.")
