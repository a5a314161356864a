"""Read the rows of a version for an export, each as an image with its texts and values."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from pipeline.dataset.conversation import preferred_caption, turns, value_prompts, value_turns
from pipeline.dataset.version import Version, extras_of
from pipeline.errors import ConfigError, ImageError
from pipeline.images.decode import upright_file
from pipeline.tables import BY_HUMAN, BY_MODEL, HUMAN_PROMPTS, REFERENCE_QA, SPLITS

_ID = re.compile(r"[0-9a-f]{64}")
MAX_NAME_BYTES = 200  # file systems allow 255, including the suffix
# Matches "", names and characters that Windows reserves, hidden files, and names like options or ids.
_UNSAFE_NAME = re.compile(
    r"""|con|prn|aux|nul|com\d|lpt\d|[0-9a-f]{64}|[-. ].*|.*[. ]|.*[\\:*?"<>|].*""", re.IGNORECASE
)
ALL = "all"
# An MPO file holds several JPEGs of a camera.
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg"}


@dataclass(frozen=True, slots=True)
class Item:
    """An image of a version with its texts and values."""

    name: str
    suffix: str
    split: str
    image: bytes
    width_px: int
    height_px: int
    license: str
    source_row: str
    sample_id: str  # an invalid id in an untrusted version is replaced by its digest
    captions: Sequence[tuple[str, str]]  # (style, text)
    questions: Sequence[tuple[str, str]]  # (question, answer)
    human_texts: frozenset[str]
    scores: Mapping[str, Mapping[str, Any]]
    references: Sequence[str]
    reference_qa: Sequence[dict[str, Any]] = ()
    values: dict[str, Any] = field(default_factory=dict)
    # Boxes from custom tasks, or None if the model answered no such task.
    boxes: Sequence[dict[str, Any]] | None = None
    value_turns: Sequence[tuple[str, str]] = ()
    # A preference pair is (style, best caption, worst caption).
    pairs: Sequence[tuple[str, str, str]] = ()

    @property
    def origin(self) -> dict[str, str]:
        """The license of the image, and its row in the source."""
        return {"license": self.license, "source_row": self.source_row}

    @property
    def file_name(self) -> str:
        """The name of the image file."""
        return f"{self.name}.{self.suffix}"

    def writer(self, text: str) -> str:
        """Return the writer of a caption or question: BY_MODEL or BY_HUMAN."""
        return BY_HUMAN if text in self.human_texts else BY_MODEL

    @property
    def caption(self) -> str | None:
        """The preferred caption, or None without captions."""
        return preferred_caption(self.captions)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(question, answer) for all texts and values of the image."""
        return [*turns(self.captions, self.questions), *self.value_turns]

    @property
    def single_turns(self) -> list[tuple[str, str]]:
        """(question, answer) for all texts and values. No question refers to an earlier answer."""
        captions = (turn for caption in self.captions for turn in turns([caption], []))
        return [*captions, *self.questions, *self.value_turns]


def choose_texts(item: Item, *, style: str | None, trigger: str, opening: str, only_one: bool) -> Item:
    """Return an item with only the captions and preference pairs of a style.

    The style may be None or ALL to keep all styles. With `only_one`, only the preferred caption is kept,
    unless the style is ALL. `opening` is removed from the captions. Then `trigger` is prepended.
    """

    def edit(text: str) -> str:
        text = remove_opening(text, opening)
        return f"{trigger}, {text}" if trigger else text

    captions = [caption for caption in item.captions if style in (None, ALL, caption[0])]
    if only_one and style != ALL:
        preferred = preferred_caption(captions)
        captions = [caption for caption in captions if caption[1] == preferred][:1]
    pairs = [pair for pair in item.pairs if style in (None, ALL, pair[0])]
    human_texts = item.human_texts | {edit(text) for text in item.human_texts}
    return replace(
        item,
        captions=[(name, edit(text)) for name, text in captions],
        human_texts=human_texts - {edit(text) for _, text in captions if text not in item.human_texts},
        scores={**item.scores, **{edit(text): scores for text, scores in item.scores.items()}},
        pairs=[(name, edit(best), edit(worst)) for name, best, worst in pairs],
    )


def remove_opening(text: str, opening: str) -> str:
    """Remove `opening` from the beginning of a text, ignoring case, unless nothing would be left."""
    rest = text[len(opening) :]
    if not opening or text[: len(opening)].lower() != opening.lower() or rest[:1].isalnum():
        return text
    return rest.lstrip(" ,.:;") or text


def read_items(
    version: Version, splits: Iterable[str] = SPLITS, *, source_names: bool = False
) -> Iterator[Item]:
    """Yield the images of a version, in order. Raises ConfigError if its samples are multi-page documents.

    Files are named by id. With `source_names`, they have their names in the source if these are safe and
    unique.
    """
    columns = version.manifest["columns"]
    if "image" not in columns:
        hint = "use a version of single images"
        raise ConfigError(f"{version.name} consists of decks, which this format does not support", hint=hint)
    own = {column.name: column.kind for column in extras_of(version.manifest).own}
    prompts = value_prompts(version.manifest)
    names = [name for name in columns if name not in ("pages", "source", "context")]
    # Count names in lower case, since some file systems ignore case.
    counts = Counter[str]()
    for _, batch in version.batches(["source_row"]) if source_names else ():
        counts.update(file_name_of(row).casefold() for row in batch["source_row"].to_pylist())
    for split, batch in version.batches(names, splits=splits):
        for row in batch.to_pylist():
            name = file_name_of(row["source_row"]) if source_names else ""
            name = name if counts[name.casefold()] == 1 else ""
            yield _make_item(row, split, own, prompts, name)


def file_name_of(source_row: str) -> str:
    """Return the file name of a row without folders and suffix, or "" if it is not safe for an export.

    Dots become underscores, because WebDataset readers end a name at its first dot.
    """
    stem = unicodedata.normalize("NFC", PurePosixPath(source_row).stem)
    if not stem.isprintable() or _UNSAFE_NAME.fullmatch(stem) or len(stem.encode()) > MAX_NAME_BYTES:
        return ""
    return stem.replace(".", "_")


def _make_item(
    row: dict[str, Any], split: str, own: dict[str, str], prompts: dict[str, tuple[str, str]], name: str
) -> Item:
    sample_id = row["sample_id"]
    captions, questions = row.get("captions") or (), row.get("qa") or ()
    if not _ID.fullmatch(sample_id):
        sample_id = hashlib.sha256(sample_id.encode(errors="surrogatepass")).hexdigest()
    try:
        # Many readers ignore the orientation in EXIF.
        image, kind = upright_file(row["image"]["bytes"])
    except ImageError as error:
        problem = f"cannot read the image {sample_id[:12]}: {error}"
        raise ConfigError(problem, hint="find the damage with `synth check`") from None
    box_lists = [row[task] for task in own if own[task] == "boxes" and row[task] is not None]
    human = [annotation for annotation in (*captions, *questions) if annotation["prompt_id"] in HUMAN_PROMPTS]
    return Item(
        name=name or sample_id,
        suffix=_SUFFIXES.get(kind, kind.lower()),
        split=split,
        image=image,
        width_px=row["width_px"],
        height_px=row["height_px"],
        license=row["license"],
        source_row=row["source_row"],
        sample_id=sample_id,
        captions=[(caption["style"] or "", caption["text"]) for caption in captions],
        questions=[(pair["question"], pair["answer"]) for pair in questions],
        human_texts=frozenset(one.get("text") or one["question"] for one in human),
        scores={one.get("text") or one["question"]: one for one in (*captions, *questions)},
        references=row.get("references") or (),
        reference_qa=row.get(REFERENCE_QA) or (),
        values={task: row[task] for task in own},
        boxes=[box for boxes in box_lists for box in boxes] if box_lists else None,
        value_turns=[*value_turns(row, prompts)],
        pairs=[(one["style"] or "", one["text"], one["rejected"]) for one in captions if one.get("rejected")],
    )
