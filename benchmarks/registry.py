"""All sections, in the order of the table."""

from collections.abc import Sequence

from benchmarks import agreement, kernel, peak_memory, scaling, subsampling, training_step
from benchmarks.section import Section

SECTIONS: tuple[Section, ...] = (
    training_step.SECTION,
    kernel.SECTION,
    peak_memory.STEP_SECTION,
    peak_memory.KERNEL_SECTION,
    scaling.SECTION,
    agreement.SECTION,
    subsampling.SECTION,
)


def select(names: Sequence[str]) -> list[Section]:
    """The named sections in the order of the table, all for no names. Raises ValueError for an unknown one."""
    known = [section.name for section in SECTIONS]
    for name in names:
        if name not in known:
            raise ValueError(f"--only: unknown section {name!r}; known sections: {', '.join(known)}.")
    return [section for section in SECTIONS if not names or section.name in names]
