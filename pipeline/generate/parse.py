"""A raw reply to annotations: one row for a caption, one for each question. A reply that cannot be read is a row as well,
with the reason in `reply_error`, so that nothing vanishes between the journal and the tables."""

import json
from typing import Any

from pipeline.fingerprint import digest
from pipeline.types import Reply, Request


def parse_reply(request: Request, reply: Reply) -> list[dict[str, Any]]:
    """Return the annotations of one reply as rows of tables.ANNOTATION; at least one."""
    found = _fields(request.task, reply)
    return [
        {
            "annotation_id": digest([request.id, position]),
            "sample_id": request.sample_id,
            "request_id": request.id,
            "task": request.task,
            "style": request.style,
            "position": position,
            "prompt_id": request.prompt_id,
            "text": values.get("caption"),
            "question": values.get("question"),
            "answer": values.get("answer"),
            "answer_type": values.get("answer_type"),
            "reply_error": error,
        }
        for position, (values, error) in enumerate(found)
    ]


def _fields(task: str, reply: Reply) -> list[tuple[dict[str, str], str | None]]:
    """Return (fields, error) for each annotation; one that is off the schema does not cost its siblings."""
    if reply.finish_reason != "stop":
        return [({}, "cut_short")]
    try:
        value = json.loads(reply.text)
    except (ValueError, RecursionError):
        return [({}, "not_json")]
    found = value.get("qa") if task == "qa" and isinstance(value, dict) else [value]
    if not isinstance(found, list) or not found:
        return [({}, "off_schema")]
    return [(item, None) if _is_text(item) else ({}, "off_schema") for item in found]


def _is_text(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(value, str) and _is_unicode(value) for value in item.values())


def _is_unicode(text: str) -> bool:
    """JSON can escape half of a surrogate pair, which no table can hold."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
