"""Audits in Label Studio and Argilla: write texts as tasks for these tools, and read the exported verdicts.

The id of a task, SEED-SAMPLE_ID-CONTENT, identifies the text. The id of a repeated text ends with `-repeat`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

AuditVerdict = Literal["right", "wrong", "cannot_tell"]
AUDIT_VERDICTS: tuple[AuditVerdict, ...] = get_args(AuditVerdict)
ErrorKind = Literal["object", "number", "color", "action", "relation", "text", "other"]
ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)
REPEAT = "repeat"
TEXT_FIELDS = ("text", "question", "answer", "value", "expression")
LABELING_INTERFACE = f"""<View>
  <Text name="text" value="$text"/>
  <Choices name="verdict" toName="text" required="true" showInline="true">
    {"".join(f'<Choice value="{verdict}" hotkey="{verdict[0]}"/>' for verdict in AUDIT_VERDICTS)}
  </Choices>
  <Choices name="error" toName="text" showInline="true">
    {"".join(f'<Choice value="{kind}"/>' for kind in ERROR_KINDS)}
  </Choices>
  <Image name="image" valueList="$images"/>
</View>
"""


def audit_files(tool: str, items: Iterable[dict[str, Any]], seed: int, title: str) -> dict[str, str]:
    """Return the files to import, by path. Each item has an `id`, a `text` and `images` as data URIs."""
    tasks = [
        {
            "id": f"{seed}-{item['id']}-{item['text']['content']}{f'-{REPEAT}' if item['repeat'] else ''}",
            "images": [image for image in item["images"] if image],
            "text": "\n".join(item["text"][name] for name in TEXT_FIELDS if item["text"].get(name)),
            "kind": item["text"]["kind"],
        }
        for item in items
    ]
    if tool == "argilla":
        return _argilla_files(tasks, re.sub(r"[^a-z0-9_-]+", "-", title.lower()).lstrip("-"))
    return {"interface.xml": LABELING_INTERFACE, "tasks.json": json.dumps([{"data": task} for task in tasks])}


def _argilla_files(tasks: Sequence[dict[str, Any]], name: str) -> dict[str, str]:
    pages = [f"page_{n + 1}" for n in range(max((len(task["images"]) for task in tasks), default=0))]
    records = []
    for task in tasks:
        fields = {"text": task.pop("text")} | dict(zip(pages, task.pop("images"), strict=False))
        records.append({"id": task.pop("id"), "fields": fields, "metadata": task})
    labels = {"type": "label_selection", "options": _options(*AUDIT_VERDICTS)}
    error = {"type": "label_selection", "options": _options(*ERROR_KINDS)}
    questions = [
        {"name": "verdict", "settings": labels},
        {"name": "error", "settings": error, "required": False},
    ]
    images = [{"name": page, "settings": {"type": "image"}, "required": False} for page in pages]
    shown = [{"name": "text", "settings": {"type": "text"}}, *images]
    settings = {"allow_extra_metadata": True, "fields": shown, "questions": questions}
    files = {
        ".argilla/dataset.json": {"name": name},
        ".argilla/settings.json": settings,
        "records.json": records,
    }
    return {path: json.dumps(content) for path, content in files.items()}


def _options(*names: str) -> list[dict[str, str]]:
    return [{"value": name, "text": name} for name in names]


def read_verdicts_of_tools(exported: str) -> Iterator[dict[str, Any]]:
    """Yield the verdicts in the JSON that a tool exported. Raises ValueError for any other file."""
    try:
        for task in json.loads(exported):
            is_record = "fields" in task
            seed, sample_id, content, *rest = (task if is_record else task["data"])["id"].split("-")
            name = {"seed": int(seed), "sample_id": sample_id, "content": content, "repeat": rest == [REPEAT]}
            for answer in _argilla_answers(task) if is_record else _label_studio_answers(task):
                yield name | answer
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not exported by Label Studio or Argilla: {error!r}") from None


def _label_studio_answers(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for annotation in task["annotations"]:
        if annotation.get("was_cancelled"):  # skipped
            continue
        reviewer = f"Label Studio user {annotation['completed_by']}"
        choices = [one for one in annotation["result"] if one["type"] == "choices"]
        chosen = {one["from_name"]: one["value"]["choices"][0] for one in choices}
        if "verdict" in chosen:
            yield {"reviewer": reviewer, "error": "other"} | chosen


def _argilla_answers(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    responses = record["responses"]
    errors = {answer["user_id"]: answer["value"] for answer in responses.get("error", ())}
    for answer in responses.get("verdict", ()):
        user = answer["user_id"]
        error = errors.get(user, "other")
        yield {"reviewer": f"Argilla user {user}", "verdict": answer["value"], "error": error}
