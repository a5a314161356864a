"""Human reviews of texts, stored as JSON lines. A report exports them, and the review step applies them.

A review identifies its text by a digest, so it applies to the same text in every later run.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.dataset.review_tools import AuditVerdict, ErrorKind, read_verdicts_of_tools
from pipeline.digests import digest
from pipeline.errors import ConfigError
from pipeline.storage.files import read_file
from pipeline.storage.untrusted import UnsafeFileError
from pipeline.tables import final_value
from pipeline.tasks import BUILT_IN, Tasks, find_broken_rule
from pipeline.text.pii import redact

Reason = Literal["not_true", "unclear", "trivial", "private", "other"]
REASONS: tuple[Reason, ...] = get_args(Reason)
EDITABLE = ("text", "question", "answer", "evidence_pages", "expression")
MAX_REVIEWS_BYTES = 64_000_000
CONTENT_HEX = 16
# A name is the sample id, and the first CONTENT_HEX digits of the text's digest.
TextName = tuple[str, str]
Annotations = dict[TextName, dict[str, Any]]
T = TypeVar("T", bound="Review | Verdict")


class _NamedText(BaseModel):
    """The base class of reviews and verdicts. (sample_id, content) identifies the text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    content: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{CONTENT_HEX}}}$")]

    @property
    def name(self) -> TextName:
        """The name of the text."""
        return self.sample_id, self.content


class Verdict(_NamedText):
    """The verdict of one reviewer in an audit (dataset/audit.py). `error` is the kind of error.

    A reviewer judges some texts twice. `repeat` marks the second verdict.
    """

    seed: Annotated[int, Field(ge=0)]
    reviewer: Annotated[str, Field(min_length=1, max_length=100)]  # never published
    verdict: AuditVerdict
    error: ErrorKind = "other"  # only of wrong texts
    repeat: bool = False


class Review(_NamedText):
    """A review that a user made in a report. An edit contains the complete new text."""

    verdict: Literal["good", "bad", "edited"]
    reason: Reason | None = None
    note: Annotated[str, Field(max_length=1000)] = ""  # never published
    text: str | None = None
    question: str | None = None
    answer: str | None = None
    evidence_pages: tuple[int, ...] | None = None
    expression: str | None = None

    @field_validator("text", "question", "answer")
    @classmethod
    def _redact(cls, text: str | None) -> str | None:
        return text and redact(text)[0]

    @model_validator(mode="after")
    def _check_fields_of_verdict(self) -> "Review":
        if (self.verdict == "bad") != (self.reason is not None):
            raise ValueError("the verdict `bad` needs a reason, and other verdicts must not have a reason")
        if self.verdict == "edited" and (self.text is None) == (self.question is None or self.answer is None):
            raise ValueError("the verdict `edited` needs a new text, or a new question and answer")
        if self.verdict != "edited" and any(getattr(self, name) is not None for name in EDITABLE):
            raise ValueError("a new text is allowed only with the verdict `edited`")
        return self

    @property
    def resulting_name(self) -> TextName:
        """The name of the text after this review has been applied."""
        return self.name if self.verdict != "edited" else text_name(self.model_dump())


Line = Review | Verdict


def read_stored(path: Path, kind: type[T]) -> list[T]:
    """Read the reviews or the verdicts in a dataset folder. Returns [] if there is no file."""
    return [line for line in read_lines(path) if isinstance(line, kind)] if path.exists() else []


