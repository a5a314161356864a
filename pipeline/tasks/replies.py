"""Parse a raw reply to annotations: one row for a caption, one for each question. An unreadable reply becomes a row as well,
with the reason in `reply_error`, so that no reply is lost between the journal and the tables."""

import json
import re
from typing import Any

from pipeline.digests import digest
from pipeline.tasks import find_broken_rule, find_task
from pipeline.tasks.base import Task
from pipeline.text.refusals import is_declined
from pipeline.types import Reply, Request

_SURROGATE = re.compile("[\ud800-\udfff]")  # a lone one: JSON can escape it, but no table can hold it
MAX_BRACES = 32  # where the object of a reply is looked for
_DECODER = json.JSONDecoder()
MAX_REPEATS = 4  # of the same words in a row: "a cat and a cat and a cat and a cat and"
_COLUMNS = ("text", "question", "answer", "answer_type", "evidence_pages", "expression")
_UNFINISHED = {"length": "cut_short", "repetition": "repeats_itself"}


def parse_reply(request: Request, reply: Reply) -> list[dict[str, Any]]:
    """Return the annotations of one reply as rows of tables.ANNOTATION; at least one."""
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
        for position, (values, error) in enumerate(read_fields(request.task, reply))
    ]


def find_flaw(request: Request, reply: Reply) -> str | None:
    """Return the first flaw of a reply without any valid annotation; None if at least one is valid."""
    pages = max(1, len(request.images))
    flaws = [error or find_broken_rule(request.task, values, pages) for values, error in read_fields(request.task, reply)]
    return None if None in flaws else flaws[0]


def read_fields(task: str, reply: Reply) -> list[tuple[dict[str, Any], str | None]]:
    """Return (fields, error) for each annotation; one that is off the schema does not reject the others."""
    if reply.finish_reason != "stop":
        return [({}, _UNFINISHED.get(reply.finish_reason, reply.finish_reason))]
    try:
        value = json.loads(reply.text)
    except (ValueError, RecursionError):
        value = object_within(reply.text)
        if value is None:
            return [({}, "not_json")]
    definition = find_task(task)
    rows = [_with_texts(row) for row in definition.rows_of(value) or [None]]
    return [_row(definition, row) if _is_readable(row) else ({}, "off_schema") for row in rows]


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


def _with_texts(item: Any) -> Any:
    """Return an item whose numbers are texts: a server that enforces no schema writes a count, or a mark, as a number."""
    if not isinstance(item, dict):
        return item
    return {name: str(value) if type(value) in (int, float) else value for name, value in item.items()}


def _row(task: Task, row: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    tidy = task.tidy_row(row)
    return task.columns_of(tidy), _unusable(tidy)


def _unusable(item: dict[str, Any]) -> str | None:
    texts = [value for value in item.values() if isinstance(value, str)]
    if any(map(is_declined, texts)):
        return "refusal"
    return "repeats_itself" if any(_repeats(text.casefold().split()) for text in texts) else None


def _repeats(words: list[str]) -> bool:
    """Return True if the last one to eight words repeat MAX_REPEATS times in a row: the model is in a loop."""
    sizes = range(1, min(8, len(words) // MAX_REPEATS) + 1)
    return any(words[-size * MAX_REPEATS :] == words[-size:] * MAX_REPEATS for size in sizes)


def _is_readable(item: Any) -> bool:
    """Return True if a table can hold an item: texts, and small positive integers in `evidence_pages`."""
    if not isinstance(item, dict):
        return False
    pages = item.get("evidence_pages", [])
    has_pages = isinstance(pages, list) and all(type(page) is int and 0 < page < 2**31 for page in pages)
    texts = [value for name, value in item.items() if name != "evidence_pages"]
    return has_pages and all(isinstance(text, str) and not _SURROGATE.search(text) for text in texts)
