"""Parse replies into annotations. An unreadable reply becomes a row with an error."""

import json
import re
from typing import Any

from pipeline.digests import digest
from pipeline.tasks import BUILT_IN, Tasks, find_broken_rule
from pipeline.tasks.base import Task
from pipeline.tasks.boxes import Frame
from pipeline.tasks.custom import NOTHING_FOUND
from pipeline.types import Reply, Request

# JSON is searched at no more than this many opening braces.
MAX_BRACES = 32
_DECODER = json.JSONDecoder()
_COLUMNS = ("text", "question", "answer", "answer_type", "evidence_pages", "expression", "record")
_FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)
_QUOTES = (('"', '"'), ("\u201c", "\u201d"))
_UNFINISHED = {"length": "cut_short", "repetition": "repeats_itself"}


def parse_reply(
    request: Request, reply: Reply, tasks: Tasks = BUILT_IN, frame: Frame | None = None
) -> list[dict[str, Any]]:
    """Return the annotations in a reply as rows of tables.ANNOTATION. There is at least one row.

    Boxes are converted to pixels of the upright image that `frame` describes.
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
            "model": request.model,
            "logprob_mean": reply.logprob_mean,
            "logprob_min": reply.logprob_min,
            **{name: values.get(name) for name in _COLUMNS},
            "reply_error": error,
            "reply_text": reply.text if error else None,
        }
        for position, (values, error) in enumerate(read_fields(task, reply, frame, request.style))
    ]


def find_flaw(
    request: Request, reply: Reply, tasks: Tasks = BUILT_IN, frame: Frame | None = None
) -> str | None:
    """Return the first error in a reply, or None if it has a valid annotation or an allowed empty list."""
    task, pages = tasks[request.task], max(1, len(request.images))
    rows = read_fields(task, reply, frame, request.style)
    flaws = [error or find_broken_rule(task, values, pages) for values, error in rows]
    return None if None in flaws or NOTHING_FOUND in flaws else flaws[0]


def read_fields(
    task: Task, reply: Reply, frame: Frame | None = None, style: str = ""
) -> list[tuple[dict[str, Any], str | None]]:
    """Return the columns of each annotation in a reply, each with an error or None."""
    if reply.finish_reason != "stop":
        return [({}, _UNFINISHED.get(reply.finish_reason, reply.finish_reason))]
    value = _parse(reply.text)
    if value is None:
        value = object_within(reply.text)
    if task.plain_field and not (isinstance(value, dict) and task.plain_field in value):
        text = value if isinstance(value, str) else plain_text(reply.text)
        if not _is_plain(text, may_be_code=style == "ocr" or task.text_field is None):
            return [({}, "not_plain_text")]
        lines = filter(None, map(str.strip, text.splitlines()))
        value = {task.plain_field: " / ".join(lines) if style == "ocr" else text}
    elif value is None:
        return [({}, "not_json")]
    rows = task.rows_of(value)
    return [task.nothing_found()] if rows == [] else [task.read_row(row, frame) for row in rows or [None]]


def _parse(text: str) -> Any:
    """Return a text as a JSON value, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_result(request: Request, reply: Reply, tasks: Tasks = BUILT_IN) -> Any:
    """Return the text, value or rows in a reply, for use by other tasks, or None if the reply is unusable."""
    task = tasks[request.task]
    rows = read_fields(task, reply, style=request.style)
    values = [_value(row) for row, error in rows if not error and not find_broken_rule(task, row)]
    if task.rows_field:
        return [value for value in values if value != []] if values or rows[0][1] == NOTHING_FOUND else None
    return values[0] if values else None


def _value(row: dict[str, Any]) -> Any:
    if row.get("record"):
        return json.loads(row["record"])
    return row.get("text") or {name: value for name, value in row.items() if value is not None}


def plain_text(text: str) -> str:
    """Remove the reasoning, a line like "Here is a caption:", and a code fence or quotes from a reply."""
    from pipeline.text.artifacts import opens_chat  # this import compiles large regular expressions

    text = text.rpartition("</think>")[2].strip()
    first, _, rest = text.partition("\n")
    if first.rstrip().endswith(":") and opens_chat(first):
        text = rest.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1].strip()
    for begin, end in _QUOTES:
        inner = text[1:-1]
        is_quoted = text.startswith(begin) and text.endswith(end) and begin not in inner and end not in inner
        if inner and is_quoted:
            return inner.strip()
    return text


def _is_plain(text: str, *, may_be_code: bool) -> bool:
    """Return whether a reply is only the requested text. With `may_be_code`, it may look like code."""
    from pipeline.text.artifacts import opens_chat

    if not text or text.startswith(("```", "<think>")) or opens_chat(text):
        return False
    return may_be_code or not (text.startswith("{") or isinstance(_parse(text), dict | list))


def object_within(text: str) -> dict[str, Any] | None:
    """Return the first JSON object in a text, or None. Ignores the text before the last </think>."""
    text = text.rpartition("</think>")[2]
    position = -1
    for _ in range(MAX_BRACES):
        position = text.find("{", position + 1)
        if position < 0:
            return None
        try:
            value, _ = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            continue
        return value if isinstance(value, dict) else None
    return None
