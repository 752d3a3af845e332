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


def select(names: Sequence[str], known: Sequence[Section] | None = None) -> list[Section]:
    """The named sections in the order of the table, all for no names. Raises ValueError for an unknown one."""
    sections = SECTIONS if known is None else known
    for name in names:
        if name not in [section.name for section in sections]:
            possible = ", ".join(section.name for section in sections)
            raise ValueError(f"--only: unknown section {name!r}; known sections: {possible}.")
    return [section for section in sections if not names or section.name in names]
