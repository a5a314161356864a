"""The tasks by name, with the validation and the JSON schema of their outputs."""

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.errors import ConfigError, did_you_mean
from pipeline.tasks import caption, deck_qa, qa
from pipeline.tasks.base import Task
from pipeline.tasks.checks import CHECKING
from pipeline.tasks.own import OwnTasks, build_task

TASKS: dict[str, Task] = {task.name: task for task in (caption.TASK, qa.TASK, deck_qa.TASK, *CHECKING)}


def find_task(name: str, own: OwnTasks = ()) -> Task:
    """Return the task of a name, built in or one of the user's `own`. Raise ConfigError for an unknown name."""
    for settings in own:
        if settings.name == name:
            return build_task(settings)
    if name not in TASKS:
        known = [task.name for task in TASKS.values() if task not in CHECKING] + [task.name for task in own]
        hint = did_you_mean(name, known) or f"known tasks: {', '.join(known)}; one of your own: --task FILE"
        raise ConfigError(f"unknown task: {name}", hint=hint)
    return TASKS[name]


@cache
def tasks_making(kind: Literal["captions", "questions"]) -> frozenset[str]:
    """Return the names of the built-in tasks whose annotations are captions, or questions with their answers."""
    asked_for = [task for task in TASKS.values() if task not in CHECKING]
    if kind == "captions":
        return frozenset(task.name for task in asked_for if task.text_field is not None)
    return frozenset(task.name for task in asked_for if "question" in task.row.model_fields)


def asks_about_decks(names: Iterable[str]) -> bool:
    """Return True if any of these tasks asks about decks of pages; tasks of a user's own do not."""
    return any(TASKS[name].asks_about_decks for name in names if name in TASKS)


def find_broken_rule(task: Task, row: dict[str, Any], pages: int = 1) -> str | None:
    """Return the first rule of a task that an annotation of a document breaks, as a rejection reason; None if it is valid."""
    try:
        task.row.model_validate(task.fields_of(row), context={"pages": pages})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return "_".join([*(str(part) for part in first["loc"]), str(first["type"])])
    return None


@cache
def wire_schema(task: Task) -> dict[str, Any]:
    """Return the JSON schema that the decoder enforces for a task. It is cached: do not change it."""
    return task.wire_schema()
