"""Tests of exports: other packages read all images, texts and values, and no user file is overwritten."""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from datasets import load_dataset
from PIL import Image
from pycocotools.coco import COCO

from pipeline.config.files import resolve
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError, SourceError
from pipeline.formats import formats
from pipeline.formats.export import CHECKSUMS, export_version
from pipeline.formats.formats import FORMATS, PARQUET, TABLES
from pipeline.formats.items import Item, choose_texts, read_items
from pipeline.progress import NullProgress
from pipeline.sources import open_source
from pipeline.storage.sidecars import EXPORT_RECORD
from pipeline.tables import STRING, Extras, OwnColumn
from pipeline.tasks.boxes import BOX_FIELDS
from pipeline.tasks.output_schema import arrow_type, close_schema
from pipeline.types import Sample
from tests.media import encoded
from tests.pipeline.sources.reading import open_folder, open_path, samples_of
from tests.scene_data import make_version, publish_rows, sample_table, scene_samples, true_captions

COUNT = 30
Exported = Callable[[str], Path]
CORNERS = {"type": "array", "items": {"type": "integer"}}
LABELED = {"bbox_2d": CORNERS, "label": {"type": "string"}}
BOX = {"type": "object", "required": ["bbox_2d", "label"], "properties": LABELED}
BOXES = OwnColumn("things", pa.list_(arrow_type(close_schema(BOX))), "boxes", is_list=True)
NOTE = OwnColumn("note", STRING, "text", is_list=False)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return scene_samples(COUNT)


