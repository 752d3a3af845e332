"""How far two answers are apart, in NumPy alone."""

from typing import Any

import numpy as np

from prob_transformer.inference.laplace import Evidence

# Agreement asked for, relative.
TOLERANCE = 1e-3
LOGITS_TOLERANCE = 1e-5


def _relative(one: float, other: float) -> float:
    return abs(one - other) / abs(other)


def mean_loss(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean of -log p of the targets (W, n) under probabilities (W, n, V), in nats."""
    return float(-np.log(np.take_along_axis(probabilities, targets[..., None], -1)).mean(dtype=np.float64))


def comparison(ours: dict[str, Any], theirs: dict[str, Any], targets: np.ndarray) -> dict[str, Any]:
    """Both answers side by side, ready for JSON: differences relative to theirs, seconds as theirs over ours."""
    parts = {"ours": Evidence(*map(float, ours["evidence"])), "theirs": Evidence(*map(float, theirs["evidence"]))}
    losses = {"ours": mean_loss(ours["probabilities"], targets), "theirs": mean_loss(theirs["probabilities"], targets)}
    named = zip(Evidence._fields, *parts.values(), strict=True)
    differences = {
        "log_evidence_relative": _relative(parts["ours"].total, parts["theirs"].total),
        "parts_relative": {name: _relative(one, other) for name, one, other in named},
        "parts_largest_nats": max(abs(one - other) for one, other in zip(*parts.values(), strict=True)),
        "predictive_loss_relative": _relative(losses["ours"], losses["theirs"]),
        "probabilities_largest": float(np.abs(ours["probabilities"] - theirs["probabilities"]).max()),
    }
    seconds = {
        "ours_first": float(ours["first_seconds"]),
        "ours_steady": float(ours["seconds"]),
        "theirs": float(theirs["seconds"]),
        "theirs_first_of_one_window": float(theirs["seconds_of_one_window"]),
        "ratio_first": float(theirs["seconds"]) / float(ours["first_seconds"]),
        "ratio_steady": float(theirs["seconds"]) / float(ours["seconds"]),
        "predictive": {"ours": ours["predictive_seconds"], "theirs": float(theirs["predictive_seconds"])},
    }
    return {
        "log_evidence": {side: {"total": x.total, **x._asdict()} for side, x in parts.items()},
        "predictive_loss": losses,
        "differences": differences,
        "agree": bool(max(differences["log_evidence_relative"], differences["predictive_loss_relative"]) <= TOLERANCE),
        "seconds": seconds,
    }


def require_same_logits(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of logits relative to their size. Raises ValueError above 1e-5: not the same model."""
    found = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if not found <= LOGITS_TOLERANCE:
        raise ValueError(f"--torch-python: its model gives other logits, {found:.2g} apart; check its versions.")
    return found
