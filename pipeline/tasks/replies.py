"""Parse a raw reply to annotations: one row for a caption, one for each question. An unreadable reply becomes a row as well,
with the reason in `reply_error`, so that no reply is lost between the journal and the tables."""

import json
from typing import Any

from pipeline.digests import digest
from pipeline.tasks import BUILT_IN, Tasks, find_broken_rule
from pipeline.tasks.base import Task
from pipeline.tasks.boxes import Frame
from pipeline.tasks.own import NOTHING_FOUND
from pipeline.types import Reply, Request

MAX_BRACES = 32  # where the object of a reply is looked for
_DECODER = json.JSONDecoder()
_COLUMNS = ("text", "question", "answer", "answer_type", "evidence_pages", "expression", "record")
_UNFINISHED = {"length": "cut_short", "repetition": "repeats_itself"}


def parse_reply(request: Request, reply: Reply, tasks: Tasks = BUILT_IN, frame: Frame | None = None) -> list[dict[str, Any]]:
    """Return the annotations of one reply as rows of tables.ANNOTATION; at least one.

    Boxes are put into pixels of the image of the `frame`.
    """
    task = tasks[request.task]
    return [
        {
            "annotation_id": digest([request.id, position]),
            "sample_id": request.sample_id,
            "request_id": request.id,
            "task": request.task,
            "style": request.style,
            "position": position,
            "prompt_id": request.prompt_id,
            **{name: values.get(name) for name in _COLUMNS},
            "reply_error": error,
            "reply_text": reply.text if error else None,  # an unreadable reply is kept for inspection
        }
        for position, (values, error) in enumerate(read_fields(task, reply, frame))
    ]


def find_flaw(request: Request, reply: Reply, tasks: Tasks = BUILT_IN, frame: Frame | None = None) -> str | None:
    """Return the first flaw of a reply without any valid annotation; None if at least one is valid, or none was to be found."""
    task, pages = tasks[request.task], max(1, len(request.images))
    rows = read_fields(task, reply, frame)
    flaws = [error or find_broken_rule(task, values, pages) for values, error in rows]
    return None if None in flaws or NOTHING_FOUND in flaws else flaws[0]


def read_fields(task: Task, reply: Reply, frame: Frame | None = None) -> list[tuple[dict[str, Any], str | None]]:
    """Return (fields, error) for each annotation; one that is off the schema does not reject the others."""
    if reply.finish_reason != "stop":
        return [({}, _UNFINISHED.get(reply.finish_reason, reply.finish_reason))]
    try:
        value = json.loads(reply.text)
    except (ValueError, RecursionError):
        value = object_within(reply.text)
        if value is None:
            return [({}, "not_json")]
    rows = task.rows_of(value)
    return [task.nothing_found()] if rows == [] else [task.read_row(row, frame) for row in rows or [None]]


def read_result(request: Request, reply: Reply, tasks: Tasks = BUILT_IN) -> Any:
    """Return what a reply comes to for tasks that need it: a text, a value, or a list of rows; None if it is unusable."""
    task = tasks[request.task]
    rows = read_fields(task, reply)
    usable = [fields for fields, error in rows if not error and not find_broken_rule(task, fields)]
    values = [json.loads(row["record"]) if row.get("record") else row.get("text") or _told(row) for row in usable]
    if task.rows_field:
        return [value for value in values if value != []] if values or rows[0][1] == NOTHING_FOUND else None
    return values[0] if values else None


def _told(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def object_within(text: str) -> dict[str, Any] | None:
    """Return the first JSON object in a text, after its thoughts; None if there is none.

    A server that does not enforce a schema puts fences, words or thoughts around it.
    """
    after_thoughts = text.rpartition("</think>")[2]
    position = -1
    for _ in range(MAX_BRACES):
        position = after_thoughts.find("{", position + 1)
        if position < 0:
            return None
        try:
            value, _ = _DECODER.raw_decode(after_thoughts, position)
        except (ValueError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None