@pytest.fixture(scope="module")
def version(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Return a version with captions of two styles, a question, boxes and a note for each image."""
    texts = true_captions(samples).to_pylist()
    split_of = {row["sample_id"]: row["split"] for row in texts}
    for row in texts:
        row["rejected_text"] = f"Not: {row['text']}" if row["style"] == "brief" else None
        row["annotation_id"] = hashlib.sha256(f"{row['sample_id']}{row['style']}".encode()).hexdigest()
    for number, sample in enumerate(samples):
        common = {"sample_id": sample.id, "split": split_of[sample.id], "prompt_id": "p", "style": ""}
        pair = {"question": "How many?", "answer": str(number), "answer_type": "number"}
        texts.append(common | {"task": "qa", **pair})
        box = {"bbox_2d": [1, 2, 11, 22], "label": f"thing {number % 3}"}
        texts.append(common | {"task": "things", "record": json.dumps(box)})
        texts.append(common | {"task": "note", "record": json.dumps(f'A "note", {number}')})
    order = {sample.id: number for number, sample in enumerate(samples)}
    texts.sort(key=lambda row: order[row["sample_id"]])
    names = list(dict.fromkeys(name for row in texts for name in row))
    table = pa.table({name: pa.array([row.get(name) for row in texts], STRING) for name in names})
    batches = sample_table(samples).to_batches()
    folder = tmp_path_factory.mktemp("data")
    extras = Extras(("rejected",), own=(BOXES, NOTE))
    made, _ = publish_rows(folder, [table], batches, extras=extras)
    return replace(made, manifest=made.manifest | {"measured": {"captions": {"brief": {}, "detailed": {}}}})


@pytest.fixture(scope="module")
def exported(version: Version, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a function that exports the version in a format once, and returns the folder."""

    @cache
    def export(kind: str) -> Path:
        done = export_version(version, kind, tmp_path_factory.mktemp("exports") / kind)
        assert (done.images, done.without_text) == (COUNT, 0)
        return done.folder

    return export


def write(kind: str, folder: Path, *items: Item) -> None:
    writer = FORMATS[kind](folder, "")
    assert all(map(writer.add, items))
    writer.close()


def rows_of(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """Return the rows of the only Parquet file in a folder that matches a pattern."""
    (path,) = folder.glob(pattern)
    return list(pq.read_table(path).to_pylist())


def loaded(folder: Path, cache_dir: Path, kind: str = "parquet") -> Any:
    return load_dataset(kind, data_dir=str(folder), cache_dir=str(cache_dir))


def by_id(version: Version) -> dict[str, Any]:
    return {item.name: item for item in read_items(version)}


def answers_of(item: Item) -> list[str]:
    """Return the expected answers of a conversation: captions, answer, boxes and note."""
    texts = [text for _, text in item.captions]
    return [*texts, item.questions[0][1], json.dumps(item.values["things"]), item.values["note"]]


def test_imagefolder_loads_all_texts_and_values(version: Version, exported: Exported, tmp_path: Path) -> None:
    splits = loaded(exported("imagefolder"), tmp_path, "imagefolder")
    counts = {split: count for split, count in version.manifest["rows"].items() if count}
    assert {split: len(part) for split, part in splits.items()} == counts
    row = splits["train"][0]
    item = next(item for item in read_items(version) if item.source_row == row["source_row"])
    assert row["image"].size == (item.width_px, item.height_px) and row["text"] == item.caption
    assert [(caption["style"], caption["text"]) for caption in row["captions"]] == item.captions
    assert [(style, row[f"caption_{style}"]) for style in ("brief", "detailed")] == sorted(item.captions)
    assert (row["width"], row["height"]) == row["image"].size
    assert row["things"] == item.values["things"] and row["note"] == item.values["note"]
    assert row["qa"] == [{"question": "How many?", "answer": item.questions[0][1], "written_by": "model"}]


def test_imagefolder_loads_if_an_image_lacks_a_style_and_references(version: Version, tmp_path: Path) -> None:
    first, second, *_ = read_items(version, ["train"])
    first = replace(first, captions=first.captions[:1], references=[])
    second = replace(second, split="test", references=["A ring."])
    write("imagefolder", tmp_path / "out", first, second)
    splits = loaded(tmp_path / "out", tmp_path / "cache", "imagefolder")
    style, text = second.captions[1]
    values = {split: (rows[0][f"caption_{style}"], rows[0]["references"]) for split, rows in splits.items()}
    assert values == {"train": (None, []), "test": (text, ["A ring."])}
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_parquet_export_has_all_rows_with_images_and_is_reproducible(
    version: Version, tmp_path: Path
) -> None:
    done = export_version(version, "parquet", tmp_path / "out", splits=("train", "validation"))
    rows = {split: version.read(split) for split in ("train", "validation")}
    assert (done.images, done.without_text) == (sum(table.num_rows for table in rows.values()), 0)
    for split, table in rows.items():
        exported = pq.read_table(tmp_path / "out" / f"{split}-00000.parquet")
        assert exported.select(table.column_names).to_pylist() == table.to_pylist()
        assert exported.column_names == [*table.column_names, "text", "messages"]
    splits = loaded(tmp_path / "out", tmp_path / "cache")
    width = rows["train"]["width_px"][0].as_py()
    assert {*splits} == {"train", "validation"} and splits["train"][0]["image"].size == (width, width)
    export_version(version, "parquet", tmp_path / "again", splits=("train", "validation"))
    assert (tmp_path / "out" / CHECKSUMS).read_text() == (tmp_path / "again" / CHECKSUMS).read_text()
    with pytest.raises(ConfigError, match="always contains all captions"):
        export_version(version, "parquet", tmp_path / "brief", opening="a photo of")


@pytest.mark.parametrize("kind", [*FORMATS, PARQUET])
def test_each_format_has_source_row_of_each_image(kind: str, version: Version, exported: Exported) -> None:
    source_rows = {item.source_row for item in read_items(version)}
    if tables := [*exported(kind).rglob("*.parquet")]:
        read = [pq.read_table(path, columns=["source_row"]).to_pylist() for path in tables]
        assert {row["source_row"] for rows in read for row in rows} == source_rows
        return
    content = b"".join(path.read_bytes() for path in exported(kind).rglob("*.[jct]*"))
    forms = dict.fromkeys(("csv", "sidecar"), ",{}\r\n") | {"vlmevalkit": "\t{}\r\n"}
    form = forms.get(kind, '"source_row": "{}"')
    assert all(form.format(row).encode() in content for row in source_rows)


SOURCE_NAMES = {
    "2019 Sommer/Foto für Oma.jpg": "Foto für Oma",
    "Screenshot at 10.00.00.png": "Screenshot at 10_00_00",
    "_DSC (1).png": "_DSC (1)",
    "../../outside.png": "outside",
    "/home/me/private.png": "private",
    "a/IMG_1.png": None,
    "b/img_1.jpg": None,
    "..": None,
    ".hidden.png": None,
    "-rf.png": None,
    "con.png": None,
    "..\\windows.png": None,
    "c:drive.png": None,
    "line\nbreak.png": None,
    "turned \u202egnp.png": None,
    f"{'ü' * 101}.png": None,
    f"{'0' * 64}.png": None,
}


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in TABLES])
def test_exported_files_keep_source_names_that_are_safe_and_unique(kind: str, tmp_path: Path) -> None:
    samples = zip(scene_samples(len(SOURCE_NAMES)), SOURCE_NAMES, strict=True)
    version, _ = make_version(tmp_path / "d", [replace(sample, source_row=row) for sample, row in samples])
    expected = {SOURCE_NAMES[item.source_row] or item.sample_id for item in read_items(version)}
    export_version(version, kind, tmp_path / "out", source_names=True)
    if kind == "webdataset":
        urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
        loaded = webdataset.WebDataset(urls, shardshuffle=False)
        assert {sample["__key__"] for sample in loaded if "png" in sample} == expected
    else:
        images = [*(tmp_path / "out").rglob("*.png")]
        assert {path.stem for path in images} == expected and len(images) == len(expected)
    assert {path.name for path in tmp_path.iterdir()} == {"d", "out"}


