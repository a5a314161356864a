"""The formats of exports: each takes images one by one, and keeps in memory no more than it must.

| format | for |
|---|---|
| imagefolder | `datasets.load_dataset("imagefolder", data_dir=...)` |
| sidecar | trainers of diffusion models: a text beside each image |
| webdataset | the package webdataset, open_clip, img2dataset's readers |
| llava | LLaVA's trainers: conversations in JSON |
| sharegpt | LLaMA-Factory and others: messages in JSON lines |
| coco | pycocotools: captions, and boxes as instances |
| csv | open_clip (`--csv-separator ,`): one line a caption |
| cauldron | nanoVLM and other trainers of The Cauldron or FineVision: Parquet with `images` and `texts` |
| lance | Lance and LanceDB: a dataset a split (extra `lance`) |
| dpo | TRL's DPOTrainer: Parquet, one row for each caption that was the best of several, with the worst |
"""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.conversation import MESSAGE, messages, turns
from pipeline.dataset.shards import SplitWriter
from pipeline.dataset.text_columns import ANSWERS, CAPTIONS, QUESTION, REFERENCE_QA
from pipeline.errors import ConfigError
from pipeline.export.items import ROWS_AT_ONCE, Item
from pipeline.install import install_command
from pipeline.storage.own_lines import note_own_lines
from pipeline.tables import BY_MODEL, IMAGE, STRING, WRITTEN_BY, fields
from pipeline.tables import REFERENCE_QA as QUESTION_OF_PEOPLE
from pipeline.tasks.boxes import BOX_FIELDS

DRAFT, LINES_AT_ONCE = ".metadata.jsonl", 10_000
SHARD_BYTES = 500_000_000  # of a tar file, before the next one begins


class Format(Protocol):
    """Writes images and texts to a folder."""

    def add(self, item: Item) -> bool:
        """Write one image with its texts; return whether there was any to write."""

    def close(self) -> None:
        """Finish all files, after the last image."""

    def abandon(self) -> None:
        """Close what is open; what is not finished is not kept for the next time. Does nothing after `close`."""


class _Format:
    """Base of formats: the folder, the style that is wanted, and files that stay open until the end."""

    def __init__(self, folder: Path, style: str | None = None) -> None:
        self.folder, self.style = folder, style
        self._stack = ExitStack()
        self._files: dict[str, TextIO] = {}

    def captions(self, item: Item) -> list[tuple[str, str]]:
        """Return the captions that are wanted: all, or those of a style."""
        return [(style, text) for style, text in item.captions if self.style in (None, style)]

    def caption_entries(self, item: Item) -> list[dict[str, str]]:
        """Return the captions that are wanted as objects, which say who wrote each."""
        return [{"style": style, "text": text, WRITTEN_BY: item.writer(text)} for style, text in self.captions(item)]

    def texts(self, item: Item) -> dict[str, Any]:
        """Return all texts of an image, by column."""
        return {
            "text": item.caption(self.style),
            "captions": self.caption_entries(item),
            "qa": _question_entries(item),
            "references": [*item.references],
            REFERENCE_QA: [*item.reference_qa],
        }

    def put_image(self, item: Item, folder: str) -> str:
        """Write the file of an image, unless an interrupted export has; return its path within the export."""
        path = self.folder / folder / item.file_name
        if not path.exists() or path.read_bytes() != item.image:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(item.image)
        return f"{folder}/{item.file_name}"

    def file(self, name: str) -> TextIO:
        """Return a text file of the export, opened once."""
        if name not in self._files:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            file = self._stack.enter_context((self.folder / name).open("w", encoding="utf-8", newline=""))
            self._files[name] = file
        return self._files[name]

    def line(self, name: str, value: Any) -> None:
        """Append a line of JSON to a file."""
        self.file(name).write(_json(value) + "\n")

    def close(self) -> None:
        """See Format."""
        self._stack.close()

    def abandon(self) -> None:
        """See Format."""
        self._stack.close()


def _question_entries(item: Item) -> list[dict[str, str]]:
    """Return the questions of an image as objects, which say who wrote each."""
    return [{"question": question, "answer": answer, WRITTEN_BY: item.writer(question)} for question, answer in item.questions]


