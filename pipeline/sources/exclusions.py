"""Decontamination: find images and texts of other datasets, such as the test set of a benchmark.

Images are matched by their bytes or by their PDQ hashes: those of the whole image and of its middle square, as models cut it
out, mirrored or not. An equal text about another image is not a leak by itself, and is only
marked: "A man rides a bike." is true of many images.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import ImageError, SourceError
from pipeline.images.decode import decode_for_hash, image_id, pdq_hash
from pipeline.images.near_duplicates import MAX_NEAR_BITS, Hashes, ImageKind, as_hashes, image_distances
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, find_source, open_source
from pipeline.storage.files import write_table
from pipeline.tables import EXCLUSIONS
from pipeline.text.content_keys import content_words
from pipeline.text.normalize import strip_opening, words_of
from pipeline.types import Rejected, Sample, Source

NGRAM_WORDS = 5  # words in a row
MIN_WORDS = 8  # shorter texts are compared as a whole only
MIN_SHARE = 0.7  # of the n-grams of the shorter text, to count as repeated
CROPS = (1.0, 224 / 256)  # of the shorter side: the middle square, and what is left of it after the usual crop


def exclusion_rows(name: str, samples: Iterable[Sample], kind: ImageKind | None = "photos") -> Iterator[dict[str, Any]]:
    """Yield one row (tables.EXCLUSIONS) for each image of a dataset; the row of a deck's first page holds its texts.

    `kind` is that of the images that are looked for in it: only photographs are cut as models cut them.
    """
    for sample in samples:
        is_photo = kind == "photos" and len(sample.images) == 1
        texts = [*sample.references, *(pair.question for pair in sample.reference_qa or ())]
        for n, image in enumerate(sample.images):
            yield {
                "name": name,
                "image_id": image_id(image),
                "pdq_hash": sample.pdq_hashes[n] if sample.pdq_hashes else b"",
                "crop_hashes": _crop_hashes(image) if is_photo and sample.pdq_hashes else [],
                "texts": texts if n == 0 else [],
            }


def _crop_hashes(data: bytes) -> list[bytes]:
    """Return the PDQ hashes of the middle of an image; none where it has too little detail, or can no longer be decoded."""
    try:
        image = decode_for_hash(data)
    except ImageError:
        return []
    hashes = []
    for share in CROPS:
        side = round(min(image.size) * share)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        hashes.append(pdq_hash(image.crop((left, top, left + side, top + side))))
    return [one for one in hashes if one]


@dataclass(slots=True)
class ExclusionIndex:
    """Images that must not be trained on (tables.EXCLUSIONS), by sha256 and by PDQ hash."""

    ids: dict[str, str] = field(default_factory=dict)  # sha256 of an image -> the dataset that holds it
    hashes: Hashes = field(default_factory=lambda: np.empty((0, 4), np.uint64))
    names: list[str] = field(default_factory=list)  # of the dataset of each hash
    kind: ImageKind | None = None  # of the images to look up

    @classmethod
    def of(cls, table: pa.Table, kind: ImageKind | None) -> "ExclusionIndex":
        """Index the images of a table. `kind` is that of the images to look up; None: by bytes only."""
        rows = table.drop_columns(["texts"]).to_pylist()
        hashed = [
            (one, row["name"])
            for row in rows
            for one in (row["pdq_hash"], *(row["crop_hashes"] if kind == "photos" else ()))
            if one and kind
        ]
        hashes = as_hashes([one for one, _ in hashed])
        return cls({row["image_id"]: row["name"] for row in rows}, hashes, [name for _, name in hashed], kind)

    def find(self, sample: Sample) -> str | None:
        """Return the dataset that has an image of this sample or a near-duplicate of it; None if no dataset has."""
        for image in sample.images if self.ids else ():
            if name := self.ids.get(image_id(image)):
                return name
        pdq_hashes = [pdq_hash for pdq_hash in sample.pdq_hashes if pdq_hash]
        if not pdq_hashes or self.kind is None or not len(self.hashes):
            return None
        distances = image_distances(as_hashes(pdq_hashes), self.hashes, mirrored=self.kind == "photos")
        near = np.argwhere(distances <= MAX_NEAR_BITS[self.kind])
        return self.names[int(near[0][1])] if len(near) else None


@dataclass(slots=True)
class TextIndex:
    """Texts that must not be trained on (tables.EXCLUSIONS), by content words and by 5-grams of words."""

    names: list[str] = field(default_factory=list)  # the dataset of each text
    ngram_counts: list[int] = field(default_factory=list)  # of each text
    whole: dict[tuple[str, ...], str] = field(default_factory=dict)  # content words -> dataset
    ngrams: dict[tuple[str, ...], set[int]] = field(default_factory=lambda: defaultdict(set))  # 5-gram -> indices into `names`

    @classmethod
    def of(cls, table: pa.Table) -> "TextIndex":
        """Index the texts of a table."""
        index = cls()
        for row in table.select(["name", "texts"]).to_pylist():
            for text in row["texts"]:
                index.whole.setdefault(content_words(text), row["name"])
                ngrams = _ngrams(text) if len(words_of(text)) >= MIN_WORDS else set()
                for gram in ngrams:
                    index.ngrams[gram].add(len(index.names))
                index.names.append(row["name"])
                index.ngram_counts.append(len(ngrams))
        return index

    def find(self, text: str) -> str | None:
        """Return the dataset that has a text, or a part of it, or has it as a part; else None.

        Two texts are equal by their content words, or share MIN_SHARE of the 5-grams of the shorter one.
        """
        if (words := content_words(text)) and words in self.whole:
            return self.whole[words]
        if len(words_of(text)) < MIN_WORDS:
            return None
        ngrams = _ngrams(text)
        shared = Counter(n for gram in ngrams for n in self.ngrams.get(gram, ()))
        repeated = [n for n, count in shared.items() if count >= MIN_SHARE * min(len(ngrams), self.ngram_counts[n])]
        return self.names[min(repeated)] if repeated else None


def _ngrams(text: str) -> set[tuple[str, ...]]:
    words = words_of(strip_opening(text))
    return {tuple(words[start : start + NGRAM_WORDS]) for start in range(len(words) - NGRAM_WORDS + 1)}


def parse_exclusion(name: str) -> tuple[str, str | None]:
    """Return the source and the split that `SOURCE#SPLIT` names; without a split, the usual one of a benchmark, or all."""
    source, _, split = name.partition("#")
    return source, split or find_source(source).usual_split


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A source of --exclude that is open: as it was given, and under its own name."""

    given: str
    label: str
    source: Source


