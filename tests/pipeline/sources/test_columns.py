"""Columns of tables: mapping and guesses."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, SourceError
from pipeline.sources.tables import read_mapping
from pipeline.types import ReferenceQA, Sample, Source
from tests.hub.datasets import photo
from tests.pipeline.sources.reading import open_path, rejected_of, samples_of
from tests.scene_data import make_version, pulled, scene_samples, true_captions


@pytest.mark.parametrize(
    ("columns", "image", "problem"),
    [
        ({"img": b"", "sha": b""}, "img", ""),
        ({"image2": b"", "image": b""}, "image", ""),
        ({"img": b"", "img_2": b""}, "", "several columns contain images: img, img_2 .* --columns image="),
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


def open_table(folder: Path, table: dict[str, Any], only_split: str | None = None, **columns: str) -> Source:
    """Write a table with an image in each row, and open it."""
    count = len(next(iter(table.values())))
    pq.write_table(pa.table({"image": [*map(photo, range(count))], **table}), folder / "a.parquet")
    return open_path("parquet", folder / "a.parquet", columns=columns, source_split=only_split)


def first_row(tmp_path: Path, table: dict[str, Any], **columns: str) -> Sample:
    row = next(open_table(tmp_path, table, **columns).rows)
    assert isinstance(row, Sample)
    return row


@pytest.mark.parametrize("columns", [{}, {"references": "sentences"}])
def test_captions_in_objects_are_read(columns: dict[str, str], tmp_path: Path) -> None:
    sentences = [[{"raw": "A dog runs.", "tokens": ["a"]}, {"raw": "A brown dog."}]]
    row = first_row(tmp_path, {"sentences": sentences, "split": ["TEST "]}, **columns)
    assert (row.references, row.split) == (("A dog runs.", "A brown dog."), "test")


def test_star_in_a_mapping_pairs_question_and_answer_columns(tmp_path: Path) -> None:
    table = {"q1": ["What runs?"], "q2": ["Is it brown?"], "a1": ["a dog"], "a2": [None]}
    asked = first_row(tmp_path, table, question="q*", answer="a*").reference_qa
    assert [(one.question, one.answers) for one in asked or ()] == [("What runs?", ("a dog",))]
    with pytest.raises(SourceError, match="2 question columns, but 1 answer columns"):
        first_row(tmp_path, {name: table[name] for name in ("q1", "q2", "a1")}, question="q*", answer="a*")


@pytest.mark.parametrize("answers", ["answer", "answers"])
def test_question_columns_are_guessed_by_name(tmp_path: Path, answers: str) -> None:
    table = {"question": ["What runs?"], answers: [["a dog", "dog"]]}
    (asked,) = first_row(tmp_path, table).reference_qa or ()
    assert (asked.question, asked.answers) == ("What runs?", ("a dog", "dog"))


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ({"question": [["What?", "Where?"]], "answer": ["a dog"]}, {}),
        ({"question": ["Which is it?"], "choices": [["a dog", "a cat"]], "answer": ["A"]}, {}),
        ({"question": [7], "answer": ["a dog"]}, {}),
        ({"question": ["What runs?"], "answer": ["a dog"]}, {"question": "none"}),
    ],
)
def test_mismatched_or_disabled_question_columns_are_ignored(
    tmp_path: Path, table: dict[str, Any], columns: dict[str, str]
) -> None:
    assert not first_row(tmp_path, table, **columns).reference_qa


def test_lists_in_cells_are_parsed(tmp_path: Path) -> None:
    caption, answer = '["A dog runs.", "A brown dog."]', "['dog', 'dog', 'cat']"
    row = first_row(tmp_path, {"caption": [caption], "question": ["What?"], "answer": [answer]})
    assert row.references == ("A dog runs.", "A brown dog.")
    assert row.reference_qa and row.reference_qa[0].answers == ("dog", "dog", "cat")


def test_lists_and_numbers_of_a_table_become_context(tmp_path: Path) -> None:
    table = {"title": ["Lamp"], "tags": [["a", "b"]], "sizes": [[7, 8]], "stock": [7]}
    row = first_row(tmp_path, table, context="title,tags,sizes,stock")
    assert dict(row.context) == {"title": "Lamp", "tags": "a, b", "sizes": "7, 8", "stock": "7"}


@pytest.mark.parametrize(
    ("role", "column", "value", "problem"),
    [
        ("references", "fact1", 5, "the column fact1 contains int64, not captions"),
        *(
            ("context", "fact1", value, "the column fact1 contains .* which prompts cannot use")
            for value in ({"x": 1}, b"x", [b"x"], [["x"]], [{"x": "y"}])
        ),
        ("image", "foto", 5, "no column is named foto"),
        ("image", "fact1", "a.jpg", "the column fact1 contains string, not images"),
        ("pages", "fact1", ["a.jpg"], "the column fact1 contains list<.*string>, not images"),
        ("colour", "fact1", 5, "--columns does not support the role colour"),
        ("split", "fact*", 5, "several columns match the role split: fact1, fact2"),
    ],
)
def test_bad_mapping_is_refused(tmp_path: Path, role: str, column: str, value: object, problem: str) -> None:
    with pytest.raises(SourceError, match=problem):
        open_table(tmp_path, {"fact1": [value], "fact2": [value]}, **{role: column})


def test_map_column_is_refused_as_context(tmp_path: Path) -> None:
    facts = pa.array([[("color", "red")]], pa.map_(pa.string(), pa.string()))
    with pytest.raises(SourceError, match=r"contains map<.*>, which prompts cannot use"):
        open_table(tmp_path, {"facts": facts}, context="facts")


@pytest.mark.parametrize(
    ("role", "count", "reason"), [("pages", 21, "too_many_pages"), ("image", 2, "several_images")]
)
def test_row_with_too_many_images_is_rejected(tmp_path: Path, role: str, count: int, reason: str) -> None:
    photos = [[{"bytes": photo(1), "path": None}] * count]
    source = open_table(tmp_path, {"photos": photos}, **{role: "photos"})
    assert [row.reason for row in rejected_of(source)] == [reason]


def test_row_with_unpaired_questions_is_rejected(tmp_path: Path) -> None:
    table = {"q": [["What?", "Where?"]], "a": [["a dog"]]}
    source = open_table(tmp_path, table, question="q", answer="a")
    assert [row.reason for row in rejected_of(source)] == ["unpaired_answers"]


def test_column_of_image_lists_is_read_as_decks_unless_it_is_mapped(tmp_path: Path) -> None:
    photos = {"images": [[{"bytes": photo(n), "path": None}] for n in range(2)]}
    pq.write_table(pa.table(photos), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="consists of decks of pages") as caught:
        open_path("parquet", tmp_path / "a.parquet", tasks=["caption"])
    assert "--columns image=COLUMN" in caught.value.hint
    mapped = open_path("parquet", tmp_path / "a.parquet", tasks=["caption"], columns={"image": "images"})
    assert len(samples_of(mapped)) == 2


def test_version_table_yields_only_human_captions(tmp_path: Path) -> None:
    asked = (ReferenceQA(question="Who stands there?", answers=("people", "men")),)
    human: dict[str, Any] = {"references": ("A ring of people.",), "reference_qa": asked}
    samples = [replace(sample, **human) for sample in scene_samples(6)]
    stored, _ = make_version(tmp_path / "d", samples, true_captions(samples))
    with pytest.raises(SourceError, match="whose images are stored elsewhere") as raised:
        open_path("parquet", stored.path)
    assert "--format parquet" in raised.value.hint
    rows = samples_of(open_path("parquet", pulled(stored, tmp_path / "home" / "x").path))
    assert {(row.references, row.reference_qa) for row in rows} == {(("A ring of people.",), asked)}


def test_all_arrow_string_types_are_text(tmp_path: Path) -> None:
    """polars writes large_string. If it were ignored, test rows would be used for training."""
    values = {"caption": "A bowl.", "split": "test"}
    texts = {name: pa.array([value], pa.large_string()) for name, value in values.items()}
    row = first_row(tmp_path, texts)
    assert (row.split, row.references) == ("test", ("A bowl.",))


def test_split_column_is_case_insensitive(tmp_path: Path) -> None:
    words = ["Train", " TEST", "train ", None, "Val", "TRAIN"]
    source = open_table(tmp_path, {"part": words}, "train", split="part")
    names = [row.source_row for row in source.rows]
    assert source.count() == len(names) == 3
    assert all([row.source_row for row in source.read(n)] == names[n:] for n in range(4))


def test_row_without_a_split_has_no_split(tmp_path: Path) -> None:
    source = open_table(tmp_path, {"split": ["train", None, "", " ", "test"]})
    assert [row.split for row in samples_of(source)] == ["train", None, None, None, "test"]


def test_split_none_ignores_the_split_column(tmp_path: Path) -> None:
    table = {"split": ["fold0", "fold1"]}
    refused = rejected_of(open_table(tmp_path, table))
    assert [row.reason for row in refused] == ["unknown_split"] * 2
    assert "'fold0' in the column split is not a split (train" in str(refused[0])
    assert [row.split for row in samples_of(open_table(tmp_path, table, split="none"))] == [None, None]
