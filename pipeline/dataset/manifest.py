"""Describe the run that made a version, for the manifest of the version."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import NO_MODEL, Config
from pipeline.config.sections import AT_SERVER, TITLE
from pipeline.digests import public_name, without_folders
from pipeline.tables import BLIND, MODEL, REJECTED, RUBRIC, Extras
from pipeline.tasks import Tasks, wire_schema
from pipeline.tasks.base import Task
from pipeline.tasks.checks import ANSWER, CLAIMS, CONFIRM, COVERS, RATE, REPAIR
from pipeline.tasks.prompts import prompt_texts

LOCAL_SOURCES = ("folder", "archive", "parquet", "pdf", "pdf-pages", "video")


@dataclass(frozen=True, slots=True)
class StepSummary:
    """The row counts of a step. `input` is the sum of `kept` and `rejected`."""

    step: str
    unit: str
    input: int
    kept: int
    rejected: dict[str, int] = field(default_factory=dict)


def asked_tasks(config: Config, tasks: Tasks) -> tuple[Task, ...]:
    """Return the tasks that a run asks the model, including the tasks for its checks."""
    checks = set(config.verify.checks)
    has_rules = "claims" in checks and not config.splits_claims
    asked = {
        ANSWER: checks & {"round_trip", "blind", "evidence"} or has_rules,
        CLAIMS: config.splits_claims,
        CONFIRM: config.splits_claims,
        REPAIR: config.verify.repair,
        COVERS: "covers" in checks,
        RATE: config.verify.judge,
    }
    return (*tasks.asked, *(task for task, is_asked in asked.items() if is_asked))


def row_extras(config: Config, tasks: Tasks, writers: Sequence[str] = ()) -> Extras:
    """Return the scores, context columns and custom task columns of the rows of a run.

    `writers` are the models that wrote the texts. If there are several, each text names its model.
    """
    checks = config.verify.checks
    # There is no precision if rules, instead of the model, split captions into claims.
    is_measured = {
        "precision": config.splits_claims,
        "coverage": "covers" in checks,
        **dict.fromkeys(RUBRIC, bool(config.verify.judge)),
        "logprob_mean": config.generate.logprobs,
        MODEL.name: len(writers) > 1,
        BLIND.name: "blind" in checks,
        REJECTED.name: config.select.pairs,
    }
    added = tuple(name for name, measured in is_measured.items() if measured)
    context = () if config.drop_context else config.context
    own = tuple(column for task in tasks.custom if (column := task.column))
    return Extras(added, context, own)


def describe_provenance(
    config: Config, tasks: Tasks, source: dict[str, Any], model: dict[str, Any]
) -> dict[str, Any]:
    """Return the manifest fields that describe the run."""
    asked = asked_tasks(config, tasks)
    settings = publishable_settings(config, tasks, source["name"], model["name"])
    kind, _, path = config.source.partition(":")
    folder = Path(path).name if kind == "folder" else ""
    title = config.title or (folder if folder != ".." and re.fullmatch(TITLE, folder) else None)
    return {
        "source": {
            name: source[name]
            for name in ("name", "revision", "partial", "preview", "joined_texts")
            if name in source
        },
        "model": model,
        "prompts": prompt_texts(asked, config.prompt_dirs) if asked else {},
        "schemas": {task.name: wire_schema(task) for task in asked},
        # The digests of caption files are from the read step, since the files may be gone in a later run.
        "config": settings | {"captions": source.get("captions", [])},
        **describe_data(config.license, title, config.filter.language),
    }


def describe_data(
    license_name: str | None, title: str | None, language: str | None, license_link: str | None = None
) -> dict[str, str]:
    """Return the manifest fields that the user stated about the data, for the card."""
    stated = {"license": license_name, "title": title, "language": language, "license_link": license_link}
    return {name: value for name, value in stated.items() if value is not None}


def describe_decontamination(
    source: dict[str, Any], funnel: list[StepSummary], groups: int
) -> dict[str, Any]:
    """Return the manifest fields about near-duplicate images. `groups` is the number of image groups."""
    rejected = {summary.step: summary.rejected for summary in funnel}
    return {
        "compared_as": source["compared_as"],
        **({"near_bits": source["near_bits"]} if source.get("near_bits") else {}),
        "groups_of_images": groups,
        "near_held_out_annotations": rejected["dedupe"].get("near_held_out_image", 0),
        "never": source["never"],
        "banned_images": rejected["read"].get("banned_image", 0),
    }


def publishable_settings(config: Config, tasks: Tasks, source: str, model: str) -> dict[str, Any]:
    """Return the settings without server addresses, and with names or digests instead of local paths."""
    settings = config.model_dump(mode="json", exclude={"base_url", "server", "models", "custom_tasks"})
    settings |= {"source": source, "model": None if model == NO_MODEL else model}
    if tasks.custom:
        own = [task.settings.model_dump(mode="json", exclude_defaults=True) for task in tasks.custom]
        settings["custom_tasks"] = own
    settings["exclude"] = [name for name in config.exclude if name.partition(":")[0] not in LOCAL_SOURCES]
    if config.generate.prompt_dir:
        settings["generate"]["prompt_dir"] = config.generate.prompt_dir.name
    settings["verify"]["clip_model"] = public_name(config.verify.clip_model)
    judge = config.verify.judge
    settings["verify"]["judge"] = judge and without_folders(judge.partition(AT_SERVER)[0])
    return settings
