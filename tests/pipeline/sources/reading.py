"""Read a source in tests."""

from pipeline.types import Rejected, Sample, Source


def samples_of(source: Source) -> list[Sample]:
    return [row for row in source.rows if isinstance(row, Sample)]


def rejected_of(source: Source) -> list[Rejected]:
    return [row for row in source.rows if isinstance(row, Rejected)]
