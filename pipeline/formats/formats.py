"""The formats of exports: each takes images one by one, and keeps in memory no more than it must.

| format | for |
|---|---|
| parquet | readers of Parquet: all columns of the version with its images, as `synth push` sends them |
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
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.conversation import turns
from pipeline.formats.base import Format, to_json, with_values
from pipeline.formats.items import Item
from pipeline.formats.table_formats import Cauldron, Lance, Preferences
from pipeline.storage.sidecars import note_own_lines
from pipeline.tables import WRITTEN_BY
from pipeline.tasks.boxes import BOX_FIELDS

DRAFT, LINES_AT_ONCE = ".metadata.jsonl", 10_000
SHARD_BYTES = 500_000_000  # of a tar file, before the next one begins


class ImageFolder(Format):
    """A folder a split, with metadata.parquet: in lines of JSON, `datasets` takes an empty list for one of another type."""

    def add(self, item: Item) -> bool:
        """See Format."""
        self.put_image(item, item.split)
        about = {"file_name": item.file_name, **self.texts(item), "license": item.license, "source_row": item.source_row}
        self.line(f"{item.split}/{DRAFT}", with_values(about, item))
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
            with pq.ParquetWriter(path.with_name("metadata.parquet").absolute(), schema) as writer:
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


class Sidecar(Format):
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


class WebDataset(Format):
    """Tar files with an image, a text and a JSON file for each sample."""

    def __init__(self, folder: Path, style: str | None = None, shard_bytes: int = SHARD_BYTES) -> None:
        super().__init__(folder, style)
        self.shard_bytes = shard_bytes
        self._split, self._number, self._bytes = "", 0, 0
        self._tar: tarfile.TarFile | None = None

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
        members = {item.suffix: item.image, "json": to_json(with_values(about, item)).encode()}
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

    abandon = close

    def _next_shard(self, split: str) -> None:
        self._end_shard()
        self._number = self._number + 1 if split == self._split else 0
        self._split, self._bytes = split, 0
        self._tar = tarfile.open(self.folder / f"{split}-{self._number:06d}.tar", "w")  # noqa: SIM115  # until the shard is full

    def _end_shard(self) -> None:
        if self._tar:
            self._tar.close()
            self._tar = None


class Llava(Format):
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
        self.file(name).write(("[\n" if self.file(name).tell() == 0 else ",\n") + to_json(entry))
        return True

    def close(self) -> None:
        """See Format."""
        for file in self._files.values():
            file.write("\n]\n")
        super().close()


class ShareGpt(Format):
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


class Coco(Format):
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
                    self.file(f"annotations/{kind}_{split}.json").write(to_json(values) + "\n")
        super().close()


class Csv(Format):
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

PARQUET = "parquet"  # of all columns: written at once, not image by image (dataset/publishing.py)
OF_FEW_FILES = ("webdataset", "cauldron", "dpo", "lance")  # which a repository of the Hub may hold