def _with_values(about: dict[str, Any], item: Item) -> dict[str, Any]:
    """Return what a format says of an image with the values of own tasks; a name that the format uses gets an underscore.

    It says who wrote its text; but a value of an own task that has the name of a column of texts is a model's, and so all of
    them. Objects in lists say it by themselves, and references are people's.
    """
    values = item.values
    is_like_text = not {*CAPTIONS, QUESTION, *ANSWERS}.isdisjoint(values)
    about = about | {WRITTEN_BY: BY_MODEL if is_like_text else item.writer(about.get("text") or "")}
    return about | {f"{name}_" if name in about else name: value for name, value in values.items()}


class ImageFolder(_Format):
    """A folder a split, with metadata.parquet: in lines of JSON, `datasets` takes an empty list for one of another type."""

    def add(self, item: Item) -> bool:
        """See Format."""
        self.put_image(item, item.split)
        about = {"file_name": item.file_name, **self.texts(item), "license": item.license, "source_row": item.source_row}
        self.line(f"{item.split}/{DRAFT}", _with_values(about, item))
        return True

    def close(self) -> None:
        """See Format."""
        super().close()
        drafts = sorted(self.folder.glob(f"*/{DRAFT}"))
        if not drafts:  # of splits without a row
            return
        schemas = (table.schema for path in drafts for table in _tables(path))
        schema = pa.unify_schemas([*schemas], promote_options="permissive")
        for path in drafts:
            with pq.ParquetWriter(path.with_name("metadata.parquet"), schema) as writer:
                for rows in _lines(path):
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            path.unlink()


