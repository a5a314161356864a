"""Step: read. Read the source, and store each distinct image once."""

from pipeline.sources.read import ADVICE
from pipeline.steps.base import Step, Work


class ReadStep(Step):
    """Reads the source until the image limit of the run is reached."""

    def run(self, work: Work, before: str) -> None:  # noqa: ARG002
        """See Step."""
        work.executor.read()


STEP = ReadStep("read", unit="images", advice=ADVICE)
