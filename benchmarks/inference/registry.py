"""The sections of the inference benchmark, in the order of its tables."""

from benchmarks.inference import calibration, conjugate, evidence, laplace_nuts
from benchmarks.section import Section

SECTIONS: tuple[Section, ...] = (conjugate.SECTION, laplace_nuts.SECTION, evidence.SECTION, calibration.SECTION)
