"""Step: read. Read the source, and keep each of its images once."""

from pipeline.sources.read import ADVICE
from pipeline.steps.base import Step, Work


class ReadStep(Step):
    """Reads as many images as the run has use for."""

    def run(self, work: Work, before: str) -> None:  # noqa: ARG002
        """See Step."""
        work.has_more = work.executor.read(work.limit)


STEP = ReadStep("read", unit="images", advice=ADVICE)
