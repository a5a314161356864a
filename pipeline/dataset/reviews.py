"""Marks: what a person said of texts in a report. Files of JSON lines, a mark a line, applied by the stage review.

A mark names a text by what it says, not by where it lies: it fits the same words in every later run, and no others.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.digests import annotation_digest
from pipeline.errors import ConfigError
from pipeline.tables import final_value
from pipeline.tasks import broken_rule

Reason = Literal["not_true", "unclear", "trivial", "private", "other"]
REASONS: tuple[Reason, ...] = get_args(Reason)  # why a text is bad
EDITABLE = ("text", "question", "answer", "evidence_pages", "expression")
CONTENT_HEX = 16  # of the digest of a text: enough to tell apart what is said of one sample
TextName = tuple[str, str]  # of a text: its sample, and the start of the digest of its words


class Review(BaseModel):
    """What one person said of one text, which is named as `text_name` does. An edit holds all that the text is to say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    content: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{CONTENT_HEX}}}$")]
    mark: Literal["good", "bad", "edited"]
    reason: Reason | None = None
    note: Annotated[str, Field(max_length=1000)] = ""  # stays here: it is published nowhere
    text: str | None = None
    question: str | None = None
    answer: str | None = None
    evidence_pages: tuple[int, ...] | None = None
    expression: str | None = None

    @model_validator(mode="after")
    def _says_what_it_must(self) -> "Review":
        if (self.mark == "bad") != (self.reason is not None):
            raise ValueError("a reason goes with bad, and with nothing else")
        if self.mark == "edited" and (self.text is None) == (self.question is None or self.answer is None):
            raise ValueError("edited goes with new words: a text, or a question and its answer")
        if self.mark != "edited" and any(getattr(self, name) is not None for name in EDITABLE):
            raise ValueError("new words go with edited, and with nothing else")
        return self

    @property
    def name(self) -> TextName:
        """The text that this is about."""
        return self.sample_id, self.content

    @property
    def words(self) -> list[tuple[str, Any]]:
        """The fields that an edit gives, with what they are to be."""
        given = ((name, getattr(self, name)) for name in EDITABLE)
        return [(name, list(value) if isinstance(value, tuple) else value) for name, value in given if value is not None]

    @property
    def makes(self) -> TextName:
        """The text that is there once this was applied."""
        if self.mark != "edited":
            return self.name
        return text_name({"sample_id": self.sample_id, "text": self.text, "question": self.question, "answer": self.answer})


def read_reviews(path: Path) -> list[Review]:
    """Read a file of marks. Raises ConfigError, with the number of the line, where it is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # and at no other sign that may end a line: texts hold those
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="export marks from a report: `synth report`") from None
    marks = []
    for number, line in enumerate(lines, start=1):
        try:
            marks += [Review.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"{path}, line {number} is no mark: {f'{where}: ' if where else ''}{first['msg']}",
                hint="each line is one mark as a report exports it",
            ) from None
    return marks


def format_reviews(marks: Iterable[Review]) -> str:
    """Return marks as a file holds them, in one order."""
    ordered = sorted(marks, key=lambda mark: mark.name)
    return "".join(f"{json.dumps(mark.model_dump(exclude_defaults=True))}\n" for mark in ordered)


def merge_reviews(
    before: Iterable[Review], new: Iterable[Review], rows: dict[TextName, dict[str, Any]]
) -> dict[TextName, Review]:
    """Return all marks by the text that they are about; the last word on a text is the one that counts.

    A mark of words that an edit of `before` has made is the last word on the text that was edited: it goes back to what the
    model wrote, so that marks never have to be applied in a row. All of `new` are about what is there now.

    Args:
        before: marks that are applied.
        new: marks that people made since.
        rows: the annotations before the review, by name.
    """
    known = {mark.name: mark for mark in before}
    edited = {mark.makes: mark.name for mark in known.values() if mark.mark == "edited"}
    edited = {made: name for made, name in edited.items() if made == name or made not in rows}
    for mark in new:
        name = edited.get(mark.name, mark.name)
        if mark.mark == "good" and mark.name in edited:
            continue  # the edit is, and stays
        again = mark.model_copy(update={"sample_id": name[0], "content": name[1]})
        undone = (
            name in rows and mark.mark == "edited" and all(value == final_value(rows[name], key) for key, value in again.words)
        )
        known[name] = Review(sample_id=name[0], content=name[1], mark="good") if undone else again
    return known


def check_edits(marks: dict[TextName, Review], rows: dict[TextName, dict[str, Any]]) -> dict[TextName, str]:
    """Return what is wrong with edits of texts that are there: a rule of the task is broken, or another text says the same."""
    edits = {name: mark for name, mark in marks.items() if mark.mark == "edited" and name in rows}
    wrong = {name: why for name, mark in edits.items() if (why := check_edit(mark, rows[name]))}
    said = Counter(
        marks[name].makes if name in edits else name for name in rows if name not in marks or marks[name].mark != "bad"
    )
    return wrong | {name: "another text of this image says the same" for name, mark in edits.items() if said[mark.makes] > 1}


def check_edit(mark: Review, row: dict[str, Any]) -> str | None:
    """Return what is wrong with an annotation (tables.ANNOTATION) once an edit is applied; None if nothing is."""
    is_caption = final_value(row, "text") is not None
    if (mark.text is None) == is_caption:
        return f"it is about a {'caption' if is_caption else 'question'}, and its new words are of another kind"
    words = {name: final_value(row, name) for name in (*EDITABLE, "answer_type")} | dict(mark.words)
    return broken_rule(row["task"], words, row["pages"])


def text_name(row: dict[str, Any]) -> TextName:
    """Return what a mark calls an annotation, by what it says now."""
    return row["sample_id"], annotation_digest(row)[:CONTENT_HEX]
