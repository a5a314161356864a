"""Files of human captions: common formats are read, names match images, and invalid files are errors."""

import csv
import gzip
import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import SourceError
from pipeline.sources import text_files
from pipeline.sources.texts import ImageTexts, human_questions, match_images, read_captions, read_texts
from tests.pipeline.sources.reading import open_folder, samples_of

COCO = {
    "info": {},
    "images": [{"id": 9, "file_name": "000009.jpg"}, {"id": 12, "file_name": "000012.jpg"}],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "A dog."},
        {"image_id": 12, "id": 2, "caption": "A cat. "},
        {"image_id": 9, "id": 3, "caption": "A brown dog."},
    ],
}
SENTENCES = [{"raw": "A dog."}, {"raw": "A brown dog."}]
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filename": "000009.jpg", "split": "restval", "sentences": SENTENCES},
        {"filename": "000012.jpg", "split": "val", "sentences": [{"raw": "A cat."}]},
    ],
}
FORMS = {
    "coco.json": json.dumps(COCO),
    "karpathy.json": json.dumps(KARPATHY),
    "object.json": json.dumps({"000009.jpg": ["A dog.", "A brown dog."], "000012.jpg": "A cat."}),
    "list.json": '[{"image": "000009.jpg", "captions": ["A dog.", "A brown dog."]}, '
    '{"image": "000012.jpg", "text": "A cat."}]',
    "rows.jsonl": '{"file_name": "000009.jpg", "text": "A dog."}\n'
    '{"file_name": "000012.jpg", "text": "A cat."}\n\n'
    '{"file_name": "000009.jpg", "text": "A brown dog."}\n',
    "flickr8k.txt": "image,caption\n000009.jpg,A dog.\n000009.jpg,A brown dog.\n000012.jpg,A cat.\n",
    "flickr30k.csv": "image_name| comment_number| comment\n"
    "000009.jpg| 0| A dog.\n000009.jpg| 1| A brown dog.\n"
    "000012.jpg| 0| A cat.\n",
    "pandas.tsv": "\tfile\ttext\n0\t000009.jpg\tA dog.\n1\t000009.jpg\tA brown dog.\n2\t000012.jpg\tA cat.\n",
    "sheet.csv": '\ufeffFile_Name;Caption\n000009.jpg;A dog.\n000009.jpg;"A brown dog."\n000012.jpg;A cat.\n',
}

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "fotos/Köln.jpg") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("name", FORMS)
def test_all_caption_formats_give_the_same_texts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMS[name])
    texts_of = read_captions(tmp_path / name)
    captions = {image: texts.captions for image, texts in texts_of.items()}
    assert captions == {"000009.jpg": ["A dog.", "A brown dog."], "000012.jpg": ["A cat."]}
    splits = [texts.split for texts in texts_of.values()]
    assert splits == (["train", "validation"] if name == "karpathy.json" else [None, None])


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ('["A dog runs.", "A cat."]', ["A dog runs.", "A cat."]),
        ('[{"caption": "A dog runs."}]', ["A dog runs."]),
        ("['A dog runs.', \"A cat's.\"]", ["A dog runs.", "A cat's."]),
        ("['A dog runs.' 'A cat.']", ["['A dog runs.' 'A cat.']"]),  # as NumPy prints it
        ("['A dog''A cat.']", ["['A dog''A cat.']"]),
        (r"['it\'s a dog', 'a\\b']", ["it's a dog", r"a\b"]),
        (r"""['', 'so "" or \'\'', "it's ''"]""", ["so \"\" or ''", "it's ''"]),
        ("['a'" + " " * 90_000 + "]", ["a"]),
        ("['a'" + " " * 99_999 + "]", [("['a'" + " " * 99_999)[:20_000]]),  # too long to be parsed as a list
        ("[" * 10_000 + "]", ["[" * 10_000 + "]"]),
        ("x" * 20_001, ["x" * 20_000]),
        ("[1, 2]", ["[1, 2]"]),  # an answer may be a box or an interval
        ("[]", ["[]"]),
    ],
)
def test_list_in_a_cell_is_parsed(cell: str, texts: list[str]) -> None:
    assert read_texts({"caption": cell}, ("caption",)) == texts


def test_gzip_file_is_unpacked_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(FORMS["coco.json"].encode())
    (tmp_path / "whole.json.gz").write_bytes(packed)
    assert read_captions(tmp_path / "whole.json.gz")["000012.jpg"].captions == ["A cat."]
    (tmp_path / "cut.json.gz").write_bytes(packed[:-9])
    for name in ("cut.json.gz", "gone.json"):
        with pytest.raises(SourceError, match=f"cannot read .*{name}"):
            read_captions(tmp_path / name)
    monkeypatch.setattr(text_files, "MAX_FILE_BYTES", 10_000)
    (tmp_path / "bomb.json.gz").write_bytes(gzip.compress(b" " * 1_000_000))
    with pytest.raises(SourceError, match="unpacks to more than"):
        read_captions(tmp_path / "bomb.json.gz")


