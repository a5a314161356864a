"""Tasks of a user's own: built from their settings (config.TaskConfig).

By its kind a task joins what is there, captions or questions, or fills a column of its own: labels, boxes, a text, a record of
fields. A value of such a column is kept as JSON (tables.ANNOTATION, `record`) until the rows of a version are written.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel, TypeAdapter, ValidationError, model_validator

from pipeline.config.sections import GenerateConfig, TaskConfig
from pipeline.errors import ConfigError
from pipeline.tables import ROW, OwnColumn
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
from pipeline.tasks.output_schema import (
    Schema,
    UnusableSchemaError,
    arrow_type,
    close_schema,
    empty_value,
    load_output,
    require_field,
    validator_of,
    without_null,
)
from pipeline.text.normalize import tidy

log = logging.getLogger(__name__)
NOTHING_FOUND = "nothing_found"  # a list of rows that is empty
NOTHING = "[]"  # the record that stands for it
JOINING = ("caption", "question")  # kinds whose texts join those of the built-in tasks
TEMPLATE = "{prompt}\nReply as {{{{ reply }}}}.\nTask: {name}\n"
# By kind; task categories of the Hub.
CARD_CATEGORIES = {
    "caption": "image-to-text",
    "question": "visual-question-answering",
    "labels": "image-classification",
    "boxes": "object-detection",
    "text": "image-to-text",
}
_TEXT: Schema = {"type": "string"}
_WRONG = {  # what pydantic finds wrong with a field, as the end of a reason
    "literal_error": "not_allowed",
    "missing": "missing",
    "string_pattern_mismatch": "off_pattern",
    "extra_forbidden": "not_asked_for",
}


class OwnPair(Output):
    """A question of a user's own task, with its answer."""

    question: Line
    answer: Line

    @model_validator(mode="after")
    def _is_a_question_with_an_answer(self) -> "OwnPair":
        check_question(self.question, self.answer)
        return self


ROW_MODELS: dict[str, type[Output]] = {"caption": Caption, "question": OwnPair}  # by kind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OwnTask(Task):
    """A task of a user's own."""

    settings: TaskConfig
    whole: Schema  # of a whole reply, closed
    item: TypeAdapter[Any]  # checks one annotation
    model: TypeAdapter[Any] | None  # the user's own check of it
    field: str | None  # of an annotation that is its text or value; None: all of it
    value: Schema  # of the text or value, closed

    def wire_schema(self) -> Schema:
        """See Task."""
        return dict(strip_schema(self.whole))

    def temperature(self, generate: GenerateConfig) -> float:  # noqa: ARG002
        """See Task."""
        return self.settings.temperature

    def rows_of(self, reply: Any) -> list[Any] | None:
        """Return the rows of a parsed reply, an empty list if it found nothing; None if it has no rows.

        A server that enforces no schema may leave out the object around a list, as Qwen2.5-VL was trained to do with boxes.
        """
        if self.rows_field is None:
            is_bare = isinstance(reply, list) and self.field is not None and self.value["type"] == "array"
            return [{self.field: reply} if is_bare else reply]
        rows = reply.get(self.rows_field) if isinstance(reply, dict) else reply
        return rows if isinstance(rows, list) else None

    def nothing_found(self) -> tuple[dict[str, Any], str | None]:
        """Return what stands for an empty list: that nothing is there is a result, but for captions and questions."""
        return ({}, NOTHING_FOUND) if self.settings.kind in JOINING else ({"record": NOTHING}, None)

    def read_row(self, item: Any, frame: Frame | None = None) -> tuple[dict[str, Any], str | None]:
        """See Task. A box is put into pixels of the image of the `frame`."""
        if has_surrogate(item):
            return {}, "off_schema"
        if flaw := find_unusable(texts_in(item)):
            return {}, flaw
        try:
            item = self._as_asked(item)
            fields = self.item.dump_python(self.item.validate_python(item), mode="json", by_alias=True)
            if self.model:
                self.model.validate_python(fields)
        except ValidationError as error:
            return {}, _reason(error)
        except Exception:  # a user's own check may raise anything
            log.warning("the check of the task %s failed", self.name, exc_info=True)
            return {}, "check_failed"
        if self.box_field and frame and (flaw := place_box(fields, self.box_field, frame, self.settings.coordinates)):
            return {}, flaw
        return self._columns(fields), None

    def _as_asked(self, item: Any) -> Any:
        """Return an annotation with labels as they are allowed, where case or space is other, and boxes of whole pixels."""
        if self.settings.kind not in ("labels", "boxes"):
            return item
        allowed = _spellings(self)

        def respell(value: Any) -> Any:
            if isinstance(value, str):
                return allowed.get(value.strip().casefold(), value)
            if isinstance(value, list):
                return [respell(one) for one in value]
            return {name: respell(one) for name, one in value.items()} if isinstance(value, dict) else value

        item = respell(item)
        box = item.get(self.box_field) if self.box_field and isinstance(item, dict) else None
        if isinstance(box, list) and _is_in_pixels(box):
            return item | {self.box_field: [round(side) for side in box]}
        return item

    def _columns(self, fields: Any) -> dict[str, Any]:
        if self.settings.kind == "question":
            return tidy_texts({name: fields.get(name) for name in ("question", "answer", "answer_type")})
        value = fields[self.field] if self.field else fields
        if self.settings.kind == "caption":
            return {"text": tidy_caption({"caption": value})["caption"]}
        if self.settings.kind == "labels" and isinstance(value, list):  # to say one twice is no reason to ask again
            value = list(dict.fromkeys(label for label in map(tidy, value) if label))
        return {"record": json.dumps(value, ensure_ascii=False)}

    @property
    def column(self) -> OwnColumn | None:
        """The column of a version that holds the values; None if they join captions or questions."""
        if self.settings.kind in JOINING:
            return None
        kind = arrow_type(self.value)
        is_list = self.rows_field is not None
        return OwnColumn(self.name, pa.list_(kind) if is_list else kind, self.settings.kind, is_list)

    def empty_result(self, *, nulls: bool = False) -> Any:
        """Return a result without content, or with null where it may be, to try the prompts of tasks with that need it."""
        return [] if self.rows_field else empty_value(self.value, nulls=nulls)

    def allowed_texts(self) -> Iterator[str]:
        """Yield the texts that its schema allows by name."""
        parts: list[Any] = [self.whole]
        while parts:
            part = parts.pop()
            if isinstance(part, dict):
                yield from (value for value in part.get("enum", ()) if isinstance(value, str))
                parts += [inner for key, inner in part.items() if key != "enum"]
            elif isinstance(part, list):
                parts += part