def _lines(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines of a file of JSON, some at a time."""
    with path.open(encoding="utf-8") as file:
        yield from iter(lambda: list(map(json.loads, islice(file, LINES_AT_ONCE))), [])


def _tables(path: Path) -> Iterator[pa.Table]:
    """Yield the lines of a file of JSON as tables, whose schema has what they have."""
    yield from map(pa.Table.from_pylist, _lines(path))


class Sidecar(_Format):
    """A text file beside each image, with one caption."""

    def add(self, item: Item) -> bool:
        """See Format."""
        text = item.caption(self.style)
        if text is None:
            return False
        self.put_image(item, item.split)
        file = self.folder / item.split / f"{item.name}.txt"
        note_own_lines(file, text.splitlines() if text not in item.of_people else ())
        file.write_text(text + "\n", encoding="utf-8")
        return True


class WebDataset(_Format):
    """Tar files with an image, a text and a JSON file for each sample."""

    def __init__(self, folder: Path, style: str | None = None, shard_bytes: int = SHARD_BYTES) -> None:
        super().__init__(folder, style)
        self.shard_bytes = shard_bytes
        self._split, self._number, self._bytes = "", 0, 0
        self._tar: tarfile.TarFile | None = None
        self._path = folder

    def add(self, item: Item) -> bool:
        """See Format."""
        if item.split != self._split or self._bytes >= self.shard_bytes:
            self._next_shard(item.split)
        texts = self.texts(item)
        text = texts.pop("text")
        about = {
            **texts,
            "width": item.width_px,
            "height": item.height_px,
            "license": item.license,
        }
        members = {item.suffix: item.image, "json": _json(_with_values(about, item)).encode()}
        members |= {"txt": text.encode()} if text is not None else {}
        for suffix, data in members.items():
            self._bytes += len(data)
            if self._tar:
                member = tarfile.TarInfo(f"{item.name}.{suffix}")
                member.size = len(data)
                self._tar.addfile(member, io.BytesIO(data))
        return True

    def close(self) -> None:
        """See Format."""
        self._end_shard()
        super().close()

    def abandon(self) -> None:
        """See Format."""
        if self._tar:
            self._tar.close()
        super().abandon()

    def _next_shard(self, split: str) -> None:
        self._end_shard()
        self._number = self._number + 1 if split == self._split else 0
        self._split, self._bytes = split, 0
        self._path = self.folder / f"{split}-{self._number:06d}.tar"
        # A shard that is there was finished by an export that was interrupted later.
        unfinished = self._path.with_suffix(".unfinished")
        self._tar = None if self._path.exists() else tarfile.open(unfinished, "w")  # noqa: SIM115  # until the shard is full

    def _end_shard(self) -> None:
        if self._tar:
            self._tar.close()
            self._path.with_suffix(".unfinished").rename(self._path)
            self._tar = None


class Llava(_Format):
    """A JSON list a split: one conversation for each image."""

    def add(self, item: Item) -> bool:
        """See Format."""
        asked = [*turns(self.captions(item), item.questions)]
        if not asked:
            return False
        conversation = []
        for number, (question, answer) in enumerate(asked):
            image = "<image>\n" if number == 0 else ""
            conversation += [{"from": "human", "value": f"{image}{question}"}, {"from": "gpt", "value": answer}]
        entry = {"id": item.name, "image": self.put_image(item, "images"), "conversations": conversation}
        name = f"{item.split}.json"
        self.file(name).write(("[\n" if self.file(name).tell() == 0 else ",\n") + _json(entry))
        return True

    def close(self) -> None:
        """See Format."""
        for file in self._files.values():
            file.write("\n]\n")
        super().close()


class ShareGpt(_Format):
    """JSON lines of messages with the paths of images."""

    def add(self, item: Item) -> bool:
        """See Format."""
        asked = [*turns(self.captions(item), item.questions)]
        if not asked:
            return False
        messages = []
        for number, (question, answer) in enumerate(asked):
            image = "<image>" if number == 0 else ""
            messages += [{"role": "user", "content": f"{image}{question}"}, {"role": "assistant", "content": answer}]
        self.line(f"{item.split}.jsonl", {"messages": messages, "images": [self.put_image(item, "images")]})
        return True


class Coco(_Format):
    """Captions and boxes as COCO's annotations; lists are held until the end, without pixels."""

    def __init__(self, folder: Path, style: str | None = None) -> None:
        super().__init__(folder, style)
        self._parts: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self._images = 0
        self._licenses: dict[str, int] = {}

    def add(self, item: Item) -> bool:
        """See Format."""
        captions = self.captions(item)
        if not captions and item.boxes is None:
            return False
        part = self._parts.setdefault(item.split, {name: [] for name in ("captions", "instances", "captioned", "boxed")})
        self._images += 1
        self.put_image(item, f"images/{item.split}")
        license_id = self._licenses.setdefault(item.license, len(self._licenses) + 1)
        sizes = {"width": item.width_px, "height": item.height_px, "license": license_id}
        image = {"id": self._images, "file_name": item.file_name, **sizes}
        part["captioned"] += [image] if captions else []
        part["boxed"] += [image] if item.boxes is not None else []  # an image of nothing is an example, too
        for _, text in captions:
            entry = {"id": len(part["captions"]) + 1, "image_id": self._images, "caption": text}
            part["captions"].append(entry | {WRITTEN_BY: item.writer(text)})
        for box in item.boxes or ():
            left, top, right, bottom = next(box[name] for name in BOX_FIELDS if name in box)
            label = str(box.get("label") or "object")
            shape = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top), "iscrowd": 0}
            entry = {"id": len(part["instances"]) + 1, "image_id": self._images, "category": label, **shape}
            part["instances"].append(entry)
        return True

    def close(self) -> None:
        """See Format."""
        licenses = [{"id": number, "name": name} for name, number in self._licenses.items()]
        # In the order of their names, which no image decides.
        labels = sorted({entry["category"] for part in self._parts.values() for entry in part["instances"]})
        number_of = {label: number for number, label in enumerate(labels, 1)}
        categories = [{"id": number, "name": label} for label, number in number_of.items()]
        for split, part in self._parts.items():
            for entry in part["instances"]:
                entry["category_id"] = number_of[entry.pop("category")]
            for kind, images in (("captions", part["captioned"]), ("instances", part["boxed"])):
                if images:
                    values = {"info": {}, "licenses": licenses, "images": images, "annotations": part[kind]}
                    values |= {"categories": categories} if kind == "instances" else {}
                    self.file(f"annotations/{kind}_{split}.json").write(_json(values) + "\n")
        super().close()


class Csv(_Format):
    """A table a split, with the names of columns that open_clip reads by default: one line a caption."""

    def add(self, item: Item) -> bool:
        """See Format."""
        captions = self.captions(item)
        if not captions:
            return False
        file, path = self.file(f"{item.split}.csv"), self.put_image(item, "images")
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(["filepath", "title", "style", WRITTEN_BY])
        writer.writerows([path, text, style, item.writer(text)] for style, text in captions)
        return True


