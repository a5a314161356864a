"""The formats of `synth export` (docs/exports.md names the tools that read them).

Each format receives the images one by one, and keeps few of them in memory.
"""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.conversation import MESSAGE, messages, turns
from pipeline.dataset.shards import SplitWriter
from pipeline.formats.items import ITEM_BATCH, Item
from pipeline.storage.sidecars import as_line, note_own_lines
from pipeline.tables import (
    ANSWERS,
    BY_MODEL,
    CAPTIONS,
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


ALL = "all"  # the style that stands for every caption


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Which captions an export writes, and how."""

    style: str | None = None  # captions of one style, or ALL
    image_root: str = ""  # precedes the paths of images in texts and tables


DEFAULTS = ExportOptions()


class Format:
    """Base of all formats. `options.style` selects captions. By default, all are exported."""

    def __init__(self, folder: Path, options: ExportOptions = DEFAULTS) -> None:
        self.folder, self.options = folder, options
        self.style = None if options.style == ALL else options.style
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

    def caption_columns(self, item: Item) -> dict[str, Any]:
        """Return the first caption of each style as `caption_STYLE`, and the size of the image."""
        sizes = {"width": item.width_px, "height": item.height_px}
        return {f"caption_{style}": text for style, text in reversed(self.captions(item))} | sizes

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
        asked = [*turns(self.captions(item), item.questions), *item.value_turns]
        return [(f"{image_token}{question}", answer) for question, answer in asked[:1]] + asked[1:]

    def put_image(self, item: Item, folder: str) -> str:
        """Write an image file, and return its path within the export, or its absolute path."""
        path = self.folder / folder / item.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.image)
        return f"{self.options.image_root}{folder}/{item.file_name}"

    def add_line(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to a file of JSON lines."""
        self.file(name).write(to_json(row) + "\n")

    def file(self, name: str) -> TextIO:
        """Return a text file of the export, and open it on the first call."""
        if name not in self._files:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = path.open("w", encoding="utf-8", newline="")
        return self._files[name]

    def describe(self, entries: dict[str, dict[str, Any]]) -> None:
        """Write dataset_info.json, where LLaMA-Factory finds the files of an export."""
        known = {
            Path(name).stem: {"file_name": name, "formatting": "sharegpt", **entry}
            for name, entry in entries.items()
        }
        (self.folder / "dataset_info.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")

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
        texts = self.texts(item) | self.caption_columns(item) | item.origin
        self.add_line(f"{item.split}/{DRAFT}", add_values({"file_name": item.file_name, **texts}, item))
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
    """A text file next to each image: one caption, or a caption per line. source_rows.csv has the origins."""

    def add(self, item: Item) -> bool:
        captions = captions_of(item, self.options.style)
        if not captions:
            return False
        lines = [as_line(caption) for caption in captions]
        row = [self.put_image(item, item.split), item.source_row]
        self.table("source_rows.csv", "file_name", "source_row").writerow(row)
        file = self.folder / item.split / f"{item.name}.txt"
        is_human = [caption in item.human_texts for caption in captions]
        note_own_lines(file, [line for line, human in zip(lines, is_human, strict=True) if not human])
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return True


def captions_of(item: Item, style: str | None) -> list[str]:
    """Return the captions for a text file: all for the style ALL, else one or none."""
    if style == ALL:
        return [text for _, text in item.captions]
    text = item.caption(style)
    return [] if text is None else [text]


class WebDataset(Format):
    """Tar files with an image, a text and a JSON file for each sample."""

    def __init__(
        self, folder: Path, options: ExportOptions = DEFAULTS, shard_bytes: int = SHARD_BYTES
    ) -> None:
        super().__init__(folder, options)
        self.shard_bytes = shard_bytes
        self._split, self._number, self._bytes = "", 0, 0
        self._tar: tarfile.TarFile | None = None

    def add(self, item: Item) -> bool:
        texts = self.texts(item)
        text = texts.pop("text")
        about = texts | self.caption_columns(item) | item.origin
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
        columns = {"columns": {"messages": "conversations", "images": "image"}}
        self.describe(dict.fromkeys(self._files, columns))
        super().close()


class ShareGpt(Format):
    """JSON lines with messages and the paths of images.

    `SPLIT_dpo.jsonl` has preference pairs, which ms-swift reads as `messages` and `rejected_response`, and
    LLaMA-Factory as `prompt`, `better` and `worse`. `SPLIT_boxes.jsonl` has boxes as `objects` for ms-swift,
    which converts them to the coordinates of its model.
    """

    def add(self, item: Item) -> bool:
        asked = self.turns(item, "<image>")
        if not asked:
            return False
        images = {"images": [self.put_image(item, "images")], **item.origin}
        self.add_line(f"{item.split}.jsonl", {"messages": _dialog(asked), **images})
        for style, better, worse in item.pairs:
            if self.style in (None, style):
                prompt, chosen = _dialog([*turns([(style, better)], [])])
                prompt["content"] = f"<image>{prompt['content']}"
                rejected = chosen | {"content": worse}
                for_swift = {"messages": [prompt, chosen], "rejected_response": worse}
                pair = for_swift | {"prompt": [prompt], "better": chosen, "worse": rejected}
                self.add_line(f"{item.split}_dpo.jsonl", pair | images)
        if item.boxes:
            marks = ", ".join('{"bbox_2d": <bbox>, "label": "<ref-object>"}' for _ in item.boxes)
            found = _dialog([("<image>Find all objects.", f"[{marks}]")])
            objects = {"ref": [*map(_label_of, item.boxes)], "bbox": [*map(_corners_of, item.boxes)]}
            self.add_line(f"{item.split}_boxes.jsonl", {"messages": found, "objects": objects, **images})
        return True

    def close(self) -> None:
        tags = {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        }
        columns = {"messages": "messages", "images": "images"}
        pairs = {"messages": "prompt", "images": "images", "chosen": "better", "rejected": "worse"}
        self.describe(
            {
                name: {"columns": pairs, "tags": tags, "ranking": True}
                if "_dpo." in name
                else {"columns": columns, "tags": tags}
                for name in self._files
                if "_boxes." not in name
            }
        )
        super().close()


def _dialog(asked: list[tuple[str, str]]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in asked for role, text in zip(roles, turn, strict=True)]


class PaliGemma(Format):
    """JSON lines of big_vision: one line per text, with the path of the image."""

    def add(self, item: Item) -> bool:
        asked = self.turns(item)
        image = self.put_image(item, "images") if asked else ""
        for prefix, suffix in asked:
            row = {"image": image, "prefix": prefix, "suffix": suffix, **item.origin}
            self.add_line(f"{item.split}.jsonl", row)
        return bool(asked)


class Coco(Format):
    """COCO's JSON with captions, and with boxes as instances. All entries stay in memory until the end."""

    def __init__(self, folder: Path, options: ExportOptions = DEFAULTS) -> None:
        super().__init__(folder, options)
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


def _label_of(box: dict[str, Any]) -> str:
    return str(box.get("label") or "object")


def _corners_of(box: dict[str, Any]) -> list[int]:
    corners: list[int] = next(box[name] for name in BOX_FIELDS if name in box)
    return corners


def _coco_instance(box: dict[str, Any]) -> dict[str, Any]:
    left, top, right, bottom = _corners_of(box)
    width, height = right - left, bottom - top
    return {
        "category": _label_of(box),
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": 0,
    }


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


class ParquetFormat(Format):
    """Base of formats that are Parquet files for `datasets`, with the images in the rows."""

    COLUMNS: Mapping[str, pa.DataType]  # without those of all formats

    def __init__(self, folder: Path, options: ExportOptions = DEFAULTS) -> None:
        super().__init__(folder, options)
        common = dict.fromkeys(("license", "source_row"), STRING)
        self._schema = pa.schema({"sample_id": STRING, **self.COLUMNS, **common})
        self._rows: list[dict[str, Any]] = []
        self._writer: SplitWriter | None = None

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        """Return the values of COLUMNS for each row of an image."""
        raise NotImplementedError

    def add(self, item: Item) -> bool:
        if self._writer is None or item.split != self._writer.split:
            self.close()
            self._writer = SplitWriter(self.folder, item.split, self._schema)
        elif len(self._rows) >= ITEM_BATCH:
            self._flush(self._writer)
        rows = self.rows_of(item)
        self._rows += [{"sample_id": item.sample_id, **row, **item.origin} for row in rows]
        return bool(rows)

    def close(self) -> None:
        if self._writer:
            self._flush(self._writer)
            self._writer.close()

    def _flush(self, writer: SplitWriter) -> None:
        writer.add(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []


def _stored(item: Item) -> dict[str, Any]:
    """Return an image in the encoding of `datasets`."""
    return {"bytes": item.image, "path": None}


class Cauldron(ParquetFormat):
    """The columns of The Cauldron and FineVision: images, and turns between a user and an assistant."""

    TURN = pa.struct(fields(STRING, "user", "assistant"))
    COLUMNS = MappingProxyType({"images": pa.list_(IMAGE), "texts": pa.list_(TURN)})

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        texts = [{"user": question, "assistant": answer} for question, answer in self.turns(item)]
        return [{"images": [_stored(item)], "texts": texts}] if texts else []


class Messages(ParquetFormat):
    """Conversations as chat templates read them, with `images` as a list."""

    COLUMNS = MappingProxyType({"images": pa.list_(IMAGE), "messages": pa.list_(MESSAGE)})

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        conversation = messages(self.turns(item))
        return [{"images": [_stored(item)], "messages": conversation}] if conversation else []


class Preferences(ParquetFormat):
    """The columns of TRL's DPOTrainer: one row per pair of a chosen and a rejected caption."""

    COLUMNS = MappingProxyType(
        {"image": IMAGE, **dict.fromkeys(("prompt", "chosen", "rejected"), pa.list_(MESSAGE))}
    )

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        rows = []
        for style, better, worse in item.pairs:
            if self.style in (None, style):
                prompt, chosen = messages(turns([(style, better)], []))
                rejected = chosen | {"content": [{"type": "text", "text": worse}]}
                dialog = {"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]}
                rows.append({"image": _stored(item), **dialog})
        return rows


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


FORMATS: dict[str, Callable[[Path, ExportOptions], Format]] = {
    "imagefolder": ImageFolder,
    "sidecar": Sidecar,
    "webdataset": WebDataset,
    "llava": Llava,
    "sharegpt": ShareGpt,
    "messages": Messages,
    "paligemma": PaliGemma,
    "coco": Coco,
    "csv": Csv,
    "cauldron": Cauldron,
    "dpo": Preferences,
}

PARQUET = "parquet"  # not in FORMATS: all columns are written at once (dataset/publishing.py)
TABLES = (PARQUET, "cauldron", "messages", "dpo")  # images are in the rows
OF_FEW_FILES = ("webdataset", "cauldron", "messages", "dpo")  # formats for a repository of the Hub
