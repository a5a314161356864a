"""Reviews of texts, made in a report: files of JSON lines, one review a line, applied by the step review.

A review names a text by a digest of its content: it applies to the same text in every later run, and to no other.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.digests import annotation_digest
from pipeline.errors import ConfigError
from pipeline.storage.files import read_file
from pipeline.storage.untrusted import UnsafeFileError
from pipeline.tables import final_value
from pipeline.tasks import BUILT_IN, Tasks, find_broken_rule
from pipeline.text.pii import redact

Reason = Literal["not_true", "unclear", "trivial", "private", "other"]
REASONS: tuple[Reason, ...] = get_args(Reason)  # why a text is bad
EDITABLE = ("text", "question", "answer", "evidence_pages", "expression")
MAX_REVIEWS_BYTES = 64_000_000  # of a file: some 400,000 reviews
CONTENT_HEX = 16  # digits of the digest of a text: enough to tell the texts of one sample apart
TextName = tuple[str, str]  # (sample_id, first CONTENT_HEX digits of the text's digest)
Annotations = dict[TextName, dict[str, Any]]


class Review(BaseModel):
    """One person's review of one text, which is named as by `text_name`. An edit holds the whole new text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    content: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{CONTENT_HEX}}}$")]
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
    def _without_personal_data(cls, words: str | None) -> str | None:
        return words and redact(words)[0]  # as in all other texts

    @model_validator(mode="after")
    def _says_what_it_must(self) -> "Review":
        if (self.verdict == "bad") != (self.reason is not None):
            raise ValueError("a reason goes with bad, and with nothing else")
        if self.verdict == "edited" and (self.text is None) == (self.question is None or self.answer is None):
            raise ValueError("edited goes with new words: a text, or a question and its answer")
        if self.verdict != "edited" and any(getattr(self, name) is not None for name in EDITABLE):
            raise ValueError("new words go with edited, and with nothing else")
        return self

    @property
    def name(self) -> TextName:
        """The name of the reviewed text."""
        return self.sample_id, self.content

    @property
    def words(self) -> list[tuple[str, Any]]:
        """The fields that an edit sets, with their new values."""
        given = ((name, getattr(self, name)) for name in EDITABLE)
        return [(name, list(value) if isinstance(value, tuple) else value) for name, value in given if value is not None]

    @property
    def resulting_name(self) -> TextName:
        """The name of the text after the review is applied."""
        if self.verdict != "edited":
            return self.name
        return text_name({"sample_id": self.sample_id, "text": self.text, "question": self.question, "answer": self.answer})


def read_reviews(path: Path) -> list[Review]:
    """Read a file of reviews. Raises ConfigError, with the line number, if a line is not a review."""
    try:
        text = read_file(path, MAX_REVIEWS_BYTES).decode("utf-8-sig")
        lines = text.split("\n")  # not splitlines(): texts may hold other line separators
    except (OSError, UnicodeDecodeError, UnsafeFileError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="export reviews from a report: `synth report`") from None
    reviews = []
    for number, line in enumerate(lines, start=1):
        try:
            reviews += [Review.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            problem = f"{path}, line {number} is not a review: {f'{where}: ' if where else ''}{first['msg']}"
            raise ConfigError(problem, hint="each line is one review as a report exports it") from None
    return reviews


def format_reviews(reviews: Iterable[Review]) -> str:
    """Return reviews as JSON lines, sorted by name."""
    ordered = sorted(reviews, key=lambda review: review.name)
    return "".join(f"{json.dumps(review.model_dump(exclude_defaults=True))}\n" for review in ordered)


def merge_reviews(before: Iterable[Review], new: Iterable[Review], rows: Annotations) -> dict[TextName, Review]:
    """Return all reviews by the name of their text; the last review of a text replaces earlier ones.

    A review of a text that an edit of `before` has written is stored under the name of the model's text, so that reviews
    never have to be applied in sequence. All of `new` are about the texts as they are now; `rows` are the annotations before
    the step review, by name.
    """
    merged = {review.name: review for review in before}
    edited = {review.resulting_name: review.name for review in merged.values() if review.verdict == "edited"}
    edited = {made: name for made, name in edited.items() if made == name or made not in rows}
    for review in new:
        name = edited.get(review.name, review.name)
        if review.verdict == "good" and review.name in edited:
            continue  # it approves the edit, which stays
        renamed = review.model_copy(update={"sample_id": name[0], "content": name[1]})
        is_edit = name in rows and review.verdict == "edited"
        undone = is_edit and all(value == final_value(rows[name], key) for key, value in renamed.words)
        merged[name] = Review(sample_id=name[0], content=name[1], verdict="good") if undone else renamed
    return merged


def check_edits(reviews: dict[TextName, Review], rows: Annotations, tasks: Tasks = BUILT_IN) -> dict[TextName, str]:
    """Return the flaws of edits of existing texts: a rule of the task is broken, or another text says the same."""
    edits = {name: review for name, review in reviews.items() if review.verdict == "edited" and name in rows}
    flaws = {name: flaw for name, review in edits.items() if (flaw := check_edit(review, rows[name], tasks))}
    kept = (name for name in rows if name not in reviews or reviews[name].verdict != "bad")
    counts = Counter(edits[name].resulting_name if name in edits else name for name in kept)
    repeated = [name for name, review in edits.items() if counts[review.resulting_name] > 1]
    return flaws | dict.fromkeys(repeated, "another text of this image says the same")


def check_edit(review: Review, row: dict[str, Any], tasks: Tasks = BUILT_IN) -> str | None:
    """Return the flaw of an annotation (tables.ANNOTATION) after an edit, or None."""
    if final_value(row, "record") is not None:
        return "the values of a task of one's own can be reviewed as good or bad, and not edited"
    is_caption = final_value(row, "text") is not None
    if (review.text is None) == is_caption:
        return f"it is about a {'caption' if is_caption else 'question'}, and its new words are of another kind"
    fields = {name: final_value(row, name) for name in (*EDITABLE, "answer_type")} | dict(review.words)
    return find_broken_rule(tasks[row["task"]], fields, row["pages"])


def text_name(row: dict[str, Any]) -> TextName:
    """Return the name of an annotation in reviews, by its final text."""
    return row["sample_id"], annotation_digest(row)[:CONTENT_HEX]