def test_questions_have_one_or_many_answers(tmp_path: Path) -> None:
    rows = [
        {"image": "1", "question": "Is it a dog?", "answer": "yes", "answer_type": "yes/no"},
        {"image": "1", "question": "What?", "answers": ["dog", {"answer": "a dog", "id": 2}, "dog"]},
        {"image": "2", "question": "How many?", "answer": 2.0},
        {"image": "2", "question": "Is it a cat?", "answer": False},
        {"image": "2", "question": "Why?", "answer": ""},
        {"image": "2", "captions": [["A dog.", {"raw": "Two dogs."}], True, 3.5, {"x": 1}]},
    ]
    (tmp_path / "vqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts_of = read_captions(tmp_path / "vqa.jsonl")
    first, second = texts_of["1"].questions
    assert (first.question, first.answers, first.answer_type) == ("Is it a dog?", ("yes",), "yes/no")
    assert second.answers == ("dog", "a dog", "dog")
    assert [one.answers for one in texts_of["2"].questions] == [("2",), ("no",)]
    assert texts_of["2"].captions == ["A dog.", "Two dogs."]


def coco(images: str, annotations: str = "") -> bytes:
    return f'{{"images": [{images}], "annotations": [{annotations}]}}'.encode()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "has no caption and no question"),
        (b"[1]", "cannot read"),
        (coco('{"id": 1}', '{"image_id": 1, "caption": "x"}'), "an object has no key 'file_name'"),
        (coco('{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}'), "two of its images have the id 1"),
        (coco('{"id": 1, "file_name": "a.jpg"}', '{"image_id": 1, "bbox": []}'), "has no caption"),
        (b"caption\nA dog.\n", "a row has no image file name"),
        (b'{"images": [1], "annotations": []}', "a value has another form than expected"),
        (b"image,caption,caption\na.jpg,A dog.,\n", "two columns are named caption"),
        (b"\xff\xfe\x00", "codec can"),
        (b"[" * 100_000, "cannot read"),
        (b"file_name,caption\na.jpg,A dog, running\n", "line 2 has more columns than the first line"),
    ],
)
def test_unreadable_caption_file_is_an_error(tmp_path: Path, data: bytes, problem: str) -> None:
    (tmp_path / "c.json").write_bytes(data)
    with pytest.raises(SourceError, match=problem):
        read_captions(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("names", "images", "matches"),
    [
        (["./b/dog.png"], ["a/dog.png", "b/dog.png"], {"b/dog.png": "./b/dog.png"}),
        (["elsewhere/cat 1.png"], ["b/cat 1.png"], {"b/cat 1.png": "elsewhere/cat 1.png"}),
        (["fotos\\a.jpg"], ["fotos/a.jpg", "b/a.jpg"], {"fotos/a.jpg": "fotos\\a.jpg"}),
        ([COMPOSED], [DECOMPOSED], {DECOMPOSED: COMPOSED}), (["dog.png"], ["a/dog.png", "b/dog.png"], {}),
        (["train/1.jpg", "test/1.jpg"], ["val/1.jpg"], {}), (["dog"], ["dog.png"], {}),
        (["a.png"], ["a.jpg"], {}), (["gone.jpg", "a.jpg"], ["a.jpg"], {"a.jpg": "a.jpg"}),
    ],
)  # fmt: skip
def test_image_is_matched_by_path_or_unique_name(
    names: list[str], images: list[str], matches: dict[str, str]
) -> None:
    matched, unknown = match_images({name: ImageTexts([name]) for name in names}, images)
    captions = {image: texts.captions for image, texts in matched.items()}
    assert captions == {image: [name] for image, name in matches.items()}
    assert unknown == [name for name in names if name not in matches.values()]


def test_caption_files_add_texts_and_splits_to_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in (9, 12, 13):
        Image.new("RGB", (8, number), "red").save(folder / f"{number:06}.jpg")
    (folder / "000013.txt").write_text("A bird.\n")
    (tmp_path / "karpathy.json").write_text(FORMS["karpathy.json"])
    question = '{"image": "000012.jpg", "question": "Is it a cat?", "answer": "yes"}'
    (tmp_path / "vqa.jsonl").write_text(f'{question}\n{{"image": 99, "text": "x"}}')
    files = [tmp_path / "karpathy.json", tmp_path / "vqa.jsonl"]
    source = open_folder(folder, captions=files)
    assert source.messages == (
        "human captions: 4 for 3 of 3 images",
        "splits of the source: 1 train, 1 validation",
        "human questions: 1 about 1 of 3 images",
        f"{tmp_path}/vqa.jsonl lists 1 images that do not exist: 99",
    )
    rows = {row.source_row: row for row in samples_of(source)}
    assert [(row.references, row.split) for row in rows.values()] == [
        (("A dog.", "A brown dog."), "train"), (("A cat.",), "validation"), (("A bird.",), None)
    ]  # fmt: skip
    asked = [[pair.question for pair in row.reference_qa or ()] for row in rows.values()]
    assert asked == [[], ["Is it a cat?"], []]
    plain = open_folder(folder)
    assert len({source.revision, plain.revision, open_folder(folder, captions=files[:1]).revision}) == 3


