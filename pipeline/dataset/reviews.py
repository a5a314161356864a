"""Human reviews of texts, stored as JSON lines. A report exports them, and the review step applies them.

A review identifies its text by a digest of the content, so it applies to the same text in every later run.
Verdicts of an audit judge texts that were drawn at random. They change no text.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.dataset.review_tools import read_verdicts_of_tools
from pipeline.digests import annotation_digest
from pipeline.errors import ConfigError
from pipeline.storage.files import read_file
from pipeline.storage.untrusted import UnsafeFileError
from pipeline.tables import final_value
from pipeline.tasks import BUILT_IN, Tasks, find_broken_rule
from pipeline.text.pii import redact

Reason = Literal["not_true", "unclear", "trivial", "private", "other"]
REASONS: tuple[Reason, ...] = get_args(Reason)  # reasons for the verdict "bad"
EDITABLE = ("text", "question", "answer", "evidence_pages", "expression")
MAX_REVIEWS_BYTES = 64_000_000  # about 400,000 reviews
CONTENT_HEX = 16  # hexadecimal digits of a digest, enough to distinguish the texts about one sample
TextName = tuple[str, str]  # (sample_id, first CONTENT_HEX digits of the text's digest)
Annotations = dict[TextName, dict[str, Any]]


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
    """The verdict of one reviewer in an audit (dataset/audit.py). `words` are the wrong words."""

    seed: Annotated[int, Field(ge=0)]
    reviewer: Annotated[str, Field(min_length=1, max_length=100)]  # never published
    verdict: Literal["right", "wrong", "cannot_tell"]
    words: Annotated[tuple[str, ...], Field(max_length=1000)] = ()  # never published


class Review(_NamedText):
    """A review from browsing a report. An edit holds the complete new text."""

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
            raise ValueError("the verdict bad needs a reason, and no other verdict may have one")
        if self.verdict == "edited" and (self.text is None) == (self.question is None or self.answer is None):
            raise ValueError("the verdict edited needs a new text, or a new question and answer")
        if self.verdict != "edited" and any(getattr(self, name) is not None for name in EDITABLE):
            raise ValueError("only the verdict edited may have a new text")
        return self

    @property
    def words(self) -> list[tuple[str, Any]]:
        """The edited fields with their new values."""
        values = {name: getattr(self, name) for name in EDITABLE}
        if self.evidence_pages is not None:
            values["evidence_pages"] = list(self.evidence_pages)
        return [(name, value) for name, value in values.items() if value is not None]

    @property
    def resulting_name(self) -> TextName:
        """The name of the text after this review has been applied."""
        return self.name if self.verdict != "edited" else text_name(self.model_dump())


def read_reviews(path: Path) -> list[Review]:
    """Read the reviews in a file, as `read_lines` does. Returns [] without a file."""
    return [line for line in read_lines(path) if isinstance(line, Review)] if path.exists() else []


def read_verdicts(path: Path) -> list[Verdict]:
    """Read the verdicts of an audit in a file, as `read_lines` does. Returns [] without a file."""
    return [line for line in read_lines(path) if isinstance(line, Verdict)] if path.exists() else []


def read_lines(path: Path) -> list[Review | Verdict]:
    """Read a file of reviews and verdicts, or the JSON that Label Studio or Argilla exported.

    Raises ConfigError with the number of a line that is neither a review nor a verdict.
    """
    try:
        text = read_file(path, MAX_REVIEWS_BYTES).decode("utf-8-sig")
        if text.lstrip().startswith("["):
            text = "\n".join(map(json.dumps, read_verdicts_of_tools(text)))
    except (OSError, ValueError, UnsafeFileError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="export reviews from `synth report`") from None
    lines: list[Review | Verdict] = []
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


def format_lines(lines: Iterable[Review | Verdict]) -> str:
    """Return reviews or verdicts as JSON lines."""
    return "".join(f"{json.dumps(line.model_dump(mode='json', exclude_defaults=True))}\n" for line in lines)


def merge_verdicts(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Keep the last verdict per text, reviewer and seed. Seeds are in the order of their last verdicts."""
    merged: dict[tuple[int, TextName, str], Verdict] = {}
    seeds: dict[int, None] = {}
    for verdict in verdicts:
        merged[verdict.seed, verdict.name, verdict.reviewer] = verdict
        seeds.pop(verdict.seed, None)
        seeds[verdict.seed] = None
    return [merged[key] for seed in seeds for key in sorted(merged) if key[0] == seed]


def merge_reviews(
    before: Iterable[Review], new: Iterable[Review], rows: Annotations
) -> dict[TextName, Review]:
    """Return all reviews by text name, sorted. A later review of a text replaces an earlier one.

    A review of an edited text is stored under the name of the original text, so no review depends on another
    one. `rows` has the annotations before the review step, by name.
    """
    merged = {review.name: review for review in before}
    edits = [review for review in merged.values() if review.verdict == "edited"]
    # If an edit results in the text of another annotation, later reviews refer to the other annotation.
    is_unique = [edit.resulting_name == edit.name or edit.resulting_name not in rows for edit in edits]
    original_names = {e.resulting_name: e.name for e, unique in zip(edits, is_unique, strict=True) if unique}
    for review in new:
        if review.verdict == "good" and review.name in original_names:
            continue  # approves the edit, which is kept
        name = original_names.get(review.name, review.name)
        renamed = review.model_copy(update={"sample_id": name[0], "content": name[1]})
        is_edit = name in rows and review.verdict == "edited"
        if is_edit and all(value == final_value(rows[name], key) for key, value in renamed.words):
            renamed = Review(sample_id=name[0], content=name[1], verdict="good")
        merged[name] = renamed
    return dict(sorted(merged.items()))


def check_edits(
    reviews: dict[TextName, Review], rows: Annotations, tasks: Tasks = BUILT_IN
) -> dict[TextName, str]:
    """Return the problems of edited texts by name: a broken rule of the task, or a repeated text."""
    edits = {name: review for name, review in reviews.items() if review.verdict == "edited" and name in rows}
    flaws = {name: flaw for name, review in edits.items() if (flaw := check_edit(review, rows[name], tasks))}
    kept = (name for name in rows if name not in reviews or reviews[name].verdict != "bad")
    counts = Counter(edits[name].resulting_name if name in edits else name for name in kept)
    repeated = [name for name, review in edits.items() if counts[review.resulting_name] > 1]
    return flaws | dict.fromkeys(repeated, "another text of this image is the same")


def check_edit(review: Review, row: dict[str, Any], tasks: Tasks = BUILT_IN) -> str | None:
    """Return the problem of an annotation (tables.ANNOTATION) after an edit, or None."""
    if final_value(row, "record") is not None:
        return "values of a custom task can be reviewed as good or bad, but not edited"
    is_caption = final_value(row, "text") is not None
    if (review.text is None) == is_caption:
        return f"the reviewed text is a {'caption' if is_caption else 'question'}, but the edit is not"
    fields = {name: final_value(row, name) for name in (*EDITABLE, "answer_type")} | dict(review.words)
    return find_broken_rule(tasks[row["task"]], fields, row["pages"])


def text_name(row: dict[str, Any]) -> TextName:
    """Return the name of an annotation, which depends on its sample and final text."""
    return row["sample_id"], annotation_digest(row)[:CONTENT_HEX]


def record_name(sample_id: str, task: str, value: Any) -> TextName:
    """Return the name of a value of a custom task."""
    return text_name({"sample_id": sample_id, "task": task, "record": json.dumps(value)})
