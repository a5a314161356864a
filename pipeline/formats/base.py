"""What all formats of exports have in common."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from pipeline.formats.items import Item
from pipeline.tables import ANSWERS, BY_MODEL, CAPTIONS, QUESTION, REFERENCE_QA, WRITTEN_BY


class Format:
    """Writes images and texts to a folder: in the captions of a style, if one is named; files stay open until the end."""

    def __init__(self, folder: Path, style: str | None = None) -> None:
        self.folder, self.style = folder, style
        self._stack = ExitStack()
        self._files: dict[str, TextIO] = {}

    def add(self, item: Item) -> bool:
        """Write one image with its texts; return whether there was any to write."""
        raise NotImplementedError

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
        """Write the file of an image; return its path within the export."""
        path = self.folder / folder / item.file_name
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
        self.file(name).write(to_json(value) + "\n")

    def close(self) -> None:
        """Finish all files, after the last image."""
        self._stack.close()

    def abandon(self) -> None:
        """Close what is open. Does nothing after `close`."""
        self._stack.close()


def _question_entries(item: Item) -> list[dict[str, str]]:
    """Return the questions of an image as objects, which say who wrote each."""
    return [{"question": question, "answer": answer, WRITTEN_BY: item.writer(question)} for question, answer in item.questions]


def with_values(about: dict[str, Any], item: Item) -> dict[str, Any]:
    """Return what a format says of an image with the values of own tasks; a name that the format uses gets an underscore.

    It says who wrote its text; but a value of an own task that has the name of a column of texts is a model's, and so all of
    them. Objects in lists say it by themselves, and references are people's.
    """
    values = item.values
    is_like_text = not {*CAPTIONS, QUESTION, *ANSWERS}.isdisjoint(values)
    about = about | {WRITTEN_BY: BY_MODEL if is_like_text else item.writer(about.get("text") or "")}
    return about | {f"{name}_" if name in about else name: value for name, value in values.items()}


def to_json(value: Any) -> str:
    """Return a value as a line of JSON."""
    return json.dumps(value, ensure_ascii=False)
