"""The formats of `synth export`. Each receives the images one by one, and keeps few of them in memory.

| format | for |
|---|---|
| parquet | readers of Parquet: all columns of the version, including images, as `synth push` uploads them |
| imagefolder | `datasets.load_dataset("imagefolder", data_dir=...)` |
| sidecar | trainers of diffusion models: a text file next to each image |
| webdataset | the package webdataset, open_clip, readers of img2dataset |
| llava | LLaVA's trainers: conversations in JSON |
| sharegpt | LLaMA-Factory and others: messages in JSON lines |
| coco | pycocotools: captions, and boxes as instances |
| csv | open_clip (`--csv-separator ,`): one line per caption |
| cauldron | nanoVLM and other trainers of The Cauldron or FineVision: Parquet with `images` and `texts` |
| lance | Lance and LanceDB: one dataset per split (extra `lance`) |
| dpo | TRL's DPOTrainer: Parquet, one row per preference pair (the best and the worst caption) |
"""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.conversation import MESSAGE, messages, turns
from pipeline.dataset.shards import SplitWriter
from pipeline.errors import ConfigError
from pipeline.formats.items import ITEM_BATCH, Item
from pipeline.install import install_command
from pipeline.storage.sidecars import note_own_lines
from pipeline.tables import (
    ANSWERS,
    BY_MODEL,
    CAPTIONS,
    HUMAN_QUESTION,
    IMAGE,
    QUESTION,
    REFERENCE_QA,
    STRING,
    WRITTEN_BY,
    fields,
)
from pipeline.tasks.boxes import BOX_FIELDS

DRAFT, DRAFT_BATCH_LINES = ".metadata.jsonl", 10_000
SHARD_BYTES = 500_000_000  # bytes of images and texts in a tar file


class Format:
    """Base of all formats. `style` selects captions. By default, all are exported."""

    def __init__(self, folder: Path, style: str | None = None) -> None:
        self.folder, self.style = folder, style
        self._files: dict[str, TextIO] = {}

    def add(self, item: Item) -> bool:
        """Write an image with its texts. Return False if the image has no text for this format."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish all files after the last image."""
        for file in self._files.values():
            file.close()

    def captions(self, item: Item) -> list[tuple[str, str]]:
        """Return the selected captions as (style, text)."""
        return [(style, text) for style, text in item.captions if self.style in (None, style)]

    def texts(self, item: Item) -> dict[str, Any]:
        """Return all texts of an image, by column."""
        return {
            "text": item.caption(self.style),
            "captions": [
                {"style": style, "text": text, WRITTEN_BY: item.writer(text)}
                for style, text in self.captions(item)
            ],
            "qa": [
                {"question": question, "answer": answer, WRITTEN_BY: item.writer(question)}
                for question, answer in item.questions
            ],
            "references": [*item.references],
            REFERENCE_QA: [*item.reference_qa],
        }

    def turns(self, item: Item, image_token: str = "") -> list[tuple[str, str]]:
        """Return (question, answer) for all texts of an image. The first question begins with
        `image_token`.
        """
        asked = [*turns(self.captions(item), item.questions)]
        return [(f"{image_token}{question}", answer) for question, answer in asked[:1]] + asked[1:]

    def put_image(self, item: Item, folder: str) -> str:
        """Write an image file, and return its path within the export."""
        path = self.folder / folder / item.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.image)
        return f"{folder}/{item.file_name}"

    def file(self, name: str) -> TextIO:
        """Return a text file of the export, and open it on the first call."""
        if name not in self._files:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = path.open("w", encoding="utf-8", newline="")
        return self._files[name]

    def table(self, name: str, *columns: str) -> Any:
        """Return a writer of a CSV file of the export, which begins with the names of its columns."""
        file = self.file(name)
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(columns)
        return writer


