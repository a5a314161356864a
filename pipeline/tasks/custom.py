"""Custom tasks, built from their settings (config.TaskConfig).

Tasks of the kinds `caption` and `question` add to the texts of built-in tasks. Other tasks fill a column that
has the task's name. Until a version is written, the values are JSON in `record` (tables.ANNOTATION).
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError, model_validator

from pipeline.config.sections import GenerateConfig, TaskConfig
from pipeline.errors import ConfigError
from pipeline.tables import ROW, OwnColumn
from pipeline.tasks import output_schema
from pipeline.tasks.base import (
    Line,
    Output,
    Task,
    check_question,
    find_unusable,
    has_surrogate,
    strip_schema,
    texts_in,
    tidy_texts,
)
from pipeline.tasks.boxes import BOX_FIELDS, Frame, place_box
from pipeline.tasks.caption import Caption, tidy_caption
from pipeline.tasks.output_schema import Schema, UnusableSchemaError, require_field, without_null
from pipeline.text.normalize import tidy

NOTHING_FOUND = "nothing_found"
# The column `record` has this value if the list of rows is empty.
NOTHING = "[]"
# Tasks of these kinds add to the captions or questions of built-in tasks.
JOINING = ("caption", "question")
TEMPLATE = "{prompt}\nReply as {{{{ reply }}}}.\nTask: {name}\n"
PLAIN_TEMPLATE = "{prompt}\nReply with the text alone.\nTask: {name}\n"
CARD_CATEGORIES = {
    "caption": "image-to-text",
    "question": "visual-question-answering",
    "labels": "image-classification",
    "boxes": "object-detection",
    "text": "image-to-text",
}
_TEXT: Schema = {"type": "string"}
# Maps pydantic's error types to ends of rejection reasons.
_ERROR_WORDS = {
    "literal_error": "not_allowed",
    "missing": "missing",
    "string_pattern_mismatch": "off_pattern",
    "extra_forbidden": "not_asked_for",
}


class OwnPair(Output):
    """A question with its answer, written by a custom task."""

    question: Line
    answer: Line

    @model_validator(mode="after")
    def _check_pair(self) -> "OwnPair":
        check_question(self.question, self.answer)
        return self


ROW_MODELS: dict[str, type[Output]] = {"caption": Caption, "question": OwnPair}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CustomTask(Task):
    """A custom task. It validates replies with its closed schema (output_schema.py)."""

    settings: TaskConfig
    # `whole` is the schema of a whole reply, and `value` is the schema of one text or value.
    whole: Schema
    item: TypeAdapter[Any]
    # `field` holds the text or value of an annotation. None means the whole annotation.
    field: str | None
    value: Schema

    def wire_schema(self) -> Schema:
        """See Task."""
        return dict(strip_schema(self.whole))

    def temperature(self, generate: GenerateConfig) -> float:  # noqa: ARG002
        """See Task."""
        return self.settings.temperature

    def rows_of(self, reply: Any) -> list[Any] | None:
        """See Task. A reply may also be the bare list that the task stores, such as labels."""
        is_list = self.field is not None and self.rows_field is None and self.value["type"] == "array"
        return Task.rows_of(self, {self.field: reply} if is_list and isinstance(reply, list) else reply)

    def nothing_found(self) -> tuple[dict[str, Any], str | None]:
        """See Task. An empty list is a valid result, except for captions and questions."""
        return ({}, NOTHING_FOUND) if self.settings.kind in JOINING else ({"record": NOTHING}, None)

    def read_row(self, item: Any, frame: Frame | None = None) -> tuple[dict[str, Any], str | None]:
        """See Task. Boxes are converted to pixels of the image."""
        if has_surrogate(item):
            return {}, "off_schema"
        if flaw := find_unusable(texts_in(item)):
            return {}, flaw
        try:
            box = item.get(self.box_field) if self.box_field and isinstance(item, dict) else None
            if isinstance(box, list) and _is_in_pixels(box):
                item = item | {self.box_field: [round(side) for side in box]}
            fields = self.item.dump_python(self.item.validate_python(item), mode="json", by_alias=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            names = [part for part in first["loc"] if isinstance(part, str)]
            reason = "_".join([*names, _ERROR_WORDS.get(first["type"], first["type"])])
            return {}, reason if names else "off_schema"
        coordinates = self.settings.coordinates
        if self.box_field and frame and (flaw := place_box(fields, self.box_field, frame, coordinates)):
            return {}, flaw
        return self._columns(fields), None

    def _columns(self, fields: Any) -> dict[str, Any]:
        if self.settings.kind == "question":
            return tidy_texts({name: fields.get(name) for name in ("question", "answer", "answer_type")})
        value = fields[self.field] if self.field else fields
        if self.settings.kind == "caption":
            return {"text": tidy_caption({"caption": value})["caption"]}
        if self.settings.kind == "labels" and isinstance(value, list):  # remove repeated labels
            value = list(dict.fromkeys(label for label in map(tidy, value) if label))
        return {"record": json.dumps(value, ensure_ascii=False)}

    @property
    def column(self) -> OwnColumn | None:
        """The column for the task's values in the rows of a version, or None for captions and questions."""
        if self.settings.kind in JOINING:
            return None
        kind = output_schema.arrow_type(self.value)
        is_list = self.rows_field is not None
        return OwnColumn(self.name, pa.list_(kind) if is_list else kind, self.settings.kind, is_list)

    @property
    def result_schema(self) -> Schema:
        """See Task."""
        return {"type": "array", "items": self.value} if self.rows_field else self.value

    def empty_result(self, *, nulls: bool = False) -> Any:
        """Return an empty result for testing prompts that use it. With `nulls`, optional values are null."""
        return [] if self.rows_field else output_schema.empty_value(self.value, nulls=nulls)


