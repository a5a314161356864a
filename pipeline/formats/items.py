"""The rows of a version as exports see them: one image with its texts and values."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.dataset.conversation import preferred_caption
from pipeline.dataset.version import Version, extras_of
from pipeline.errors import ConfigError, ImageError
from pipeline.images.decode import open_image, upright_file
from pipeline.tables import BY_MODEL, BY_PEOPLE, OF_PEOPLE, REFERENCE_QA, SPLITS

ROWS_AT_ONCE = 64  # with their images
_OF_IMAGES = ("sample_id", "image", "width_px", "height_px", "license", "source_row")
COLUMNS = (*_OF_IMAGES, "references", REFERENCE_QA, "captions", "qa")  # that exports have a place for, beside own tasks
_ID = re.compile(r"[0-9a-f]{64}")
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg"}  # MPO: of cameras, several JPEGs in one file; other formats have their own name


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a version with its texts and values."""

    name: str  # of its file, without a suffix: the sample's id
    suffix: str
    split: str
    image: bytes
    width_px: int
    height_px: int
    license: str
    source_row: str
    sample_id: str
    captions: Sequence[tuple[str, str]]  # style and text
    of_people: frozenset[str]  # those captions and questions that people wrote
    questions: Sequence[tuple[str, str]]  # and their answers
    references: Sequence[str]
    reference_qa: Sequence[dict[str, Any]] = ()  # questions of people, with all answers
    values: dict[str, Any] = field(default_factory=dict)  # of own tasks, by name
    boxes: Sequence[dict[str, Any]] | None = None  # of own tasks of that kind; none that was answered is no empty image
    pairs: Sequence[tuple[str, str, str]] = ()  # style of captions, the best of several and the worst

    @property
    def file_name(self) -> str:
        """The name of its file."""
        return f"{self.name}.{self.suffix}"

    def writer(self, text: str) -> str:
        """Return who wrote a caption or a question: BY_MODEL or BY_PEOPLE."""
        return BY_PEOPLE if text in self.of_people else BY_MODEL

    def caption(self, style: str | None) -> str | None:
        """Return the caption of a style, or without one the preferred caption; None if there is none."""
        if style:
            return next((text for of, text in self.captions if of == style), None)
        return preferred_caption(self.captions)


def read_items(version: Version, splits: Iterable[str] = SPLITS) -> Iterator[Item]:
    """Yield the images of a version, in order. Raises ConfigError if it has no pixels, or holds decks."""
    columns = version.manifest["columns"]
    if "image" not in columns:
        if "pages" in columns:
            raise ConfigError(f"{version.name} holds decks, which these formats have no place for", hint="export single images")
        raise no_pixels_error(version)
    own = {column.name: column.kind for column in extras_of(version.manifest).own}
    for split, batch in version.batches([name for name in (*COLUMNS, *own) if name in columns], ROWS_AT_ONCE, splits):
        for row in batch.to_pylist():
            yield _item(row, split, own)


def no_pixels_error(version: Version) -> ConfigError:
    """Return the error to raise for a version without images."""
    return ConfigError(f"{version.name} holds no pixels", hint="say where the images are: --images FOLDER")


def _item(row: dict[str, Any], split: str, own: dict[str, str]) -> Item:
    sample_id = row["sample_id"]
    captions, questions = row.get("captions") or (), row.get("qa") or ()
    # A version may be a stranger's, and its ids anything, even a path.
    name = sample_id if _ID.fullmatch(sample_id) else hashlib.sha256(sample_id.encode(errors="surrogatepass")).hexdigest()
    try:
        image = upright_file(row["image"]["bytes"])  # many readers know nothing of EXIF
        with open_image(image, counts_scans=False) as header:
            kind = header.format or ""
    except ImageError as error:
        raise ConfigError(
            f"the image {sample_id[:12]} cannot be read: {error}", hint="`synth check` says what is damaged"
        ) from None
    answered = [row[task] for task, kind in own.items() if kind == "boxes" and row[task] is not None]
    return Item(
        name=name,
        suffix=_SUFFIXES.get(kind, kind.lower()),
        split=split,
        image=image,
        width_px=row["width_px"],
        height_px=row["height_px"],
        license=row["license"],
        source_row=row["source_row"],
        sample_id=sample_id,
        captions=[(caption["style"] or "", caption["text"]) for caption in captions],
        of_people=frozenset(
            one.get("text") or one["question"] for one in (*captions, *questions) if one["prompt_id"] in OF_PEOPLE
        ),
        questions=[(pair["question"], pair["answer"]) for pair in questions],
        references=row.get("references") or (),
        reference_qa=row.get(REFERENCE_QA) or (),
        values={task: row[task] for task in own},
        pairs=[(one["style"] or "", one["text"], one["rejected"]) for one in captions if one.get("rejected")],
        boxes=[box for boxes in answered for box in boxes] if answered else None,
    )