def open_exclusions(config: Config) -> list[Exclusion]:
    """Open the sources of --exclude; no row is read."""
    opened = []
    for given in config.exclude:
        name, split = parse_exclusion(given)
        supported = find_source(name).options
        kept = ("allow_urls", "allow_partial", "frame_seconds")
        options: dict[str, Any] = {option: getattr(config, option) for option in kept if option in supported}
        source = open_source(resolve(source=name, source_split=split, **options))
        opened.append(Exclusion(given, f"{source.name}#{split}" if split else source.name, source))
    return opened


def write_exclusions(
    dataset: DatasetDir, config: Config, exclusions: Sequence[Exclusion], progress: Progress
) -> list[dict[str, Any]]:
    """Read the sources of --exclude; return what they are: names, revisions, and numbers of images and texts.

    Raises SourceError if no image of one of them can be read.
    """
    described: list[dict[str, Any]] = []
    kind = choose_image_kind(config)

    def tables() -> Iterator[pa.Table]:
        for exclusion in exclusions:
            label, rows, unread = exclusion.label, list[dict[str, Any]](), 0
            for sample in exclusion.source.rows:
                if isinstance(sample, Rejected):
                    unread += 1
                else:
                    rows += exclusion_rows(label, [sample], kind)
                    progress(f"exclude {label}", len(rows), None)
            if not rows:
                problem = f"no image of {exclusion.given} could be read, so none would be left out"
                raise SourceError(problem, hint="check --exclude")
            if unread:
                progress.warn(f"exclude {label}: {unread} rows could not be read, and are not compared with")
            counts = {"images": len(rows), "texts": sum(len(row["texts"]) for row in rows), "unread": unread}
            described.append({"name": label, "revision": exclusion.source.revision, **counts})
            yield pa.Table.from_pylist(rows, schema=EXCLUSIONS)

    write_table(dataset.step_file("read", "exclusions"), tables(), EXCLUSIONS)
    return described