@pytest.mark.parametrize(("style", "trigger"), [("detailed", ""), ("all", "sks")])
def test_folder_source_ignores_exported_sidecars(
    style: str, trigger: str, version: Version, tmp_path: Path
) -> None:
    export_version(version, "sidecar", tmp_path / "out", style=style, trigger=trigger, splits=("train",))
    items = by_id(version)
    images = sorted((tmp_path / "out/train").glob("*.png"))
    assert len(images) == version.manifest["rows"]["train"] and not (tmp_path / "out/test").exists()
    for path in images:
        item = items[path.stem]
        assert path.read_bytes() == item.image
        texts = [text for name, text in item.captions if style in ("all", name)]
        expected = [f"{trigger}, {text}" if trigger else text for text in texts]
        assert path.with_suffix(".txt").read_text() == "".join(f"{text}\n" for text in expected)
    rows = samples_of(open_folder(tmp_path / "out"))
    assert rows and not any(row.references for row in rows)


def test_webdataset_reads_shards(version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "SHARD_BYTES", 6000)
    export_version(version, "webdataset", tmp_path / "out")
    shards = sorted(map(str, (tmp_path / "out").glob("train-*.tar")))
    assert len(shards) > 2
    items, seen = by_id(version), 0
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("pil"):
        item = items[sample["__key__"].rpartition("/")[2]]
        assert sample["txt"] == item.caption and sample["json"]["note"] == item.values["note"]
        assert sample["json"]["caption_detailed"] == dict(item.captions)["detailed"]
        assert sample["png"].size == (item.width_px, item.height_px)
        seen += 1
    assert seen == version.manifest["rows"]["train"]


# For each export format: the source that reads it, and its caption file, if any.
SOURCES_OF_EXPORTS: dict[str, tuple[str, str]] = {
    "imagefolder": ("folder:{}/train", ""),
    "webdataset": ("archive:{}", ""),
    "coco": ("folder:{}/images/train", "{}/annotations/captions_train.json"),
    "csv": ("folder:{}/images", "{}/train.csv"),
    "sidecar": ("folder:{}/train", ""),
}