@lru_cache(256)
def _spellings(task: OwnTask) -> dict[str, str]:
    """Return the texts that a task allows by name, by how they are in lower case."""
    return {text.casefold(): text for text in task.allowed_texts()}


def _is_in_pixels(box: list[Any]) -> bool:
    """Return whether the sides of a box are numbers, and no fractions of the image."""
    are_numbers = all(isinstance(side, float | int) and not isinstance(side, bool) and isfinite(side) for side in box)
    return bool(box) and are_numbers and max(box) >= 2


def own_columns(tasks: Sequence[OwnTask]) -> list[OwnColumn]:
    """Return the columns that own tasks fill, in their order."""
    return [column for task in tasks if (column := task.column)]


def publishable_task(task: OwnTask) -> dict[str, Any]:
    """Return the settings of a task for a manifest: with the schema of a model in the user's code instead of its name."""
    schema = {"output": task.whole} if task.settings.output else {}
    return task.settings.model_dump(mode="json", exclude_defaults=True) | schema


@lru_cache(256)
def build_task(settings: TaskConfig) -> OwnTask:
    """Return the task of these settings. Raises ConfigError if they do not fit together."""
    try:
        return _build(settings)
    except UnusableSchemaError as error:
        raise ConfigError(
            f"the task {settings.name} cannot be used: {error}", hint="docs/own-tasks.md says what a task may be"
        ) from None


def _build(settings: TaskConfig) -> OwnTask:
    kind = settings.kind
    schema, model = load_output(settings.output) if settings.output else (_usual_output(settings), None)
    if settings.output and settings.labels:
        raise UnusableSchemaError("labels goes with the usual output of labels and boxes; in an output, write an enum")
    whole = without_null(close_schema(schema))
    if whole["type"] != "object":
        raise UnusableSchemaError("output must be an object: replies are JSON objects")
    rows = settings.rows or ({"question": "qa", "boxes": "boxes"}.get(kind) if settings.output is None else None)
    item = whole
    if rows:
        if without_null(whole["properties"].get(rows, _TEXT))["type"] != "array":
            raise UnusableSchemaError(f"output has no list named {rows} (rows)")
        whole = require_field(whole, rows)
        item = without_null(whole["properties"][rows]["items"])
    field = _field_of(settings, item)
    for name in _required_fields(kind, field):  # what a task is about cannot be null
        item = require_field(item, name) if item["type"] == "object" and name in item["properties"] else item
    if rows:
        listed = whole["properties"][rows] | {"items": item}
        whole = whole | {"properties": whole["properties"] | {rows: listed}}
    value = item["properties"][field] if field else item
    box_field = _check_kind(settings, value)
    return OwnTask(
        name=settings.name,
        output=Output,
        row=ROW_MODELS.get(kind, Output),
        rows_field=rows,
        text_field="caption" if kind == "caption" else None,
        card_category=CARD_CATEGORIES.get(kind),
        needs=settings.needs,
        shows_image=settings.show_image,
        max_tokens=settings.max_tokens,
        language=settings.language,
        own_prompt=TEMPLATE.format(prompt=settings.prompt.strip(), name=settings.name),
        settings=settings,
        whole=whole if rows else item,
        item=validator_of(item),
        model=_item_of(model, rows) if model else None,
        field=field,
        value=value,
        box_field=box_field,
    )


