"""The tasks of a run by name, validation of their outputs, and the JSON schemas for decoders."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError

from pipeline.config.sections import TaskConfig
from pipeline.errors import ConfigError
from pipeline.tasks import caption, deck_qa, qa
from pipeline.tasks.base import Task
from pipeline.tasks.checks import CHECKING
from pipeline.tasks.custom import build_task

TASKS: dict[str, Task] = {task.name: task for task in (caption.TASK, qa.TASK, deck_qa.TASK, *CHECKING)}


class Tasks:
    """The tasks of a run by name. `custom` has the user's tasks, and `asked` the tasks for every image.

    Raises ConfigError if a name is unknown, or if the settings of a custom task contradict each other.
    """

    def __init__(self, asked: Sequence[str] = (), custom: Sequence[TaskConfig] = ()) -> None:
        self.custom = tuple(build_task(settings) for settings in custom)
        self._by_name: dict[str, Task] = TASKS | {task.name: task for task in self.custom}
        self.asked = tuple(self[name] for name in asked)

    def __getitem__(self, name: str) -> Task:
        if name not in self._by_name:
            known = [task.name for task in self._by_name.values() if task not in CHECKING]
            hint = f"known tasks: {', '.join(known)}; add your own with --task FILE"
            raise ConfigError(f"unknown task: {name}", unknown=name, known=known, hint=hint)
        return self._by_name[name]

    def describe(self, exclude: Iterable[str] = ()) -> list[Any]:
        """Return the names of asked tasks, and the settings and schemas of custom tasks."""
        settings = [task.settings.model_dump(mode="json", exclude={*exclude}) for task in self.custom]
        return [[task.name for task in self.asked], settings, list(map(wire_schema, self.custom))]


BUILT_IN = Tasks()


def asks_about_decks(names: Iterable[str]) -> bool:
    """Return whether any of these tasks is about decks. Custom tasks never are."""
    return any(TASKS[name].asks_about_decks for name in names if name in TASKS)


def find_broken_rule(task: Task, row: dict[str, Any], pages: int = 1) -> str | None:
    """Return a rejection reason for the first rule that an annotation breaks, or None if it is valid."""
    columns = row if task.text_field is None else {**row, task.text_field: row.get("text")}
    fields = {name: columns.get(name) for name in task.row.model_fields}
    try:
        task.row.model_validate(fields, context={"pages": pages})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return "_".join([*(str(part) for part in first["loc"]), str(first["type"])])
    return None


@cache
def wire_schema(task: Task) -> dict[str, Any]:
    """Return the JSON schema that the decoder enforces. The result is cached and must not be modified."""
    return task.wire_schema()