def test_caption_file_about_other_images_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "c.json").write_text(FORMS["coco.json"])
    problem = r"names no image in .*; it names 000009\.jpg, 000012\.jpg"
    with pytest.raises(SourceError, match=problem) as caught:
        open_folder(tmp_path, captions=[tmp_path / "c.json"])
    assert "a.png" in str(caught.value.hint)


def test_split_is_case_insensitive_and_unknown_split_is_refused(tmp_path: Path) -> None:
    rows = [{"image": "a", "text": "A dog.", "split": split} for split in ("Test", "TRAIN")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read_captions(tmp_path / "a.json")["a"].split == "test"  # the held-out split has priority
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"image": "b", "text": "x", "split": "private"}]))
    with pytest.raises(SourceError, match="'private' is not a split"):
        read_captions(tmp_path / "a.json")


@pytest.mark.parametrize("line_end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_quoted_csv_values_are_read(tmp_path: Path, delimiter: str, line_end: str) -> None:
    rows = [("a.jpg", ',,,, A man said "hello"\nto a dog.'), ("b.jpg", "A cat, a; b."), ("c.jpg", '6" long')]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator=line_end).writerows(
            [("file_name", "caption"), *rows]
        )
    captions = {name: texts.captions for name, texts in read_captions(tmp_path / "a.csv").items()}
    assert captions == {name: [text] for name, text in rows}


@pytest.mark.parametrize(
    "text",
    ['1.jpg\t"Look\n2.jpg\tat this"\n3.jpg\tok\n', '1.jpg\t"Look\n', '1.jpg\tok\n2.jpg\t"Look\n3.jpg\tok\n'],
)
def test_unclosed_csv_quote_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.tsv").write_text(f"file_name\tcaption\n{text}")
    with pytest.raises(SourceError, match="is not closed"):
        read_captions(tmp_path / "c.tsv")


@pytest.mark.parametrize("row", ["a\n", "a\r", "a\r\n", '"a\nb\nc"\n', "a\r\n\r\n"])
@pytest.mark.parametrize("end", ["\n", "\r"])
def test_missing_values_of_short_rows_count_toward_the_value_limit(
    monkeypatch: pytest.MonkeyPatch, row: str, end: str
) -> None:
    monkeypatch.setattr(text_files, "MAX_VALUES", 1000)
    text = ",".join(f"c{n}" for n in range(100)) + end + row * 5 + f"a{end}" * 5
    assert len([*text_files.parse_rows(text, "CSV")]) == 10
    with pytest.raises(ValueError, match="more than 1,000 values"):
        [*text_files.parse_rows(f"{text}a{end}", "CSV")]


def test_model_written_texts_are_skipped(tmp_path: Path) -> None:
    by_hand = {"text": "by hand", "written_by": "people"}
    rows = [
        {"file_name": "a", "written_by": "model", "caption": "m", "references": ["human one"]},
        {"file_name": "b", "written_by": "model", "captions": [{"text": "by model"}, by_hand]},
        {"file_name": "c", "prompt_id": "caption/brief@3", "caption": "mine"},
        {"file_name": "d", "prompt_id": f"caption/v2@{'0f' * 32}", "caption": "of a version"},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    captions = {name: one.captions for name, one in read_captions(tmp_path / "c.jsonl").items()}
    assert captions == {"a": ["human one"], "b": ["by hand"], "c": ["mine"], "d": []}


def test_question_in_an_export_keeps_all_answers() -> None:
    asked = {"question": "What runs?", "answers": ["dog", "dog", "a dog"], "answer_type": "other"}
    own = {"question": "What runs?", "answer": "dog", "written_by": "people"}
    row = {"written_by": "people", "qa": [own, {**own, "question": "Where?"}], "reference_qa": [asked]}
    questions = [(one.question, one.answers) for one in human_questions(row)]
    assert questions == [("What runs?", ("dog", "dog", "a dog")), ("Where?", ("dog",))]
    del row["written_by"]  # without this key, it is not an export of synth
    assert [one.answers for one in human_questions(row)] == [("dog",), ("dog",)]
