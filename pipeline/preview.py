"""`synth preview`: run all steps on a few images, and show their texts. A later run reuses the replies."""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from pipeline.dataset.review_tools import TEXT_FIELDS
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.plan import Plan
from pipeline.progress import Progress
from pipeline.report.build import write_report
from pipeline.report.rows import read_rejected, read_rows
from pipeline.run import run_trial
from pipeline.steps.ask import AskSettings
from pipeline.storage.files import translate_disk_errors
from pipeline.tables import SPLITS
from pipeline.types import Rejected, Sample


@dataclass(slots=True)
class Preview:
    """The texts of a few images, by image name.

    Each entry of `images` is (text, reason if it was rejected or None, style).
    `prompts` maps "task style" to a prompt. `page` is the report page, or None if no text is left.
    """

    images: dict[str, list[tuple[str, str | None, str]]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    page: Path | None = None


def preview_run(plan: Plan, number: int, progress: Progress) -> Preview:
    """Run all steps on the first `number` images of a source, and write a report page about them.

    Checks are not calibrated and answers are not balanced, because both need many images. Raises SynthError
    as `run.generate_dataset` does.
    """
    folder, config, preview = plan.dataset, plan.config, Preview()
    assert plan.source is not None
    rows: list[Sample | Rejected] = []
    ids = set[str]()
    for source_row in plan.source.rows:
        rows.append(source_row)
        if isinstance(source_row, Sample):
            ids.add(source_row.id)
        if len(ids) == number:
            break
    balance = config.balance.model_copy(update={"max_answer_frac": 1.0, "max_yes_no_frac": 1.0})
    changes = {"verify": config.verify.model_copy(update={"calibration": 0}), "balance": balance}
    with (
        translate_disk_errors(folder.path),
        folder.lock(),
        run_trial(plan, rows, RequestStats(), progress, changes) as trial,
    ):
        if trial.version:
            preview.page = folder.path / "preview.html"
            write_report(trial.version, trial.plan.dataset.path).replace(preview.page)
            for shown in chain.from_iterable(read_rows(trial.version, SPLITS, None, number)):
                for text in shown["texts"]:
                    words = " ".join(filter(None, map(text.get, TEXT_FIELDS)))
                    preview.images.setdefault(shown["from"], []).append((words, None, text["kind"]))
        for loss in read_rejected(trial.plan.dataset.path):
            if loss["what"]:
                reason = f"{loss['step']}: {loss['reason']}"
                preview.images.setdefault(loss["where"], []).append((loss["what"], reason, ""))
        settings = AskSettings.of(trial.plan)
        with Journal(folder.journal) as journal:
            for sample in rows:
                requests = settings.requests_about(sample, journal) if isinstance(sample, Sample) else []
                for request in requests:
                    preview.prompts.setdefault(f"{request.task} {request.style}".rstrip(), request.text)
    return preview