class _Parquet(_Format):
    """Base of formats that are Parquet files a split, as `datasets` reads them, with the images in the rows."""

    SCHEMA: pa.Schema

    def __init__(self, folder: Path, style: str | None = None) -> None:
        super().__init__(folder, style)
        self._rows: list[dict[str, Any]] = []
        self._writer: SplitWriter | None = None

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        """Return the rows about one image."""
        raise NotImplementedError

    def add(self, item: Item) -> bool:
        """See Format."""
        if self._writer is None or self._writer.split != item.split:
            self._end_split()
            self._writer = SplitWriter(self.folder, item.split, self.SCHEMA)
        rows = self.rows_of(item)
        self._rows += [{"sample_id": item.name, **row} for row in rows]
        if len(self._rows) >= ROWS_AT_ONCE:
            self._write()
        return bool(rows)

    def close(self) -> None:
        """See Format."""
        self._end_split()
        super().close()

    def abandon(self) -> None:
        """See Format."""
        if self._writer:
            self._writer.close()
        super().abandon()

    def _end_split(self) -> None:
        if self._writer:
            self._write()
            self._writer.close()
            self._writer = None

    def _write(self) -> None:
        if self._writer and self._rows:
            self._writer.add(pa.Table.from_pylist(self._rows, schema=self.SCHEMA))
        self._rows = []


class Cauldron(_Parquet):
    """The columns of The Cauldron and FineVision: images, and turns of a user and an assistant."""

    TURN = pa.struct(fields(STRING, "user", "assistant"))
    SCHEMA = pa.schema(
        [
            pa.field("sample_id", STRING),
            pa.field("images", pa.list_(IMAGE)),
            pa.field("texts", pa.list_(TURN)),
            pa.field("source", STRING),
        ]
    )

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        """See _Parquet."""
        texts = [{"user": asked, "assistant": answer} for asked, answer in turns(self.captions(item), item.questions)]
        images = [{"bytes": item.image, "path": None}]
        return [{"images": images, "texts": texts, "source": item.source_row}] if texts else []


class Preferences(_Parquet):
    """The columns of TRL's DPOTrainer: a row for each pair of a better and a worse caption."""

    SCHEMA = pa.schema(
        [
            pa.field("sample_id", STRING),
            pa.field("image", IMAGE),
            *fields(pa.list_(MESSAGE), "prompt", "chosen", "rejected"),
        ]
    )

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        """See _Parquet."""
        rows = []
        for style, better, worse in item.pairs:
            if self.style in (None, style):
                (asked, chosen), (_, rejected) = (messages(turns([(style, text)], [])) for text in (better, worse))
                ends = {"prompt": [asked], "chosen": [chosen], "rejected": [rejected]}
                rows.append({"image": {"bytes": item.image, "path": None}, **ends})
        return rows


class Lance(_Format):
    """A Lance dataset a split: a row for each image, with all texts and values."""

    SCHEMA = pa.schema(
        [
            pa.field("sample_id", STRING),
            pa.field("image", pa.binary()),
            *fields(pa.int32(), "width", "height"),
            pa.field("text", STRING),
            pa.field("captions", pa.list_(pa.struct(fields(STRING, "style", "text", WRITTEN_BY)))),
            pa.field("qa", pa.list_(pa.struct(fields(STRING, "question", "answer", WRITTEN_BY)))),
            pa.field("references", pa.list_(STRING)),
            pa.field(REFERENCE_QA, pa.list_(QUESTION_OF_PEOPLE)),
            *fields(STRING, "values", "license", "source_row"),  # values of own tasks are JSON
        ]
    )

    def __init__(self, folder: Path, style: str | None = None) -> None:
        super().__init__(folder, style)
        if find_spec("lance") is None:
            raise ConfigError("this format is written by the package pylance", hint=install_command("lance"))
        self._rows: list[dict[str, Any]] = []
        self._split = ""
        self._begun: set[str] = set()

    def add(self, item: Item) -> bool:
        """See Format."""
        if item.split != self._split or len(self._rows) >= ROWS_AT_ONCE:
            self._write()
            self._split = item.split
        about = {"license": item.license, "source_row": item.source_row, "values": _json(item.values)}
        sizes = {"width": item.width_px, "height": item.height_px}
        self._rows.append({"sample_id": item.sample_id, "image": item.image, **sizes, **self.texts(item), **about})
        return True

    def close(self) -> None:
        """See Format."""
        self._write()
        super().close()

    def _write(self) -> None:
        if self._rows:
            os.environ.setdefault("LANCE_LOG", "error")  # it warns of each file that it makes
            import lance

            mode = "append" if self._split in self._begun else "overwrite"  # of an export that was interrupted
            table = pa.Table.from_pylist(self._rows, schema=self.SCHEMA)
            lance.write_dataset(table, str(self.folder / f"{self._split}.lance"), mode=mode)
            self._begun.add(self._split)
        self._rows = []


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


OF_FEW_FILES = ("webdataset", "cauldron", "dpo", "lance")  # which a repository of the Hub may hold


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
