"""`synth preview`: ask about a few images, and show the images with the replies. A run reuses the replies."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.executors.messages import describe_engine
from pipeline.filtering import filter_annotations, own_prompt_grams
from pipeline.inference.engines import open_engines
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats, ask_in_rounds, read_annotations
from pipeline.plan import Plan
from pipeline.progress import Progress
from pipeline.report.html import render_page, thumbnail_uri
from pipeline.steps.ask import AskSettings
from pipeline.steps.validate import validate_annotations
from pipeline.storage.files import translate_disk_errors, write_text
from pipeline.tables import HUMAN
from pipeline.tasks.prompts import describe_prompts
from pipeline.text.escape import visible
from pipeline.text.reasons import in_short
from pipeline.types import Rejected, Request, Sample, SampleBatch

THUMBNAIL_BYTES = 40_000
# A text, and the reason if a run would reject it.
JudgedText = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class PreviewReply:
    """The texts in one reply. `seconds` is None if the reply was already in the journal."""

    task: str
    style: str
    texts: list[JudgedText]
    prompt_tokens: int
    reply_tokens: int
    seconds: float | None


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
    """The replies about a few images. `prompts` maps "task style" to the system text and the prompt."""

    source: str
    model: str
    engine: str
    prompt_sources: str
    prompts: dict[str, tuple[str, str]]
    images: list[PreviewImage]
    folder: Path
    skipped: list[str]

    def describe(self) -> dict[str, Any]:
        """Return the preview as JSON values, without images."""
        images = []
        for image in self.images:
            replies = [asdict(reply) for reply in image.replies]
            for reply in replies:
                reply["texts"] = [{"text": text, "rejected": reason} for text, reason in reply["texts"]]
            images.append({"name": image.name, "replies": replies})
        return {"source": self.source, "model": self.model, "images": images, "skipped": self.skipped}


def preview_run(plan: Plan, number: int, progress: Progress) -> Preview:
    """Ask about the first `number` images of a source, and return the replies.

    Raises SynthError as `run.generate_dataset` does, and SourceError if the source has no usable image.
    """
    config, folder, settings = plan.config, plan.dataset, AskSettings.of(plan)
    servers = settings.servers
    samples, skipped = _first_samples(plan, number)
    stats = RequestStats(seconds={})
    with (
        translate_disk_errors(folder.path),
        folder.lock(),
        Journal(folder.journal) as journal,
        open_engines(plan.engines.__getitem__) as start,
    ):
        batch = SampleBatch.of((sample.id, sample.images) for sample in samples)
        texts = {sample.id: settings.source_texts(sample.to_row()) for sample in samples}
        for engine in ask_in_rounds(
            lambda: iter([batch]), plan.requests, servers, start, journal, stats, texts.__getitem__
        ):
            progress("preview", stats.done, stats.total, engine.metrics() | stats.metrics(servers))
        requests = {sample.id: settings.requests_about(sample, journal) for sample in samples}
        images = [_read_replies(sample, requests[sample.id], plan, journal, stats) for sample in samples]
    prompts: dict[str, tuple[str, str]] = {}
    for request in (request for sample in samples for request in requests[sample.id]):
        prompts.setdefault(f"{request.task} {request.style}".strip(), (request.system, request.text))
    return Preview(
        source=config.source,
        model=plan.model,
        engine=describe_engine(plan, plan.engine),
        prompt_sources=describe_prompts(
            plan.tasks.asked, config.generate.prompt_dir, config.generate.style_prompts
        ),
        prompts=prompts,
        images=images,
        folder=folder.path,
        skipped=skipped,
    )


def _first_samples(plan: Plan, number: int) -> tuple[list[Sample], list[str]]:
    """Return the first usable images of a source, and messages about unusable rows before them."""
    assert plan.source is not None
    samples: dict[str, Sample] = {}
    skipped: list[str] = []
    for row in plan.source.rows:
        if isinstance(row, Rejected):
            skipped.append(f"{visible(row.source_row)}: {row.reason.replace('_', ' ')} ({row.detail})")
        else:
            samples.setdefault(row.id, row)
        if len(samples) == number:
            break
    if not samples:
        problem = f"no image of {plan.config.source} can be used; {'; '.join(skipped[:3])}"
        raise SourceError(problem, hint="choose another source")
    return list(samples.values()), skipped


def _read_replies(
    sample: Sample, requests: list[Request], plan: Plan, journal: Journal, stats: RequestStats
) -> PreviewImage:
    settings, row = AskSettings.of(plan), sample.to_row()
    info = settings.sample_info(row, len(sample.images))
    source_texts = settings.source_texts(row)
    (table,) = read_annotations([[info]], plan.requests, journal, lambda _: source_texts)
    texts = _judge_texts(table, plan)
    human_tasks = {human["request_id"]: human["task"] for human in info.human}
    replies = [PreviewReply(task, HUMAN, texts[name], 0, 0, None) for name, task in human_tasks.items()]
    for request in requests:
        last = journal.last(request.id)
        assert last is not None
        tokens = last[0].prompt_tokens, last[0].reply_tokens
        seconds = (stats.seconds or {}).get(request.id)
        replies.append(PreviewReply(request.task, request.style, texts[request.id], *tokens, seconds))
    name = visible(sample.source_row)
    return PreviewImage(name, sample.images[0], sample.width_px, sample.height_px, replies)


def _judge_texts(table: pa.Table, plan: Plan) -> dict[str, list[JudgedText]]:
    """Return the texts by request id, each with the reason if the validate or filter step would reject it."""
    validated = validate_annotations(table, plan.tasks)
    grams = own_prompt_grams(tuple(task.name for task in plan.tasks.asked))
    kept, words = validated.drop_columns(["reason"]), plan.config.generate.caption_words
    filtered = filter_annotations(kept, plan.config.filter, grams, plan.tasks, words)
    reasons = zip(validated["reason"].to_pylist(), filtered["reason"].to_pylist(), strict=True)
    texts: dict[str, list[JudgedText]] = {}
    for row, (invalid, filtered_reason) in zip(table.to_pylist(), reasons, strict=True):
        record = in_short(json.loads(row["record"])) if row["record"] else None
        question = " ".join(filter(None, (row["question"], row["answer"])))
        text = row["text"] or question or record or row["reply_text"] or ""
        texts.setdefault(row["request_id"], []).append((visible(text), invalid or filtered_reason))
    return texts


def write_preview(preview: Preview) -> Path:
    """Write a preview as an HTML page in its dataset folder, and return the path."""
    path = preview.folder / "preview.html"
    pictures = [thumbnail_uri(image.image, THUMBNAIL_BYTES) for image in preview.images]
    page = render_page("preview.html.j2", preview=preview, pictures=pictures)
    with translate_disk_errors(path.parent):
        write_text(path, page)
    return path
