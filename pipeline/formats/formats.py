"""The formats of `synth export` (docs/exports.md names the tools that read them)."""

import base64
import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.conversation import MESSAGE, messages, turns
from pipeline.dataset.images import BATCH_SAMPLES
from pipeline.dataset.shards import SplitWriter
from pipeline.formats.items import Item
from pipeline.storage.sidecars import as_line, note_own_lines
from pipeline.tables import (
    ANSWERS,
    BLIND,
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
SHARD_BYTES = 500_000_000
# FineVision's ratings, from 1 to 5, are taken from these fields of a text.
RATINGS = {
    "relevance": "relevance",
    "image_correspondence": "grounding",
    "visual_dependency": BLIND.name,
    "formatting": "form",
}


class Format:
    """Base of all formats. `image_root` is prepended to the image paths that an export lists."""

    def __init__(self, folder: Path, image_root: str = "") -> None:
        self.folder, self.image_root = folder, image_root
        self._files: dict[str, TextIO] = {}

    def add(self, item: Item) -> bool:
        """Write an image with its texts. Return False if the image has no text for this format."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish all files after the last image."""
        for file in self._files.values():
            file.close()

    def put_image(self, item: Item, folder: str) -> str:
        """Write an image file, and return its path within the export, or its absolute path."""
        path = self.folder / folder / item.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.image)
        return f"{self.image_root}{folder}/{item.file_name}"

    def file(self, name: str) -> TextIO:
        """Return a text file of the export, and open it on the first call."""
        if name not in self._files:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = path.open("w", encoding="utf-8", newline="")
        return self._files[name]

    def add_line(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to a file of JSON lines."""
        self.file(name).write(to_json(row) + "\n")

    def add_csv_row(self, name: str, row: dict[str, Any], delimiter: str = ",") -> None:
        """Append a row to a CSV file, which begins with the names of the columns."""
        file = self.file(name)
        writer = csv.DictWriter(file, row, delimiter=delimiter)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)

    def describe(self, entries: dict[str, dict[str, Any]]) -> None:
        """Write dataset_info.json, where LLaMA-Factory finds the files of an export."""
        known = {
            Path(name).stem: {"file_name": name, "formatting": "sharegpt", **entry}
            for name, entry in entries.items()
        }
        (self.folder / "dataset_info.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


class ImageFolder(Format):
    """A folder per split. Its metadata is in Parquet, because `datasets` guesses the types of JSON lines."""

    def add(self, item: Item) -> bool:
        self.put_image(item, item.split)
        row = {"file_name": item.file_name, "text": item.caption, **_columns(item)}
        self.add_line(f"{item.split}/{DRAFT}", _with_values(row, item))
        return True

    def close(self) -> None:
        super().close()
        drafts = [self.folder / name for name in self._files]
        # Merge the schemas of all batches: a list that is empty in a whole batch has no type in its schema,
        # and not every image has captions of all styles.
        schemas = []
        for rows in chain.from_iterable(map(_read_lines, drafts)):
            names = dict.fromkeys(chain.from_iterable(rows))
            schemas.append(pa.table({name: [row.get(name) for row in rows] for name in names}).schema)
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
    """A text file next to each image, with a caption per line. source_rows.csv lists the source rows."""

    def add(self, item: Item) -> bool:
        if not item.captions:
            return False
        image = self.put_image(item, item.split)
        self.add_csv_row("source_rows.csv", {"file_name": image, "source_row": item.source_row})
        file = self.folder / item.split / f"{item.name}.txt"
        note_own_lines(file, [as_line(text) for _, text in item.captions if text not in item.human_texts])
        file.write_text("".join(f"{as_line(text)}\n" for _, text in item.captions), encoding="utf-8")
        return True


class WebDataset(Format):
    """Tar files with an image, a text and a JSON file for each sample."""

    _split, _number, _bytes = "", 0, 0
    _tar: tarfile.TarFile | None = None

    def add(self, item: Item) -> bool:
        members = {item.suffix: item.image, "json": to_json(_with_values(_columns(item), item)).encode()}
        members |= {} if item.caption is None else {"txt": item.caption.encode()}
        if self._tar is None or item.split != self._split or self._bytes >= SHARD_BYTES:
            self.close()
            self._number = self._number + 1 if item.split == self._split else 0
            self._split, self._bytes = item.split, 0
            path = self.folder / f"{item.split}-{self._number:06d}.tar"
            self._tar = tarfile.open(path, "w")  # noqa: SIM115  # open until it is full
        for suffix, data in members.items():
            member = tarfile.TarInfo(f"{item.name}.{suffix}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
            self._bytes += len(data)
        return True

    def close(self) -> None:
        if self._tar:
            self._tar.close()


class Llava(Format):
    """A JSON list for each split, with one conversation for each image."""

    def add(self, item: Item) -> bool:
        roles = {"user": "human", "assistant": "gpt"}
        dialog = _dialog(item.turns, "<image>\n")
        conversation = [{"from": roles[turn["role"]], "value": turn["content"]} for turn in dialog]
        if not conversation:
            return False
        image = {"id": item.sample_id, "image": self.put_image(item, "images"), **item.origin}
        file = self.file(f"{item.split}.json")
        entry = to_json({**image, "conversations": conversation})
        file.write(("[\n" if file.tell() == 0 else ",\n") + entry)
        return True

    def close(self) -> None:
        for file in self._files.values():
            file.write("\n]\n")
        columns = {"columns": {"messages": "conversations", "images": "image"}}
        self.describe(dict.fromkeys(self._files, columns))
        super().close()


class ShareGpt(Format):
    """JSON lines with messages and the paths of images.

    `SPLIT_dpo.jsonl` has preference pairs with the keys of both ms-swift and LLaMA-Factory.
    `SPLIT_boxes.jsonl` has boxes as `objects` for ms-swift.
    """

    def add(self, item: Item) -> bool:
        if not item.turns:
            return False
        images = {"images": [self.put_image(item, "images")], **item.origin}
        self.add_line(f"{item.split}.jsonl", {"messages": _dialog(item.turns, "<image>"), **images})
        for style, better, worse in item.pairs:
            prompt, chosen = _dialog(turns([(style, better)], []), "<image>")
            for_swift = {"messages": [prompt, chosen], "rejected_response": worse}
            pair = {"prompt": [prompt], "better": chosen, "worse": chosen | {"content": worse}}
            self.add_line(f"{item.split}_dpo.jsonl", for_swift | pair | images)
        if item.boxes:
            marks = ", ".join('{"bbox_2d": <bbox>, "label": "<ref-object>"}' for _ in item.boxes)
            found = _dialog([("Find all objects.", f"[{marks}]")], "<image>")
            objects = {"ref": [*map(_label_of, item.boxes)], "bbox": [*map(_corners_of, item.boxes)]}
            self.add_line(f"{item.split}_boxes.jsonl", {"messages": found, "objects": objects, **images})
        return True

    def close(self) -> None:
        tags = {f"{name}_tag": name for name in ("role", "content", "user", "assistant")}
        plain = {"columns": {"messages": "messages", "images": "images"}, "tags": tags}
        columns = {"messages": "prompt", "images": "images", "chosen": "better", "rejected": "worse"}
        ranked = {"columns": columns, "tags": tags, "ranking": True}
        described = [name for name in self._files if "_boxes." not in name]
        self.describe({name: ranked if "_dpo." in name else plain for name in described})
        super().close()


def _dialog(asked: Iterable[tuple[str, str]], image_token: str) -> list[dict[str, str]]:
    """Return turns as messages. The first message begins with `image_token`."""
    dialog: list[dict[str, str]] = []
    for question, answer in asked:
        token = "" if dialog else image_token
        dialog.append({"role": "user", "content": f"{token}{question}"})
        dialog.append({"role": "assistant", "content": answer})
    return dialog


class PaliGemma(Format):
    """JSON lines of big_vision: one line per text, with the path of the image."""

    def add(self, item: Item) -> bool:
        image = self.put_image(item, "images") if item.turns else ""
        for prefix, suffix in item.single_turns:
            row = {"image": image, "prefix": prefix, "suffix": suffix, **item.origin}
            self.add_line(f"{item.split}.jsonl", row)
        return bool(item.turns)


class Coco(Format):
    """COCO's JSON with captions, and with boxes as instances. All entries stay in memory until the end."""

    def __init__(self, folder: Path, image_root: str = "") -> None:
        super().__init__(folder, image_root)
        self._parts: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self._count = 0
        self._licenses: dict[str, int] = {}

    def add(self, item: Item) -> bool:
        captions = [{"caption": text, WRITTEN_BY: item.writer(text)} for _, text in item.captions]
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
            self._add_part(f"captions_{item.split}", image, captions)
        # If the model was asked for boxes, an image without boxes is a negative example.
        if item.boxes is not None:
            instances = []
            for box in item.boxes:
                left, top, right, bottom = _corners_of(box)
                width, height = right - left, bottom - top
                bounds = {"bbox": [left, top, width, height], "area": width * height}
                instances.append({"category": _label_of(box), **bounds, "iscrowd": 0})
            self._add_part(f"instances_{item.split}", image, instances)
        return True

    def _add_part(self, name: str, image: dict[str, Any], annotations: Iterable[dict[str, Any]]) -> None:
        part = self._parts.setdefault(name, {"images": [], "annotations": []})
        part["images"].append(image)
        for annotation in annotations:
            number = len(part["annotations"]) + 1
            part["annotations"].append({"id": number, "image_id": image["id"], **annotation})

    def close(self) -> None:
        licenses = [{"id": number, "name": name} for name, number in self._licenses.items()]
        with_boxes = {name: part for name, part in self._parts.items() if name.startswith("instances_")}
        instances = [instance for part in with_boxes.values() for instance in part["annotations"]]
        # Sort the labels, so that category ids do not depend on the order of images.
        labels = sorted({instance["category"] for instance in instances})
        category_ids = {label: number for number, label in enumerate(labels, 1)}
        categories = [{"id": number, "name": label} for label, number in category_ids.items()]
        for instance in instances:
            instance["category_id"] = category_ids[instance.pop("category")]
        for name, part in self._parts.items():
            values = {"info": {}, "licenses": licenses, **part}
            values |= {"categories": categories} if name in with_boxes else {}
            self.file(f"annotations/{name}.json").write(to_json(values) + "\n")
        super().close()


def _label_of(box: dict[str, Any]) -> str:
    return str(box.get("label") or "object")


def _corners_of(box: dict[str, Any]) -> list[int]:
    corners: list[int] = next(box[name] for name in BOX_FIELDS if name in box)
    return corners


class Csv(Format):
    """A CSV file per split with the column names of open_clip: one line per caption."""

    def add(self, item: Item) -> bool:
        path = self.put_image(item, "images") if item.captions else ""
        for style, text in item.captions:
            row = {"filepath": path, "title": text, "style": style, WRITTEN_BY: item.writer(text)}
            self.add_csv_row(f"{item.split}.csv", row | {"source_row": item.source_row})
        return bool(item.captions)


class VlmEvalKit(Format):
    """A TSV file per split with a line per text. Only the first line of an image has its bytes."""

    _num_lines = 0

    def add(self, item: Item) -> bool:
        # In the other lines, the image column has the index of the first line, which has the image.
        image, first = base64.b64encode(item.image).decode(), self._num_lines
        for index, (question, answer) in enumerate(item.single_turns, first):
            values = {"image": image if index == first else first, "question": question, "answer": answer}
            self.add_csv_row(f"{item.split}.tsv", {"index": index, **values, **item.origin}, delimiter="\t")
            self._num_lines += 1
        return self._num_lines > first


class ParquetRows(Format):
    """Parquet files for `datasets` with images in the rows. `rows_of` returns the values of `columns`."""

    def __init__(
        self,
        folder: Path,
        image_root: str = "",
        *,
        columns: dict[str, pa.DataType],
        rows_of: Callable[[Item], list[dict[str, Any]]],
    ) -> None:
        super().__init__(folder, image_root)
        origin = dict.fromkeys(("license", "source_row"), STRING)
        self._schema = pa.schema({"sample_id": STRING, **columns, **origin})
        self._rows_of = rows_of
        self._rows: list[dict[str, Any]] = []
        self._writer: SplitWriter | None = None

    def add(self, item: Item) -> bool:
        if self._writer is None or item.split != self._writer.split:
            self.close()
            self._writer = SplitWriter(self.folder, item.split, self._schema)
        elif len(self._rows) >= BATCH_SAMPLES:
            self._flush(self._writer)
        rows = self._rows_of(item)
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


def _cauldron_rows(item: Item) -> list[dict[str, Any]]:
    """Return an image with its turns and their ratings, as in The Cauldron and FineVision."""
    texts = [{"user": question, "assistant": answer} for question, answer in item.turns]
    keys = [turn[0] if turn in item.questions else turn[1] for turn in item.turns]
    rated = [item.scores.get(key) or {} for key in keys]
    row: dict[str, Any] = {"images": [_stored(item)], "texts": texts}
    for name, score in RATINGS.items():
        ratings = [_as_rating(scores.get(score)) for scores in rated]
        row |= {f"{name}_ratings": ratings, f"{name}_min": min(filter(None, ratings), default=None)}
    return [row] if texts else []


def _as_rating(value: float | None) -> float | None:
    """Return 1 for True (a question was answered without its image), 5 for False, or a score unchanged."""
    return (1 if value else 5) if isinstance(value, bool) else value


def _message_rows(item: Item) -> list[dict[str, Any]]:
    """Return an image with its conversation, as chat templates read it."""
    return [{"images": [_stored(item)], "messages": messages(item.turns)}] if item.turns else []


def _preference_rows(item: Item) -> list[dict[str, Any]]:
    """Return a row of TRL's DPOTrainer for each pair of a chosen and a rejected caption."""
    rows = []
    for style, better, worse in item.pairs:
        prompt, chosen = messages(turns([(style, better)], []))
        rejected = chosen | {"content": [{"type": "text", "text": worse}]}
        dialog = {"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]}
        rows.append({"image": _stored(item), **dialog})
    return rows


def _columns(item: Item) -> dict[str, Any]:
    """Return the texts, size and origin of an image. `caption_STYLE` is the first caption of a style."""
    return {
        "captions": [
            {"style": style, "text": text, WRITTEN_BY: item.writer(text)} for style, text in item.captions
        ],
        "qa": [
            {"question": question, "answer": answer, WRITTEN_BY: item.writer(question)}
            for question, answer in item.questions
        ],
        "references": [*item.references],
        REFERENCE_QA: [*item.reference_qa],
        **{f"caption_{style}": text for style, text in reversed(item.captions)},
        "width": item.width_px,
        "height": item.height_px,
        **item.origin,
    }


def _with_values(row: dict[str, Any], item: Item) -> dict[str, Any]:
    """Add WRITTEN_BY and the values of custom tasks to a row. A used name gets an underscore."""
    # A source would read the value of a custom task with such a name as a human text.
    has_text_name = not {*CAPTIONS, QUESTION, *ANSWERS}.isdisjoint(item.values)
    row = row | {WRITTEN_BY: BY_MODEL if has_text_name else item.writer(row.get("text") or "")}
    return row | {f"{name}_" if name in row else name: value for name, value in item.values.items()}


def to_json(value: Any) -> str:
    """Return a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=False)


_IMAGES, _TURN = pa.list_(IMAGE), pa.struct(fields(STRING, "user", "assistant"))
_RATED = {f"{name}_ratings": pa.list_(pa.int64()) for name in RATINGS}
_RATED |= {f"{name}_min": pa.int64() for name in RATINGS}
_DIALOG = dict.fromkeys(("prompt", "chosen", "rejected"), pa.list_(MESSAGE))
FORMATS: dict[str, Callable[[Path, str], Format]] = {
    "imagefolder": ImageFolder,
    "sidecar": Sidecar,
    "webdataset": WebDataset,
    "llava": Llava,
    "sharegpt": ShareGpt,
    "messages": partial(
        ParquetRows, columns={"images": _IMAGES, "messages": pa.list_(MESSAGE)}, rows_of=_message_rows
    ),
    "paligemma": PaliGemma,
    "vlmevalkit": VlmEvalKit,
    "coco": Coco,
    "csv": Csv,
    "cauldron": partial(
        ParquetRows, columns={"images": _IMAGES, "texts": pa.list_(_TURN), **_RATED}, rows_of=_cauldron_rows
    ),
    "dpo": partial(ParquetRows, columns={"image": IMAGE, **_DIALOG}, rows_of=_preference_rows),
}

# dataset/publishing.py writes this format, so it is not in FORMATS.
PARQUET = "parquet"
TABLES = (PARQUET, "cauldron", "messages", "dpo", "vlmevalkit")