def read_lines(path: Path) -> list[Line]:
    """Read a file of reviews and verdicts, or the JSON that Label Studio or Argilla exported.

    Raises ConfigError with the number of a line that is neither a review nor a verdict.
    """
    try:
        text = read_file(path, MAX_REVIEWS_BYTES).decode("utf-8-sig")
        if text.lstrip().startswith("["):
            text = "\n".join(map(json.dumps, read_verdicts_of_tools(text)))
    except (OSError, ValueError, UnsafeFileError) as error:
        hint = "export the reviews again from the report, Label Studio or Argilla"
        raise ConfigError(f"cannot read {path}: {error}", hint=hint) from None
    lines: list[Line] = []
    # `splitlines` would also split at other line separators, which texts may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        kind = Verdict if '"reviewer":' in line else Review
        try:
            lines += [kind.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            detail = f"{where}: {first['msg']}" if where else first["msg"]
            hint = "use a file exported by a report, which has one review per line"
            raise ConfigError(f"{path}, line {number} is not a review: {detail}", hint=hint) from None
    return lines


def format_lines(lines: Iterable[Line]) -> str:
    """Return reviews or verdicts as JSON lines."""
    return "".join(f"{json.dumps(line.model_dump(mode='json', exclude_defaults=True))}\n" for line in lines)


def merge_lines(lines: Iterable[T]) -> list[T]:
    """Keep the last review of each text, and both verdicts on it by each reviewer in each audit."""
    merged: dict[tuple[object, ...], T] = {}
    for line in lines:
        key = (line.name, line.seed, line.reviewer, line.repeat) if isinstance(line, Verdict) else line.name
        merged.pop(key, None)
        merged[key] = line
    return list(merged.values())


@dataclass(slots=True)
class AppliedReviews:
    """The review of each annotation, by the name of the unedited text, and the reviews that were not applied.

    A later review of a text replaces an earlier one. `pending` has the reviews that match no annotation, and
    `unusable` has the invalid reviews with the reasons.
    """

    by_name: dict[TextName, Review] = field(default_factory=dict)
    pending: list[Review] = field(default_factory=list)
    unusable: list[tuple[Review, str]] = field(default_factory=list)

    @classmethod
    def of(cls, reviews: Iterable[Review], rows: Annotations, tasks: Tasks = BUILT_IN) -> "AppliedReviews":
        """Apply reviews to the annotations of some samples."""
        applied = cls()
        original_names = {name: name for name in rows}
        rejected = set[TextName]()
        for review in reviews:
            name = original_names.get(review.name)
            if name is None:
                applied.pending.append(review)
            elif review.verdict == "good" and review.name != name:
                pass  # the review approves an earlier edit
            elif original_names.get(review.resulting_name, name) not in (name, *rejected):
                applied.unusable.append((review, "another text of this image is the same"))
            elif review.verdict == "edited" and (problem := check_edit(review, rows[name], tasks)):
                applied.unusable.append((review, problem))
            else:
                applied.by_name[name] = review
                (rejected.add if review.verdict == "bad" else rejected.discard)(name)
                original_names[review.resulting_name] = name
        return applied


def check_edit(review: Review, row: dict[str, Any], tasks: Tasks = BUILT_IN) -> str | None:
    """Return why the edit of an annotation (tables.ANNOTATION) is invalid, or None if it is valid."""
    if final_value(row, "record") is not None:
        return "values of a custom task can be reviewed as good or bad, but not edited"
    is_caption = final_value(row, "text") is not None
    if (review.text is None) == is_caption:
        return f"the reviewed text is a {'caption' if is_caption else 'question'}, but the edit is not"
    edited = review.model_dump(mode="json", include=set(EDITABLE), exclude_none=True)
    fields = {name: final_value(row, name) for name in (*EDITABLE, "answer_type")} | edited
    return find_broken_rule(tasks[row["task"]], fields, row["pages"])


def annotation_digest(annotation: dict[str, Any]) -> str:
    """Return the digest of an annotation's final text: a caption, a question with its answer, or a record."""
    values = [final_value(annotation, name) for name in ("text", "question", "answer")]
    if (record := final_value(annotation, "record")) is not None:
        values += [annotation["task"], json.dumps(json.loads(record), sort_keys=True)]
    return digest(values)


def text_name(row: dict[str, Any]) -> TextName:
    """Return the name of an annotation, which depends on its sample and final text."""
    return row["sample_id"], annotation_digest(row)[:CONTENT_HEX]


def record_name(sample_id: str, task: str, value: Any) -> TextName:
    """Return the name of a value of a custom task."""
    return text_name({"sample_id": sample_id, "task": task, "record": json.dumps(value)})
