"""A raw reply to annotations: one row for a caption, one for each question. A reply that cannot be read is a row as well,
with the reason in `reply_error`, so that nothing vanishes between the journal and the tables."""

import json
from typing import Any

from pipeline.fingerprint import digest
from pipeline.types import Reply, Request


def parse_reply(request: Request, reply: Reply) -> list[dict[str, Any]]:
    """Return the annotations of one reply as rows of tables.ANNOTATION; at least one."""
    fields, error = _fields(request.task, reply)
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
        for position, values in enumerate(fields)
    ]


def _fields(task: str, reply: Reply) -> tuple[list[dict[str, str]], str | None]:
    if reply.finish_reason != "stop":
        return [{}], "cut_short"
    try:
        value = json.loads(reply.text)
    except ValueError:
        return [{}], "not_json"
    found = value.get("qa") if task == "qa" and isinstance(value, dict) else [value]
    if not isinstance(found, list) or not found or not all(_is_text(item) for item in found):
        return [{}], "off_schema"
    return found, None


def _is_text(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(value, str) for value in item.values())
