"""Columns of tables: mapping and guesses."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.files import resolve
from pipeline.errors import SourceError
from pipeline.sources import open_source
from pipeline.sources.tables import read_mapping
from pipeline.types import Rejected, Sample
from tests.hub.datasets import photo
from tests.scene_data import make_version, pulled, scene_samples, true_captions


@pytest.mark.parametrize(
    ("columns", "image", "problem"),
    [
        ({"img": b"", "sha": b""}, "img", ""),
        ({"image2": b"", "image": b""}, "image", ""),
        (
            {"img": b"", "img_2": b""},
            "",
            "several columns contain images: img, img_2 .* --columns image=COLUMN",
        ),
        ({"sha": b""}, "", "no column contains images .* --columns image=COLUMN"),
        ({"url": "a.jpg"}, "", "no column contains images .* if url names the images: .* folder:PATH"),
    ],
)
def test_image_column_is_guessed(columns: dict[str, Any], image: str, problem: str) -> None:
    schema = pa.table({name: [value] for name, value in columns.items()}).schema
    if image:
        assert read_mapping(schema, {})["image"] == [image]
    else:
        with pytest.raises(SourceError) as caught:
            read_mapping(schema, {})
        assert re.search(problem, f"{caught.value} {caught.value.hint}")


SENTENCES = [[{"raw": "A dog runs.", "tokens": ["a"]}, {"raw": "A brown dog."}]]


@pytest.mark.parametrize("columns", [{}, {"references": "sentences"}])
def test_captions_in_objects_are_read(columns: dict[str, str], tmp_path: Path) -> None:
    table = {"image": [photo(1)], "sentences": SENTENCES, "split": ["TEST "]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (row,) = open_source(resolve(source=f"parquet:{tmp_path}/a.parquet", columns=columns)).rows
    assert isinstance(row, Sample)
    assert (row.references, row.split) == (("A dog runs.", "A brown dog."), "test")


def first_row(tmp_path: Path, table: dict[str, Any], **columns: str) -> Sample:
    pq.write_table(pa.table({"image": [photo(1)], **table}), tmp_path / "a.parquet")
    row = next(open_source(resolve(source=f"parquet:{tmp_path}/a.parquet", columns=columns)).rows)
    assert isinstance(row, Sample)
    return row


def test_star_pairs_question_and_answer_columns(tmp_path: Path) -> None:
    table = {"q1": ["What runs?"], "q2": ["Is it brown?"], "a1": ["a dog"], "a2": [None]}
    asked = first_row(tmp_path, table, question="q*", answer="a*").reference_qa
    assert [(one.question, one.answers) for one in asked or ()] == [("What runs?", ("a dog",))]
    with pytest.raises(SourceError, match=r"columns found: question 2, answer 1"):
        first_row(tmp_path, {name: table[name] for name in ("q1", "q2", "a1")}, question="q*", answer="a*")


@pytest.mark.parametrize("answers", ["answer", "answers"])
def test_question_columns_are_guessed_by_name(tmp_path: Path, answers: str) -> None:
    table = {"question": ["What runs?"], answers: [["a dog", "dog"]]}
    (asked,) = first_row(tmp_path, table).reference_qa or ()
    assert (asked.question, asked.answers) == ("What runs?", ("a dog", "dog"))
    assert not first_row(tmp_path, {"question": [7], answers: ["a dog"]}).reference_qa


@pytest.mark.parametrize(
    "table",
    [
        {"question": [["What?", "Where?"]], "answer": ["a dog"]},
        {"question": ["Which is it?"], "choices": [["a dog", "a cat"]], "answer": ["A"]},
        {"question": [7], "answer": ["a dog"]},
    ],
)
def test_mismatched_question_columns_are_ignored(tmp_path: Path, table: dict[str, Any]) -> None:
    assert not first_row(tmp_path, table).reference_qa


def test_question_none_disables_the_guess(tmp_path: Path) -> None:
    table = {"question": ["What runs?"], "answer": ["a dog"]}
    assert first_row(tmp_path, table).reference_qa
    assert not first_row(tmp_path, table, question="none").reference_qa


def test_lists_in_cells_are_parsed(tmp_path: Path) -> None:
    table = {
        "caption": ['["A dog runs.", "A brown dog."]'],
        "question": ["What?"],
        "answer": ["['dog', 'dog', 'cat']"],
    }
    row = first_row(tmp_path, table)
    assert row.references == ("A dog runs.", "A brown dog.")
    assert row.reference_qa and row.reference_qa[0].answers == ("dog", "dog", "cat")


def test_context_values_are_texts_and_unpaired_answers_reject_their_row(tmp_path: Path) -> None:
    table = {"tags": [["a", "b"]], "stock": [3], "q": [["What?", "Where?"]], "a": [["a dog"]]}
    assert first_row(tmp_path, table, context="tags,stock").context == (("tags", "a, b"), ("stock", "3"))
    columns = {"question": "q", "answer": "a"}
    (row,) = open_source(resolve(source=f"parquet:{tmp_path}/a.parquet", columns=columns)).rows
    assert isinstance(row, Rejected) and row.reason == "unpaired_answers"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"references": "stars"}, "the column stars contains int64, not captions"),
        ({"image": "url"}, "the column url contains string, not images"),
        ({"pages": "urls"}, "the column urls contains list<.*string>, not images"),
    ],
)
def test_mapped_column_of_another_type_is_refused(columns: dict[str, str], problem: str) -> None:
    schema = pa.table({"image": [b""], "stars": [5], "url": ["a.jpg"], "urls": [["a.jpg"]]}).schema
    with pytest.raises(SourceError, match=problem):
        read_mapping(schema, columns)


@pytest.mark.parametrize("value", [{"x": 1}, b"x", [b"x"], [["x"]], [{"x": "y"}]])
def test_context_column_without_texts_is_refused(tmp_path: Path, value: object) -> None:
    pq.write_table(pa.table({"image": [photo(1)], "facts": [value]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"the column facts contains .* which prompts cannot use"):
        open_source(resolve(source=f"parquet:{tmp_path}/a.parquet", columns={"context": "facts"}))


def test_version_table_yields_only_human_captions(tmp_path: Path) -> None:
    samples = [replace(sample, references=("A ring of people.",)) for sample in scene_samples(6)]
    stored, _ = make_version(tmp_path / "d", samples, true_captions(samples))
    with pytest.raises(SourceError, match="whose images are stored elsewhere") as raised:
        open_source(resolve(source=f"parquet:{stored.path}"))
    assert "--format parquet" in raised.value.hint
    version = pulled(stored, tmp_path / "home" / "x")
    rows = open_source(resolve(source=f"parquet:{version.path}")).rows
    assert {row.references for row in rows if isinstance(row, Sample)} == {("A ring of people.",)}


def test_all_arrow_string_types_are_text(tmp_path: Path) -> None:
    """polars writes large_string: an ignored split column would put test rows into training."""
    values = {"caption": "A bowl.", "split": "test"}
    texts = {name: pa.array([value], pa.large_string()) for name, value in values.items()}
    row = first_row(tmp_path, texts)
    assert (row.split, row.references) == ("test", ("A bowl.",))


def test_split_column_is_case_insensitive(tmp_path: Path) -> None:
    words = ["Train", " TEST", "train ", None, "Val", "TRAIN"]
    images = [{"bytes": photo(number), "path": None} for number in range(len(words))]
    pq.write_table(pa.table({"image": images, "part": words}), tmp_path / "a.parquet")
    config = resolve(source=f"parquet:{tmp_path}/a.parquet", source_split="train", columns={"split": "part"})
    source = open_source(config)
    names = [row.source_row for row in source.rows]
    assert source.count() == len(names) == 3
    assert all([row.source_row for row in source.read(n)] == names[n:] for n in range(4))


def test_row_without_a_split_has_no_split(tmp_path: Path) -> None:
    words = ["train", None, "", " ", "test"]
    images = [photo(number) for number in range(len(words))]
    table = pa.table({"image": images, "split": pa.array(words, pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = list(open_source(resolve(source=f"parquet:{tmp_path}/a.parquet")).rows)
    assert [row.split for row in rows if isinstance(row, Sample)] == ["train", None, None, None, "test"]


def test_split_none_ignores_the_split_column(tmp_path: Path) -> None:
    table = {"image": [photo(1), photo(2)], "split": ["fold0", "fold1"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    source = f"parquet:{tmp_path}/a.parquet"
    refused = list(open_source(resolve(source=source)).rows)
    assert [row.reason for row in refused if isinstance(row, Rejected)] == ["unknown_split"] * 2
    assert "'fold0' in the column split is not a split: train" in str(refused[0])
    rows = list(open_source(resolve(source=source, columns={"split": "none"})).rows)
    assert [row.split for row in rows if isinstance(row, Sample)] == [None, None]
