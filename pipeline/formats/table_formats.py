"""Formats of exports that are tables: images and texts in Parquet, or in Lance."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.dataset.conversation import MESSAGE, messages, turns
from pipeline.dataset.shards import SplitWriter
from pipeline.errors import ConfigError
from pipeline.formats.base import Format, to_json
from pipeline.formats.items import ROWS_AT_ONCE, Item
from pipeline.install import install_command
from pipeline.tables import IMAGE, QUESTION_OF_PEOPLE, REFERENCE_QA, STRING, WRITTEN_BY, fields


class ParquetFormat(Format):
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


class Cauldron(ParquetFormat):
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
        """See ParquetFormat."""
        texts = [{"user": asked, "assistant": answer} for asked, answer in turns(self.captions(item), item.questions)]
        images = [{"bytes": item.image, "path": None}]
        return [{"images": images, "texts": texts, "source": item.source_row}] if texts else []


class Preferences(ParquetFormat):
    """The columns of TRL's DPOTrainer: a row for each pair of a better and a worse caption."""

    SCHEMA = pa.schema(
        [
            pa.field("sample_id", STRING),
            pa.field("image", IMAGE),
            *fields(pa.list_(MESSAGE), "prompt", "chosen", "rejected"),
        ]
    )

    def rows_of(self, item: Item) -> list[dict[str, Any]]:
        """See ParquetFormat."""
        rows = []
        for style, better, worse in item.pairs:
            if self.style in (None, style):
                (asked, chosen), (_, rejected) = (messages(turns([(style, text)], [])) for text in (better, worse))
                ends = {"prompt": [asked], "chosen": [chosen], "rejected": [rejected]}
                rows.append({"image": {"bytes": item.image, "path": None}, **ends})
        return rows


class Lance(Format):
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
        about = {"license": item.license, "source_row": item.source_row, "values": to_json(item.values)}
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

            mode = "append" if self._split in self._begun else "create"
            table = pa.Table.from_pylist(self._rows, schema=self.SCHEMA)
            lance.write_dataset(table, str(self.folder / f"{self._split}.lance"), mode=mode)
            self._begun.add(self._split)
        self._rows = []