def _is_in_pixels(box: list[Any]) -> bool:
    """Return whether the corners of a box are numbers, but not fractions of the image size."""
    are_numbers = all(type(side) in (int, float) and isfinite(side) for side in box)
    return bool(box) and are_numbers and max(box) >= 2


@lru_cache(256)
def build_task(settings: TaskConfig) -> CustomTask:
    """Return the task with these settings. Raises ConfigError if the settings contradict each other."""
    try:
        return _build(settings)
    except UnusableSchemaError as error:
        problem = f"the task {settings.name} cannot be used: {error}"
        raise ConfigError(problem, hint="see docs/custom-tasks.md") from None


def _build(settings: TaskConfig) -> CustomTask:
    kind = settings.kind
    schema = json.loads(settings.output) if settings.output else _default_output(settings)
    if settings.output and settings.labels:
        problem = "`labels` cannot be combined with `output`: write an enum in `output` instead"
        raise UnusableSchemaError(problem)
    whole = without_null(output_schema.close_schema(schema))
    if whole["type"] != "object":
        raise UnusableSchemaError("output must be an object")
    default_rows = {"question": "qa", "boxes": "boxes"} if settings.output is None else {}
    rows = settings.rows or default_rows.get(kind)
    item = whole
    if rows:
        if without_null(whole["properties"].get(rows, _TEXT))["type"] != "array":
            raise UnusableSchemaError(f"output has no list named {rows}, which the setting `rows` requires")
        whole = require_field(whole, rows)
        item = without_null(whole["properties"][rows]["items"])
    field = _field_of(settings, item)
    required = {"question": ("question", "answer"), "boxes": BOX_FIELDS}.get(kind, (field or "",))
    for name in required if item["type"] == "object" else ():
        item = require_field(item, name) if name in item["properties"] else item
    if rows:
        listed = whole["properties"][rows] | {"items": item}
        whole = whole | {"properties": whole["properties"] | {rows: listed}}
    value = item["properties"][field] if field else item
    box_field = _check_kind(settings, value)
    plain_field = field if settings.output is None and kind in ("caption", "text") else None
    template = PLAIN_TEMPLATE if plain_field else TEMPLATE
    return CustomTask(
        name=settings.name,
        output=Output,
        row=ROW_MODELS.get(kind, Output),
        rows_field=rows,
        plain_field=plain_field,
        text_field="caption" if kind == "caption" else None,
        card_category=CARD_CATEGORIES.get(kind),
        keep_if=settings.keep_if,
        needs=settings.needs,
        shows_image=settings.show_image,
        max_tokens=settings.max_tokens,
        language=settings.language,
        own_prompt=template.format(prompt=settings.prompt.strip(), name=settings.name),
        settings=settings,
        whole=whole if rows else item,
        item=output_schema.validator_of(item),
        field=field,
        value=value,
        box_field=box_field,
        shows_detail=kind in ("boxes", "text", "record"),
    )