@pytest.mark.parametrize("kind", SOURCES_OF_EXPORTS)
def test_source_reads_only_human_texts_from_an_export(kind: str, version: Version, tmp_path: Path) -> None:
    items = {}
    for number, item in enumerate(read_items(version, ["train"])):
        question_texts = {question for question, _ in item.questions}
        by_people = {item.captions[0][1], *question_texts} if number % 2 else set()
        # The second reference equals a caption by the model.
        references = ["Of the source.", item.captions[1][1]] if number % 2 else []
        own = {"description": "By a model."}
        items[item.name] = replace(item, human_texts=frozenset(by_people), references=references, values=own)
    write(kind, tmp_path, *items.values())
    source, captions = (text.format(tmp_path) for text in SOURCES_OF_EXPORTS[kind])
    opened = open_source(resolve(source=source, captions=[captions] if captions else []))
    rows = samples_of(opened)
    assert {row.id for row in rows} == {*items} and len(rows) > 10
    keeps_all = kind in ("imagefolder", "webdataset")
    for row in rows:
        item = items[row.id]
        of_source = item.references if keeps_all else ()
        human = {text for _, text in item.captions if text in item.human_texts}
        assert {*row.references} == human | {*of_source}
        questions = [pair for pair in item.questions if pair[0] in item.human_texts and keeps_all]
        assert [(one.question, one.answers[0]) for one in row.reference_qa or ()] == questions
        # Only the webdataset source sees split names. The other sources read the files of one split.
        assert row.split == (item.split if kind == "webdataset" else None)
    messages = [message for message in opened.messages if "model-written texts" in message]
    assert len(messages) == (kind != "webdataset")  # opening an archive reads no texts


@pytest.mark.parametrize("kind", ["imagefolder", "coco", "webdataset"])
def test_source_reads_splits_of_an_export(kind: str, version: Version, exported: Exported) -> None:
    opened = open_path("archive" if kind == "webdataset" else "folder", exported(kind))
    splits = {item.name: item.split for item in read_items(version)}
    assert {row.id: row.split for row in samples_of(opened)} == splits


@pytest.mark.parametrize(
    ("values", "writer"),
    [
        ({"note": "It barks."}, "people"),
        ({"title": "Rex"}, "model"),
        ({"text": "EXIT", "license": "plate"}, "model"),
    ],
)
def test_row_with_a_custom_value_named_like_a_text_column_is_marked_as_model_written(
    version: Version, tmp_path: Path, values: dict[str, Any], writer: str
) -> None:
    (item, *_) = read_items(version, ["train"])
    asked = [{"question": "What?", "answers": ["a dog", "dog"], "answer_type": None}]
    text, license = item.caption or "", item.license
    item = replace(item, human_texts=frozenset([text]), values=values, reference_qa=asked)
    write("imagefolder", tmp_path, item)
    (row,) = rows_of(tmp_path, "*/*.parquet")
    assert (row["text"], row["written_by"], row["license"]) == (text, writer, license)
    assert row["reference_qa"] == asked
    taken = {"text": "text_", "license": "license_"}
    assert {name: row[taken.get(name, name)] for name in values} == values


def test_captions_file_with_only_model_texts_is_refused(exported: Exported) -> None:
    captions = [exported("coco") / "annotations/captions_train.json"]
    with pytest.raises(SourceError, match="a model wrote all texts of") as refused:
        open_folder(exported("coco") / "images/train", captions=captions)
    assert "'written_by'" in refused.value.hint


def test_llava_and_sharegpt_have_all_turns(version: Version, exported: Exported, tmp_path: Path) -> None:
    llava, share, items = exported("llava"), exported("sharegpt"), by_id(version)
    for entry in json.loads((llava / "train.json").read_text()):
        item = items[entry["id"]]
        assert Image.open(llava / entry["image"]).size == (item.width_px, item.height_px)
        answers = [turn["value"] for turn in entry["conversations"] if turn["from"] == "gpt"]
        assert answers == answers_of(item)
        has_image = [turn["value"].startswith("<image>\n") for turn in entry["conversations"]]
        assert has_image == [True] + [False] * 9
    rows = load_dataset("json", data_files=str(share / "train.jsonl"), cache_dir=str(tmp_path))["train"]
    assert len(rows) == version.manifest["rows"]["train"]
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 5
        assert sum(message["content"].count("<image>") for message in row["messages"]) == 1
        assert (share / row["images"][0]).is_file()