def _required_fields(kind: str, field: str | None) -> tuple[str, ...]:
    if kind == "question":
        return ("question", "answer")
    return BOX_FIELDS if kind == "boxes" else (field,) if field else ()


def _usual_output(settings: TaskConfig) -> Schema:
    label: Schema = {"enum": [*settings.labels]} if settings.labels else _TEXT
    if settings.kind == "record":
        raise UnusableSchemaError("a record needs an output: a JSON schema that names its fields")
    if settings.labels and settings.kind not in ("labels", "boxes"):
        raise UnusableSchemaError(f"labels goes with the kinds labels and boxes, not with {settings.kind}")
    corners = {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4}
    return {
        "caption": lambda: _object(caption=_TEXT),
        "text": lambda: _object(text=_TEXT),
        "question": lambda: _object(qa=_list(_object(question=_TEXT, answer=_TEXT), 1)),
        "labels": lambda: _object(labels=_list(label)),
        "boxes": lambda: _object(boxes=_list(_object(bbox_2d=corners, label=label))),
    }[settings.kind]()


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": [*properties]}


def _list(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def _field_of(settings: TaskConfig, item: Schema) -> str | None:
    """Return the field of an annotation that is its text or value: the named one, that of the kind's name, or the only one."""
    item = without_null(item)
    if item["type"] != "object":
        if settings.field or settings.kind not in ("caption", "text", "labels"):
            raise UnusableSchemaError(f"{settings.rows} lists no objects")
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
    raise UnusableSchemaError(f"say which field is the {settings.kind}, as in `field: {next(reversed(names))}`")


def _check_kind(settings: TaskConfig, value: Schema) -> str | None:
    """Return the field of a box, for boxes. Raises UnusableSchemaError if the values do not have the form of the kind."""
    kind, form = settings.kind, value["type"]
    names = value["properties"] if form == "object" else {}
    if kind in ("caption", "text") and form != "string":
        raise UnusableSchemaError(f"a {kind} is a text, and not {_a(form)}")
    if kind == "labels" and (value["items"].get("type") if form == "array" else form) != "string":
        raise UnusableSchemaError("labels are texts, or a list of them")
    if kind == "boxes" and not settings.show_image:
        raise UnusableSchemaError("boxes are drawn on an image: leave out show_image: false")
    if kind == "question":
        forms = {name: without_null(names[name])["type"] for name in ("question", "answer", "answer_type") if name in names}
        if not {"question", "answer"} <= forms.keys() or {*forms.values()} != {"string"}:
            raise UnusableSchemaError("a question has the fields question and answer, which are texts")
    if kind not in JOINING and (settings.name in ROW.names or settings.name == "split"):
        raise UnusableSchemaError(f"a dataset has a column {settings.name} already")
    if kind not in ("caption", "question", "text") and (settings.min_words or settings.max_words):
        raise UnusableSchemaError(f"min_words and max_words are of captions, questions and texts, and not of {kind}")
    if settings.rows and form == "array":
        raise UnusableSchemaError("a row of a list cannot be a list itself")
    return _box_field(settings, names) if kind == "boxes" else None


def _box_field(settings: TaskConfig, names: Schema) -> str:
    corners = [name for name in BOX_FIELDS if name in names]
    box = names[corners[0]] if len(corners) == 1 else {}
    is_box = box.get("type") == "array" and (box.get("minItems"), box.get("maxItems")) == (4, 4)
    if not is_box or (settings.output and not settings.rows):
        raise UnusableSchemaError(f"boxes are rows with one list of four whole numbers named {' or '.join(BOX_FIELDS)}")
    if box["items"].get("type") != "integer":
        raise UnusableSchemaError("the corners of a box are whole numbers: they become pixels")
    return corners[0]


def _a(form: str) -> str:
    return {"array": "a list", "integer": "a number", "object": "an object"}.get(form, f"a {form}")


def _item_of(model: type[BaseModel], rows: str | None) -> TypeAdapter[Any]:
    """Return the user's own check of one annotation: a model, or that of the items of a list in it."""
    if rows is None:
        return TypeAdapter(model)
    field = next(field for name, field in model.model_fields.items() if rows in (name, field.alias))
    options = [field.annotation, *get_args(field.annotation)]  # a list, or a list and None
    listed = next((option for option in options if get_origin(option) in (list, tuple, Sequence)), None)
    if listed is None:
        raise UnusableSchemaError(f"{rows} of {model.__name__} is not a list")
    return TypeAdapter(get_args(listed)[0])


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = [part for part in first["loc"] if isinstance(part, str)]
    return "_".join([*where, _WRONG.get(first["type"], first["type"])]) if where else "off_schema"
