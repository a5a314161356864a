"""`synth preview`: ask about a few images, and show them with their texts. The replies stay in the journal for the run."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.executors.messages import describe_engine
from pipeline.filtering import filter_annotations, own_prompt_grams
from pipeline.inference.engines import open_engine
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats, ask_about, read_annotations, read_results
from pipeline.inference.requests import build_requests
from pipeline.plan import Plan
from pipeline.progress import NullProgress, Progress
from pipeline.report.html import data_uri, render_page, thumbnail
from pipeline.steps.ask import AskSettings
from pipeline.steps.validate import validate_annotations
from pipeline.storage.files import translate_disk_errors, write_text
from pipeline.tables import HUMAN
from pipeline.tasks.prompts import describe_prompts
from pipeline.text.escape import visible
from pipeline.text.reasons import in_short
from pipeline.types import Rejected, Request, Sample, SampleBatch, SourceTexts

THUMBNAIL_BYTES = 40_000


@dataclass(frozen=True, slots=True)
class PreviewReply:
    """A reply to one request about an image: its texts, each with the reason for which a run would reject it, or None."""

    task: str
    style: str
    texts: list[tuple[str, str | None]]
    prompt_tokens: int
    reply_tokens: int
    seconds: float | None  # None: the reply was in the journal


@dataclass(frozen=True, slots=True)
class PreviewImage:
    """One image with the replies about it."""

    name: str
    image: bytes
    width_px: int
    height_px: int
    replies: list[PreviewReply]


@dataclass(frozen=True, slots=True)
class Preview:
    """What a model says about a few images, and what it was asked."""

    source: str
    model: str
    engine: str
    prompt_sources: str
    prompts: dict[str, tuple[str, str]]  # `task style` -> system text, text
    images: list[PreviewImage]
    folder: Path
    skipped: list[str] = field(default_factory=list)  # rows that cannot be used, with the reason

    def describe(self) -> dict[str, Any]:
        """Return the preview as JSON values, without pictures."""
        images = []
        for image in self.images:
            replies = [asdict(reply) for reply in image.replies]
            for reply in replies:
                reply["texts"] = [{"text": text, "rejected": reason} for text, reason in reply["texts"]]
            images.append({"name": image.name, "replies": replies})
        return {"source": self.source, "model": self.model, "images": images, "skipped": self.skipped}


def preview_run(config: Config, number: int, out: Path | None = None, progress: Progress | None = None) -> Preview:
    """Ask about the first `number` images of a source, and return what the model says about each.

    Raises SynthError as `run.generate_dataset` does; SourceError if the source holds no usable image.
    """
    progress = progress or NullProgress()
    plan = Plan.open(config, out, progress, is_trial=True)
    folder, source, choice, settings = plan.dataset, plan.source, plan.engine, AskSettings.of(plan)
    assert source is not None
    assert choice is not None
    samples: dict[str, Sample] = {}
    skipped: list[str] = []
    for row in source.rows:
        if isinstance(row, Rejected):
            skipped.append(f"{visible(row.source_row)}: {row.reason.replace('_', ' ')} ({row.detail})")
        else:
            samples.setdefault(row.id, row)
        if len(samples) == number:
            break
    if not samples:
        raise SourceError(f"no image of {config.source} can be used; {'; '.join(skipped[:3])}", hint="choose another source")
    stats = RequestStats(seconds={})
    with (
        translate_disk_errors(folder.path),
        folder.lock(),
        Journal(folder.journal) as journal,
        open_engine(lambda: choice) as start,
    ):
        chunk = SampleBatch.of((sample.id, sample.images) for sample in samples.values())
        texts = {one.id: _source_texts(one, settings) for one in samples.values()}
        for round_number in range(len(plan.requests.rounds)):
            for engine in ask_about(iter([chunk]), plan.requests, settings.server, start, journal, stats, texts, round_number):
                progress("preview", stats.done, stats.total, engine.metrics() | stats.metrics(settings.server))
        images = [_read(sample, plan, journal, stats.seconds or {}) for sample in samples.values()]
        requests = [request for one in samples.values() for request in _requests_of(one, settings, journal)]
    first = {f"{request.task} {request.style}".strip(): request for request in reversed(requests)}
    prompts = {name: (first[name].system, first[name].text) for name in reversed(first)}
    described = describe_prompts(plan.tasks.asked, config.generate.prompt_dir, config.generate.style_prompts)
    where = describe_engine(config, choice)
    return Preview(config.source, plan.model, where, described, prompts, images, folder.path, skipped)


def _read(sample: Sample, plan: Plan, journal: Journal, seconds: dict[str, float]) -> PreviewImage:
    settings = AskSettings.of(plan)
    info = sample_info(sample.to_row(), len(sample.images), settings)
    (table,) = read_annotations([[info]], plan.requests, journal, {sample.id: _source_texts(sample, settings)})
    texts = dict(_judged_texts(table, plan))
    by_people = {human["request_id"]: human for human in info.human}
    replies = [PreviewReply(one["task"], HUMAN, texts[name], 0, 0, None) for name, one in by_people.items()]
    for request in _requests_of(sample, settings, journal):
        last = journal.last(request.id)
        assert last is not None
        reply = last[0]
        replies.append(
            PreviewReply(
                request.task,
                request.style,
                texts[request.id],
                reply.prompt_tokens,
                reply.reply_tokens,
                seconds.get(request.id),
            )
        )
    return PreviewImage(visible(sample.source_row), sample.images[0], sample.width_px, sample.height_px, replies)


def _requests_of(sample: Sample, settings: AskSettings, journal: Journal) -> list[Request]:
    plan = settings.requests
    results = read_results(sample.id, plan, journal, sample.context)
    return list(build_requests(sample.id, plan, sample.context, results, plan.wanted(_source_texts(sample, settings))))


def _source_texts(sample: Sample, settings: AskSettings) -> SourceTexts:
    return source_texts(sample.to_row(), keeps_human_texts=settings.keeps_human_texts)


def _judged_texts(table: pa.Table, plan: Plan) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Yield, for each request, its texts with the reason for which validate or filter rejects them."""
    validated = validate_annotations(table, plan.tasks)
    reasons = validated["reason"].to_pylist()
    grams = own_prompt_grams(tuple(task.name for task in plan.tasks.asked))
    kept = validated.drop_columns(["reason"])
    filtered = filter_annotations(kept, plan.config.filter, grams, plan.tasks)["reason"].to_pylist()
    texts: dict[str, list[tuple[str, str | None]]] = {}
    for row, invalid, unfit in zip(table.to_pylist(), reasons, filtered, strict=True):
        own = in_short(json.loads(row["record"])) if row["record"] else None
        text = row["text"] or " ".join(filter(None, (row["question"], row["answer"]))) or own or row["reply_text"] or ""
        texts.setdefault(row["request_id"], []).append((visible(text), invalid or unfit))
    yield from texts.items()


def write_preview(preview: Preview, path: Path | None = None) -> Path:
    """Write a preview as one HTML page, and return its path; it replaces an earlier one."""
    path = path or preview.folder / "preview.html"
    pictures = [data_uri(thumbnail(image.image, THUMBNAIL_BYTES)) for image in preview.images]
    page = render_page("pipeline.report", "preview.html.j2", preview=preview, pictures=pictures)
    with translate_disk_errors(path.parent):
        write_text(path, page)
    return path
