"""How much is drawn for every comparison, full and quick."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a whole run; a result is a function of these, the code and the machine."""

    seed: int = 0
    # Datasets of the parameter models: few sequences, and enough for a posterior close to a Gaussian.
    sequences: int = 40
    many_sequences: int = 400
    positions: int = 8
    # NUTS.
    warmup: int = 400
    draws: int = 1500
    chains: int = 2
    # The particle filter: independent runs, and particles in each.
    repeats: int = 400
    particles: int = 500
    # Simulation-based calibration: datasets, and the draws that each truth is ranked among.
    replicates: int = 1000
    calibration_sequences: int = 20
    calibration_positions: int = 4
    ranked_draws: int = 99
    thinning: int = 5
    calibration_particles: int = 1000

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


QUICK = Sizes(
    sequences=6,
    many_sequences=12,
    positions=3,
    warmup=200,
    draws=200,
    repeats=8,
    particles=20,
    replicates=100,
    calibration_sequences=4,
    ranked_draws=19,
    calibration_particles=50,
)