def test_pycocotools_reads_captions_and_boxes(version: Version, exported: Exported) -> None:
    out, items = exported("coco"), by_id(version)
    files = (out / f"annotations/{kind}_train.json" for kind in ("captions", "instances"))
    captions, instances = (COCO(str(file)) for file in files)
    assert len(captions.getImgIds()) == version.manifest["rows"]["train"]
    for number in captions.getImgIds():
        (image,) = captions.loadImgs([number])
        item = items[Path(image["file_name"]).stem]
        texts = [entry["caption"] for entry in captions.loadAnns(captions.getAnnIds(imgIds=[number]))]
        assert texts == [text for _, text in item.captions]
        (box,) = instances.loadAnns(instances.getAnnIds(imgIds=[number]))
        assert box["bbox"] == [1, 2, 10, 20] and box["area"] == 200
        assert instances.loadCats([box["category_id"]])[0]["name"] == item.values["things"][0]["label"]
        assert (out / "images/train" / image["file_name"]).is_file()


def test_csv_has_a_line_for_each_caption(version: Version, exported: Exported) -> None:
    out, items = exported("csv"), by_id(version)
    with (out / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * version.manifest["rows"]["train"]
    for row in rows:
        assert (row["style"], row["title"]) in items[Path(row["filepath"]).stem].captions
        assert (out / row["filepath"]).is_file()


@pytest.mark.parametrize("kind", FORMATS)
def test_image_without_texts_and_values_is_left_out(kind: str, version: Version, tmp_path: Path) -> None:
    item = replace(next(read_items(version)), captions=[], questions=[], value_turns=[], boxes=None, pairs=[])
    assert FORMATS[kind](tmp_path, "").add(item) == (kind in ("imagefolder", "webdataset"))


@pytest.mark.parametrize("kind", FORMATS)
def test_export_after_interrupted_export_is_complete(
    version: Version, kind: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(NullProgress):
        def __call__(self, step: str, done: int, total: int | None, metrics: Any = None) -> None:
            if done == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_version(version, kind, tmp_path / "cut", progress=Stop())
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(formats, "BATCH_SAMPLES", 7)  # the size of batches does not change the files
    export_version(version, kind, tmp_path / "cut")
    sums = (tmp_path / "cut" / CHECKSUMS).read_text()
    assert sums == (exported(kind) / CHECKSUMS).read_text()
    for line in sums.splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((tmp_path / "cut" / name).read_bytes()).hexdigest() == digest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", ["cauldron", "messages"])
def test_parquet_rows_have_all_turns(kind: str, version: Version, exported: Exported, tmp_path: Path) -> None:
    rows, items = loaded(exported(kind), tmp_path)["train"], by_id(version)
    assert len(rows) == version.manifest["rows"]["train"]
    for row in rows:
        item = items[row["sample_id"]]
        assert [image.size for image in row["images"]] == [(item.width_px, item.height_px)]
        if kind == "cauldron":
            answers = [turn["assistant"] for turn in row["texts"] if turn["user"]]
        else:
            answers = [turn["content"][0]["text"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert answers == answers_of(item)
    (file,) = exported(kind).glob("train-*.parquet")
    group = pq.ParquetFile(file).metadata.row_group(0)
    columns = [group.column(n) for n in range(group.num_columns)]
    pixels = next(column for column in columns if column.path_in_schema.endswith("bytes"))
    assert pixels.compression == "UNCOMPRESSED" and not pixels.is_stats_set


def test_dpo_rows_have_better_and_worse_caption(version: Version, exported: Exported, tmp_path: Path) -> None:
    rows, items = loaded(exported("dpo"), tmp_path / "cache")["train"], by_id(version)
    assert len(rows) == version.manifest["rows"]["train"]
    for row in rows:
        item = items[row["sample_id"]]
        assert row["image"].size == (item.width_px, item.height_px)
        (asked,), (better,), (worse,) = row["prompt"], row["chosen"], row["rejected"]
        assert [part["type"] for part in asked["content"]] == ["image", "text"] and asked["role"] == "user"
        texts = [better["content"][0]["text"], worse["content"][0]["text"]]
        brief = dict(item.captions)["brief"]
        assert texts == [brief, f"Not: {brief}"]
        assert {better["role"], worse["role"]} == {"assistant"}
    none = tmp_path / "none"
    with pytest.raises(ConfigError, match="has a text for dpo"):
        export_version(version, "dpo", none, style="detailed")


def test_repeated_export_is_reported_as_done_and_another_export_is_refused(
    version: Version, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = export_version(version, "sidecar", out, style="all", trigger="sks", opening="a photo")
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = export_version(version, "sidecar", out, style="all", trigger="sks", opening="a photo")
    assert done.is_new and done.images and again == replace(done, is_new=False)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == files
    other = replace(version, manifest=version.manifest | {"digest": "0" * 64})
    for made, style in ((version, "brief"), (other, "all")):
        with pytest.raises(ConfigError, match="not an export of this version with these settings"):
            export_version(made, "sidecar", out, style=style, trigger="sks", opening="a photo")
    for text in ("0" * 64, ""):
        (out / EXPORT_RECORD).write_text(text)
        with pytest.raises(ConfigError, match="already exists"):
            export_version(version, "sidecar", out, style="all", trigger="sks", opening="a photo")


def test_unsupported_export_is_refused(version: Version, samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        export_version(version, "csv", tmp_path / "there")
    with pytest.raises(ConfigError, match="unknown format webdatset"):
        export_version(version, "webdatset", tmp_path / "there")
    with pytest.raises(ConfigError, match="unknown format webdatset") as raised:
        export_version(version, "webdatset", tmp_path / "out")
    assert "did you mean webdataset?" in raised.value.hint
    with pytest.raises(ConfigError, match=r"no caption of v1\.0\.0 has the style breif") as raised:
        export_version(version, "csv", tmp_path / "out", style="breif")
    assert "brief" in raised.value.hint
    for kind in TABLES:
        with pytest.raises(ConfigError, match=f"the format {kind} has no image files"):
            export_version(version, kind, tmp_path / "out", source_names=True)
    without_rows = version.manifest | {"rows": version.manifest["rows"] | {"test": 0}}
    with pytest.raises(ConfigError, match="has no rows in test"):
        export_version(replace(version, manifest=without_rows), "csv", tmp_path / "out", splits=("test",))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    two_pages = [replace(sample, images=sample.images * 2) for sample in samples[:4]]
    batches = sample_table(two_pages).to_batches()
    decks, _ = publish_rows(tmp_path / "decks", [true_captions(samples[:4])], batches, source="d", decks=True)
    with pytest.raises(ConfigError, match="consists of decks"):
        export_version(decks, "csv", tmp_path / "out")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_image_with_exif_orientation_is_exported_upright(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(scene_samples(1)[0].images[0])) as image:
        lying = image.convert("RGB").resize((60, 40))
    data = encoded(lying, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    sample = replace(scene_samples(1)[0], images=(data,), width_px=40, height_px=60, split="train")
    (item,) = read_items(make_version(tmp_path / "d", [sample])[0])
    with Image.open(io.BytesIO(item.image)) as exported:
        assert (exported.format, exported.size, exported.getexif().get(0x0112, 1)) == (kind, (40, 60), 1)
        upright = lying.transpose(Image.Transpose.ROTATE_270)
        difference = np.asarray(exported.convert("RGB"), dtype=int) - np.asarray(upright, dtype=int)
    assert np.abs(difference).mean() < (3 if kind == "JPEG" else 0.1)


def test_conversation_without_captions_has_custom_task_values(samples: list[Sample], tmp_path: Path) -> None:
    note = {"task": "note", "style": "", "text": None, "record": '"A note"'}
    captions = [row for row in true_captions(samples).to_pylist() if row["style"] == "brief"]
    rows = [row | note | {"annotation_id": f"{number:064x}"} for number, row in enumerate(captions)]
    table = pa.table({name: pa.array([row.get(name) for row in rows], STRING) for name in rows[0]})
    batches, extras = sample_table(samples).to_batches(), Extras(own=(NOTE,))
    version, _ = publish_rows(tmp_path / "d", [table], batches, extras=extras)
    with pytest.raises(ConfigError, match="has a text for csv"):
        export_version(version, "csv", tmp_path / "out")
    export_version(version, "messages", tmp_path / "out")
    for kind in ("messages", PARQUET):
        out = export_version(version, kind, tmp_path / f"{kind}-out").folder
        (asked, answer), *others = pq.read_table(next(out.glob("train-*")))["messages"].to_pylist()
        assert [part["type"] for part in asked["content"]] == ["image", "text"] and others
        assert asked["content"][1]["text"] == "Write note of this image."
        assert answer["content"] == [{"type": "text", "text": "A note"}]


def test_sharegpt_pairs_and_boxes_suit_ms_swift_and_llama_factory(version: Version, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_version(version, "sharegpt", out, absolute=True, trigger="sks")
    pairs, boxes = (
        [json.loads(line) for line in (out / f"train_{kind}.jsonl").read_text().splitlines()]
        for kind in ("dpo", "boxes")
    )
    for pair in pairs:
        brief = pair["messages"][1]["content"]
        assert brief.startswith("sks, ")
        assert pair["rejected_response"] == pair["worse"]["content"] == f"sks, Not: {brief[len('sks, ') :]}"
        assert pair["prompt"] == pair["messages"][:1] and pair["better"] == pair["messages"][1]
        assert pair["prompt"][0]["content"].startswith("<image>")
        assert Path(pair["images"][0]).is_relative_to(out) and Path(pair["images"][0]).is_file()
    assert {row["messages"][1]["content"].count("<bbox>") for row in boxes} == {1}
    objects = boxes[0]["objects"]
    assert objects["bbox"] == [[1, 2, 11, 22]] and objects["ref"][0].startswith("thing")
    known = json.loads((out / "dataset_info.json").read_text())
    assert {known[name]["file_name"] for name in ("train", "train_dpo")} == {"train.jsonl", "train_dpo.jsonl"}
    assert known["train_dpo"]["ranking"] and not any("boxes" in name for name in known)
    for entry, rows in ((known["train_dpo"], pairs), (known["train"], pairs)):
        assert {*entry["columns"].values()} <= {*rows[0]}


@pytest.mark.parametrize("kind", ["paligemma", "vlmevalkit"])
def test_export_has_a_line_for_each_text_and_question(kind: str, version: Version, tmp_path: Path) -> None:
    """For VLMEvalKit, an image of up to 64 characters is the index of another row."""
    items = {item.source_row: item for item in read_items(version, ["train"])}
    first = next(iter(items.values()))
    style, text = first.captions[0]
    # Another caption of the same style has the same question.
    items[first.source_row] = replace(first, captions=[(style, text), (style, "Other."), *first.captions[1:]])
    write(kind, tmp_path, *items.values())
    is_json = kind == "paligemma"
    reader, question, answer = ("json", "prefix", "suffix") if is_json else ("csv", "question", "answer")
    options = {} if is_json else {"sep": "\t"}
    (file,) = tmp_path.glob("train.*")
    rows = load_dataset(reader, data_files=str(file), cache_dir=str(tmp_path / "cache"), **options)["train"]
    lines = [(row["source_row"], row[question], row[answer]) for row in rows]
    for row in rows:
        if is_json:
            image = (tmp_path / row["image"]).read_bytes()
        else:
            is_index = len(row["image"]) <= 64
            image = base64.b64decode(rows[int(row["image"])]["image"] if is_index else row["image"])
        assert image == items[row["source_row"]].image
    assert is_json or rows["index"] == [*range(len(rows))]
    expected = [(row, *turn) for row, item in items.items() for turn in item.single_turns]
    assert lines == expected and len(lines) == 5 * len(items) + 1
    assert lines[0][1] == lines[1][1] and lines[1][2] == "Other."


def test_lora_export_removes_the_given_opening_of_captions(tmp_path: Path) -> None:
    samples = scene_samples(12)
    captions = true_captions(samples).to_pylist()
    for number, row in enumerate(captions):
        row["text"] = f"A photo of {'a cup' if number < 2 else 'a cat'} number {number}."
    table = pa.table({name: pa.array([row[name] for row in captions], STRING) for name in captions[0]})
    version, _ = publish_rows(tmp_path / "d", [table], sample_table(samples).to_batches())
    done = export_version(version, "csv", tmp_path / "short", trigger="sks", opening=" a photo of ")
    assert done.has_opening
    with (tmp_path / "short/train.csv").open(newline="") as file:
        titles = [row["title"] for row in csv.DictReader(file)]
    assert titles and all(title.startswith("sks, a c") for title in titles)
    done = export_version(version, "csv", tmp_path / "plain", opening="a pho")
    assert not done.has_opening
    assert "A photo of a c" in (tmp_path / "plain/train.csv").read_text()


def test_cauldron_has_the_ratings_of_a_judge(version: Version, exported: Exported, tmp_path: Path) -> None:
    item = next(read_items(version, ["train"]))
    (_, text), *_ = item.captions
    rated = {"relevance": 4, "grounding": 2, "correctness": 1, "form": 5}
    question = item.questions[0][0]
    scores = {text: rated, question: rated | {"relevance": 3, "answered_blind": False}}
    item = replace(item, scores=scores, questions=[(question, f"sks, {text}")])
    write("cauldron", tmp_path, choose_texts(item, style=None, trigger="sks", opening="", only_one=False))
    (row,) = rows_of(tmp_path, "*.parquet")
    assert row["texts"][0]["assistant"] == f"sks, {text}"
    assert row["relevance_ratings"] == [4, None, 3, None, None] and row["relevance_min"] == 3
    assert row["image_correspondence_ratings"] == [2, None, 2, None, None]
    assert row["visual_dependency_ratings"] == [None, None, 5, None, None]
    assert row["formatting_min"] == 5
    assert {row["relevance_min"] for row in rows_of(exported("cauldron"), "train-*")} == {None}


def test_shortened_model_caption_that_equals_a_human_caption_is_not_marked_as_human(
    version: Version,
) -> None:
    captions = [("human", "a cat."), ("human", "A dog."), ("brief", "A photo of a cat.")]
    item = replace(next(read_items(version)), captions=captions, human_texts=frozenset(("a cat.", "A dog.")))
    chosen = choose_texts(item, style="all", trigger="sks", opening="a photo of", only_one=False)
    writers = {text: chosen.writer(text) for _, text in chosen.captions}
    assert writers == {"sks, a cat.": "model", "sks, A dog.": "people"}


def test_concurrent_export_to_the_same_folder_is_refused(version: Version, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Second(NullProgress):
        refused = ""

        def __call__(self, step: str, done: int, total: int | None, metrics: Any = None) -> None:
            if not self.refused:
                with pytest.raises(ConfigError, match="another process is exporting to") as caught:
                    export_version(version, "webdataset", out)
                self.refused = str(caught.value)

    second = Second()
    export_version(version, "webdataset", out, progress=second)
    assert second.refused and out.is_dir()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_coco_export_includes_images_with_no_boxes_and_omits_unanswered_images(tmp_path: Path) -> None:
    def item(number: int, labels: list[str] | None) -> Item:
        box = {BOX_FIELDS[0]: [1, 2, 3, 4]}
        boxes = None if labels is None else [{"label": label, **box} for label in labels]
        captions = [("brief", "A dog.")] if number == 3 else []
        return replace(first, name=f"{number}", captions=captions, boxes=boxes)

    made, _ = make_version(tmp_path / "d", scene_samples(3))
    first = next(read_items(made))
    (tmp_path / "out").mkdir()
    coco = FORMATS["coco"](tmp_path / "out", "")
    labels_of_images = [["zebra"], [], None, None, ["ant", "zebra"]]
    added = [coco.add(item(number, labels)) for number, labels in enumerate(labels_of_images)]
    assert added == [True, True, False, True, True]
    coco.close()
    files = (f"out/annotations/{kind}_{first.split}.json" for kind in ("instances", "captions"))
    boxed, captioned = (json.loads((tmp_path / file).read_text()) for file in files)
    assert [image["file_name"][0] for image in boxed["images"]] == ["0", "1", "4"]
    assert [image["file_name"][0] for image in captioned["images"]] == ["3"]
    assert boxed["categories"] == [{"id": 1, "name": "ant"}, {"id": 2, "name": "zebra"}]
    assert [entry["category_id"] for entry in boxed["annotations"]] == [2, 1, 2]
