"""Reviews: any file of reviews is read or gives one error."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.dataset.reviews import MAX_REVIEWS_BYTES, Review, read_lines, read_stored
from pipeline.errors import ConfigError
from pipeline.text.pii import redact
from tests.hostile import bounded_memory
from tests.hostile.vectors import ALL

GOOD = {"sample_id": "a" * 64, "content": "b" * 16, "verdict": "good"}
EDITED = GOOD | {"verdict": "edited"}
VERDICT = GOOD | {"verdict": "right", "reviewer": "a", "seed": 0}


def lines(*values: object) -> bytes:
    return "".join(f"{json.dumps(value)}\n" for value in values).encode()


BAD: dict[str, bytes] = {
    "unclosed object": b"{",
    "list": b"[1]\n",
    "task without annotations": b'[{"data": {"id": "0-a-b"}}]',
    "null": b"null\n",
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "bytes that are not UTF-8": b"\xff\xfe\n",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep note": lines(GOOD | {"note": "x"})[:-4] + b"[" * 50_000,
    "path as sample": lines(GOOD | {"sample_id": "../../etc/passwd"}),
    "sample of a megabyte": lines(GOOD | {"sample_id": "a" * 1_000_000}),
    "sample with a line break": lines(GOOD | {"sample_id": "a" * 64 + "\n"}),
    "content of other letters": lines(GOOD | {"content": "z" * 16}),
    "note of a megabyte": lines(GOOD | {"note": "x" * 1_000_000}),
    "edit of everything": lines(EDITED | {"text": "x", "question": "y", "answer": "z"}),
    "edit that is a number": lines(EDITED | {"text": 10**400}),
    "pages that are texts": lines(EDITED | {"question": "x", "answer": "y", "evidence_pages": ["x"]}),
    "half a surrogate pair": lines(GOOD | {"verdict": "\ud800"}),
    "verdict without a seed": lines(GOOD | {"verdict": "right", "reviewer": "a"}),
    "verdict of a reviewer with a long name": lines(VERDICT | {"reviewer": "x" * 1_000_000}),
    "truncated last line": lines(GOOD) + b'{"sample_id": "',
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_review_gives_error_with_its_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "reviews.jsonl").write_bytes(BAD[name])
    refusal = r"line \d+ is not a review|cannot read"
    with bounded_memory(300_000_000), pytest.raises(ConfigError, match=refusal):
        read_lines(tmp_path / "reviews.jsonl")


def too_large(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_REVIEWS_BYTES + 1)


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), too_large]
)
def test_irregular_or_too_large_review_file_is_refused(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / "reviews.jsonl")
    with pytest.raises(ConfigError, match="cannot read"):
        read_lines(tmp_path / "reviews.jsonl")


def test_review_notes_are_read_unchanged_and_personal_data_in_edits_is_redacted(tmp_path: Path) -> None:
    texts = [vector for vector in ALL if vector.isprintable()]
    reviews = [EDITED | {"text": text, "note": text} for text in texts]
    (tmp_path / "reviews.jsonl").write_bytes(lines(*reviews))
    read_back = [(review.text, review.note) for review in read_stored(tmp_path / "reviews.jsonl", Review)]
    assert read_back == [(redact(text)[0], text) for text in texts]