class ImageFolder(Format):
    """A folder per split with metadata.parquet. From JSON lines, `datasets` would guess the types."""

    def add(self, item: Item) -> bool:
        self.put_image(item, item.split)
        row = add_values({"file_name": item.file_name, **self.texts(item), **item.origin}, item)
        self.file(f"{item.split}/{DRAFT}").write(to_json(row) + "\n")
        return True

    def close(self) -> None:
        super().close()
        drafts = sorted(self.folder.glob(f"*/{DRAFT}"))
        # A list that is empty in all rows of a batch has no type in the schema of the batch, so merge the
        # schemas of all batches.
        schemas = [pa.Table.from_pylist(rows).schema for path in drafts for rows in _read_lines(path)]
        schema = pa.unify_schemas(schemas, promote_options="permissive") if schemas else pa.schema([])
        for path in drafts:
            with pq.ParquetWriter(path.with_name("metadata.parquet").absolute(), schema) as writer:
                for rows in _read_lines(path):
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            path.unlink()


def _read_lines(path: Path) -> Iterator[list[dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        while batch := [json.loads(line) for line in islice(file, DRAFT_BATCH_LINES)]:
            yield batch


class Sidecar(Format):
    """A text file with one caption next to each image. source_rows.csv has the origin of each image."""

    def add(self, item: Item) -> bool:
        text = item.caption(self.style)
        if text is None:
            return False
        row = [self.put_image(item, item.split), item.source_row]
        self.table("source_rows.csv", "file_name", "source_row").writerow(row)
        file = self.folder / item.split / f"{item.name}.txt"
        note_own_lines(file, () if text in item.human_texts else text.splitlines())
        file.write_text(text + "\n", encoding="utf-8")
        return True


class WebDataset(Format):
    """Tar files with an image, a text and a JSON file for each sample."""

    def __init__(self, folder: Path, style: str | None = None, shard_bytes: int = SHARD_BYTES) -> None:
        super().__init__(folder, style)
        self.shard_bytes = shard_bytes
        self._split, self._number, self._bytes = "", 0, 0
        self._tar: tarfile.TarFile | None = None

    def add(self, item: Item) -> bool:
        texts = self.texts(item)
        text = texts.pop("text")
        about = texts | {"width": item.width_px, "height": item.height_px, **item.origin}
        members = {item.suffix: item.image, "json": to_json(add_values(about, item)).encode()}
        members |= {"txt": text.encode()} if text is not None else {}
        tar = self._open_tar(item.split)
        for suffix, data in members.items():
            member = tarfile.TarInfo(f"{item.name}.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            self._bytes += len(data)
        return True

    def close(self) -> None:
        if self._tar:
            self._tar.close()

    def _open_tar(self, split: str) -> tarfile.TarFile:
        if self._tar is None or split != self._split or self._bytes >= self.shard_bytes:
            self.close()
            self._number = self._number + 1 if split == self._split else 0
            self._split, self._bytes = split, 0
            path = self.folder / f"{split}-{self._number:06d}.tar"
            self._tar = tarfile.open(path, "w")  # noqa: SIM115  # open until it is full
        return self._tar


class Llava(Format):
    """A JSON list for each split, with one conversation for each image."""

    def add(self, item: Item) -> bool:
        conversation = []
        for question, answer in self.turns(item, "<image>\n"):
            conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        if not conversation:
            return False
        image = {"id": item.sample_id, "image": self.put_image(item, "images"), **item.origin}
        entry = {**image, "conversations": conversation}
        file = self.file(f"{item.split}.json")
        file.write(("[\n" if file.tell() == 0 else ",\n") + to_json(entry))
        return True

    def close(self) -> None:
        for file in self._files.values():
            file.write("\n]\n")
        super().close()


class ShareGpt(Format):
    """JSON lines with messages and the paths of images."""

    def add(self, item: Item) -> bool:
        dialog = []
        for question, answer in self.turns(item, "<image>"):
            dialog += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if not dialog:
            return False
        row = {"messages": dialog, "images": [self.put_image(item, "images")], **item.origin}
        self.file(f"{item.split}.jsonl").write(to_json(row) + "\n")
        return True


class Coco(Format):
    """COCO's JSON with captions, and with boxes as instances. All entries stay in memory until the end."""

    def __init__(self, folder: Path, style: str | None = None) -> None:
        super().__init__(folder, style)
        # Keys: the kind (captions or instances), and the split.
        self._images: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._annotations: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._count = 0
        self._licenses: dict[str, int] = {}

    def add(self, item: Item) -> bool:
        captions = [{"caption": text, WRITTEN_BY: item.writer(text)} for _, text in self.captions(item)]
        if not captions and item.boxes is None:
            return False
        self._count += 1
        self.put_image(item, f"images/{item.split}")
        image = {
            "id": self._count,
            "file_name": item.file_name,
            "width": item.width_px,
            "height": item.height_px,
            "license": self._licenses.setdefault(item.license, len(self._licenses) + 1),
            "source_row": item.source_row,
        }
        if captions:
            self._add_annotations(("captions", item.split), image, captions)
        # If the model was asked for boxes, an image without boxes is a negative example.
        if item.boxes is not None:
            self._add_annotations(("instances", item.split), image, [*map(_coco_instance, item.boxes)])
        return True

    def _add_annotations(
        self, part: tuple[str, str], image: dict[str, Any], annotations: list[dict[str, Any]]
    ) -> None:
        self._images.setdefault(part, []).append(image)
        stored = self._annotations.setdefault(part, [])
        for annotation in annotations:
            stored.append({"id": len(stored) + 1, "image_id": image["id"], **annotation})

    def close(self) -> None:
        licenses = [{"id": number, "name": name} for name, number in self._licenses.items()]
        instances = [a for (kind, _), part in self._annotations.items() if kind == "instances" for a in part]
        # Sort the labels, so that category ids do not depend on the order of images.
        labels = sorted({instance["category"] for instance in instances})
        category_ids = {label: number for number, label in enumerate(labels, 1)}
        categories = [{"id": number, "name": label} for label, number in category_ids.items()]
        for instance in instances:
            instance["category_id"] = category_ids[instance.pop("category")]
        for (kind, split), images in self._images.items():
            annotations = self._annotations[kind, split]
            values = {"info": {}, "licenses": licenses, "images": images, "annotations": annotations}
            values |= {"categories": categories} if kind == "instances" else {}
            self.file(f"annotations/{kind}_{split}.json").write(to_json(values) + "\n")
        super().close()


def _coco_instance(box: dict[str, Any]) -> dict[str, Any]:
    left, top, right, bottom = next(box[name] for name in BOX_FIELDS if name in box)
    width, height = right - left, bottom - top
    label = str(box.get("label") or "object")
    return {"category": label, "bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}


class Csv(Format):
    """A CSV file per split with the column names of open_clip: one line per caption."""

    def add(self, item: Item) -> bool:
        captions = self.captions(item)
        if not captions:
            return False
        path = self.put_image(item, "images")
        writer = self.table(f"{item.split}.csv", "filepath", "title", "style", WRITTEN_BY, "source_row")
        rows = ([path, text, style, item.writer(text), item.source_row] for style, text in captions)
        writer.writerows(rows)
        return True


class TableFormat(Format):
    """Base of formats that write tables with the images in the rows."""

    SCHEMA: pa.Schema

    def __init__(self, folder: Path, style: str | None = None) -> None:
        super().__init__(folder, style)
        self._split = ""
        self._rows: list[dict[str, Any]] = []

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        """Return the rows for an image without the column `sample_id`."""
        raise NotImplementedError

    def write(self, rows: pa.Table, split: str) -> None:
        """Append rows to the table of a split. The rows of a split are contiguous."""
        raise NotImplementedError

    def add(self, item: Item) -> bool:
        if item.split != self._split or len(self._rows) >= ITEM_BATCH:
            self._flush()
        self._split = item.split
        rows = self.rows_of(item)
        self._rows += [{"sample_id": item.sample_id, **row, **item.origin} for row in rows]
        return bool(rows)

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._rows:
            self.write(pa.Table.from_pylist(self._rows, schema=self.SCHEMA), self._split)
        self._rows = []


class ParquetFormat(TableFormat):
    """Base of formats that are Parquet files for `datasets`."""

    _writer: SplitWriter | None = None

    def write(self, rows: pa.Table, split: str) -> None:
        if self._writer is None or self._writer.split != split:
            self._end_split()
            self._writer = SplitWriter(self.folder, split, self.SCHEMA)
        self._writer.add(rows)

    def close(self) -> None:
        super().close()
        self._end_split()

    def _end_split(self) -> None:
        if self._writer:
            self._writer.close()


class Cauldron(ParquetFormat):
    """The columns of The Cauldron and FineVision: images, and turns between a user and an assistant."""

    SCHEMA = pa.schema(
        {
            "sample_id": STRING,
            "images": pa.list_(IMAGE),
            "texts": pa.list_(pa.struct(fields(STRING, "user", "assistant"))),
            "license": STRING,
            "source_row": STRING,
        }
    )

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        texts = [{"user": question, "assistant": answer} for question, answer in self.turns(item)]
        images = [{"bytes": item.image, "path": None}]
        return [{"images": images, "texts": texts}] if texts else []


class Preferences(ParquetFormat):
    """The columns of TRL's DPOTrainer: one row per pair of a chosen and a rejected caption."""

    SCHEMA = pa.schema(
        [
            pa.field("sample_id", STRING),
            pa.field("image", IMAGE),
            *fields(pa.list_(MESSAGE), "prompt", "chosen", "rejected"),
            *fields(STRING, "license", "source_row"),
        ]
    )

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        rows = []
        for style, better, worse in item.pairs:
            if self.style in (None, style):
                prompt, chosen = messages(turns([(style, better)], []))
                _, rejected = messages(turns([(style, worse)], []))
                dialog = {"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]}
                rows.append({"image": {"bytes": item.image, "path": None}, **dialog})
        return rows


class Lance(TableFormat):
    """A Lance dataset for each split: one row per image, with all texts and values."""

    SCHEMA = pa.schema(
        [
            pa.field("sample_id", STRING),
            pa.field("image", pa.binary()),
            *fields(pa.int32(), "width", "height"),
            pa.field("text", STRING),
            pa.field("captions", pa.list_(pa.struct(fields(STRING, "style", "text", WRITTEN_BY)))),
            pa.field("qa", pa.list_(pa.struct(fields(STRING, "question", "answer", WRITTEN_BY)))),
            pa.field("references", pa.list_(STRING)),
            pa.field(REFERENCE_QA, pa.list_(HUMAN_QUESTION)),
            *fields(STRING, "values", "license", "source_row"),  # values of custom tasks are JSON
        ]
    )

    def __init__(self, folder: Path, style: str | None = None) -> None:
        super().__init__(folder, style)
        if find_spec("lance") is None:
            raise ConfigError("the format lance needs the package pylance", hint=install_command("lance"))

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        sizes = {"width": item.width_px, "height": item.height_px}
        return [{"image": item.image, **sizes, **self.texts(item), "values": to_json(item.values)}]

    def write(self, rows: pa.Table, split: str) -> None:
        # Lance warns about each file that it creates.
        os.environ.setdefault("LANCE_LOG", "error")
        import lance

        path = self.folder / f"{split}.lance"
        lance.write_dataset(rows, str(path), mode="append" if path.exists() else "create")


def add_values(row: dict[str, Any], item: Item) -> dict[str, Any]:
    """Add WRITTEN_BY and the values of custom tasks to a row. A name that is already used gets an underscore.

    If a value is named like a text column, WRITTEN_BY is BY_MODEL, so that no source reads it as human.
    """
    has_text_name = not {*CAPTIONS, QUESTION, *ANSWERS}.isdisjoint(item.values)
    row = row | {WRITTEN_BY: BY_MODEL if has_text_name else item.writer(row.get("text") or "")}
    return row | {f"{name}_" if name in row else name: value for name, value in item.values.items()}


def to_json(value: Any) -> str:
    """Return a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=False)


FORMATS: dict[str, Callable[[Path, str | None], Format]] = {
    "imagefolder": ImageFolder,
    "sidecar": Sidecar,
    "webdataset": WebDataset,
    "llava": Llava,
    "sharegpt": ShareGpt,
    "coco": Coco,
    "csv": Csv,
    "cauldron": Cauldron,
    "dpo": Preferences,
    "lance": Lance,
}

PARQUET = "parquet"  # not in FORMATS: all columns are written at once (dataset/publishing.py)
TABLES = (PARQUET, "cauldron", "dpo", "lance")  # images are in the rows
OF_FEW_FILES = ("webdataset", "cauldron", "dpo", "lance")  # formats for a repository of the Hub