def _default_output(settings: TaskConfig) -> Schema:
    label: Schema = {"enum": [*settings.labels]} if settings.labels else _TEXT
    if settings.kind == "record":
        raise UnusableSchemaError("a record needs `output`: a JSON schema that defines its fields")
    if settings.labels and settings.kind not in ("labels", "boxes"):
        problem = f"`labels` is only for the kinds `labels` and `boxes`, not for `{settings.kind}`"
        raise UnusableSchemaError(problem)
    if settings.kind in ("caption", "text"):
        return _object(**{settings.kind: _TEXT})
    if settings.kind == "labels":
        return _object(labels=_list(label))
    if settings.kind == "question":
        return _object(qa=_list(_object(question=_TEXT, answer=_TEXT)) | {"minItems": 1})
    corners = _list({"type": "integer"}) | {"minItems": 4, "maxItems": 4}
    return _object(boxes=_list(_object(bbox_2d=corners, label=label)))


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": [*properties]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 0}


def _field_of(settings: TaskConfig, item: Schema) -> str | None:
    """Return the field that holds an annotation's text or value, or None for the whole annotation."""
    item = without_null(item)
    if item["type"] != "object":
        if settings.field or settings.kind not in ("caption", "text", "labels"):
            raise UnusableSchemaError(f"the items of {settings.rows} must be objects")
        return None
    names = item["properties"]
    if settings.field:
        if settings.field not in names:
            raise UnusableSchemaError(f"output has no field {settings.field}; it has {', '.join(names)}")
        return settings.field
    if settings.kind in ("question", "boxes", "record"):
        return None
    if settings.kind in names or len(names) == 1:
        return settings.kind if settings.kind in names else next(iter(names))
    example = next(reversed(names))
    problem = f"output has several fields: name the one with the {settings.kind}, as in `field: {example}`"
    raise UnusableSchemaError(problem)


def _check_kind(settings: TaskConfig, value: Schema) -> str | None:
    """Return the box field, or None. Raises UnusableSchemaError if settings or values do not fit the kind."""
    kind, form = settings.kind, value["type"]
    names = value["properties"] if form == "object" else {}
    if kind in ("caption", "text") and form != "string":
        raise UnusableSchemaError(f"a {kind} must be a string, not of type {form}")
    if kind == "labels" and (value["items"].get("type") if form == "array" else form) != "string":
        raise UnusableSchemaError("labels must be a string, or a list of strings")
    if kind == "boxes" and not settings.show_image:
        raise UnusableSchemaError("boxes need an image: leave out `show_image: false`")
    if kind == "question":
        pair = ("question", "answer", "answer_type")
        forms = {name: without_null(names[name])["type"] for name in pair if name in names}
        if not {"question", "answer"} <= forms.keys() or {*forms.values()} != {"string"}:
            raise UnusableSchemaError("a question needs the fields `question` and `answer` of type string")
    if kind not in JOINING and settings.name in (*ROW.names, "split", "questions"):
        raise UnusableSchemaError(f"{settings.name} is a name of built-in columns or texts: rename the task")
    if kind not in ("caption", "question", "text") and (settings.min_words or settings.max_words):
        problem = f"`min_words` and `max_words` are only for captions, questions and texts, not for {kind}"
        raise UnusableSchemaError(problem)
    if settings.rows and form == "array":
        raise UnusableSchemaError("the `field` of an item of `rows` cannot be a list")
    return _box_field(settings, names) if kind == "boxes" else None


def _box_field(settings: TaskConfig, names: Schema) -> str:
    corners = [name for name in BOX_FIELDS if name in names]
    box = names[corners[0]] if len(corners) == 1 else {}
    is_box = box.get("type") == "array" and (box.get("minItems"), box.get("maxItems")) == (4, 4)
    if not is_box or (settings.output and not settings.rows):
        problem = f"each item of `rows` must have one list of four integers, named {' or '.join(BOX_FIELDS)}"
        raise UnusableSchemaError(problem)
    if box["items"].get("type") != "integer":
        raise UnusableSchemaError("the corners of a box must be integers: their unit is pixels")
    return corners[0]
