"""Decontamination: find images and texts of other data sets, such as the test set of a benchmark.

Images are matched by their bytes or by their PDQ hashes. An equal text about another image is not a leak by itself, and is only
marked: "A man rides a bike." is true of many images.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.images.decode import image_id
from pipeline.images.similarity import MAX_NEAR_BITS, Hashes, as_hashes, hamming_distances
from pipeline.text.content_keys import content_words
from pipeline.text.normalize import strip_opening, words_of
from pipeline.types import Sample

NGRAM_WORDS = 5  # words in a row
MIN_WORDS = 8  # shorter texts are compared as a whole only
MIN_SHARE = 0.7  # of a text's n-grams, to count as repeated


def exclusion_rows(name: str, samples: Iterable[Sample]) -> Iterator[dict[str, Any]]:
    """Yield one row (tables.EXCLUSIONS) for each image of a data set; the row of a deck's first page holds its texts."""
    for sample in samples:
        texts = [*sample.references, *(pair.question for pair in sample.reference_qa or ())]
        for n, image in enumerate(sample.images):
            pdq_hash = sample.pdq_hashes[n] if sample.pdq_hashes else b""
            yield {"name": name, "image_id": image_id(image), "pdq_hash": pdq_hash, "texts": texts if n == 0 else []}


@dataclass(slots=True)
class ExclusionIndex:
    """Images that must not be trained on (tables.EXCLUSIONS), by sha256 and by PDQ hash."""

    ids: dict[str, str] = field(default_factory=dict)  # sha256 of an image -> the data set that holds it
    hashes: Hashes = field(default_factory=lambda: np.empty((0, 4), np.uint64))
    names: list[str] = field(default_factory=list)  # of the data set of each hash
    near_bits: int = 0

    @classmethod
    def of(cls, table: pa.Table, kind: str | None) -> "ExclusionIndex":
        """Index the images of a table. `kind` (similarity.ImageKind) is that of the images to look up; None: by bytes only."""
        rows = table.select(["name", "image_id", "pdq_hash"]).to_pylist()
        hashed_rows = [row for row in rows if row["pdq_hash"] and kind]
        hashes = as_hashes([row["pdq_hash"] for row in hashed_rows])
        names = [row["name"] for row in hashed_rows]
        return cls({row["image_id"]: row["name"] for row in rows}, hashes, names, MAX_NEAR_BITS.get(kind or "", 0))

    def find(self, sample: Sample) -> str | None:
        """Return the data set that has an image of this sample or a near-duplicate of it; None if no data set has."""
        for image in sample.images if self.ids else ():
            if name := self.ids.get(image_id(image)):
                return name
        pdq_hashes = [pdq_hash for pdq_hash in sample.pdq_hashes if pdq_hash]
        if not pdq_hashes or not len(self.hashes):
            return None
        near = np.argwhere(hamming_distances(as_hashes(pdq_hashes), self.hashes) <= self.near_bits)
        return self.names[int(near[0][1])] if len(near) else None


@dataclass(slots=True)
class TextIndex:
    """Texts that must not be trained on (tables.EXCLUSIONS), by content words and by 5-grams of words."""

    names: list[str] = field(default_factory=list)  # the data set of each text
    whole: dict[tuple[str, ...], str] = field(default_factory=dict)  # content words -> data set
    ngrams: dict[tuple[str, ...], set[int]] = field(default_factory=lambda: defaultdict(set))  # 5-gram -> indices into `names`

    @classmethod
    def of(cls, table: pa.Table) -> "TextIndex":
        """Index the texts of a table."""
        index = cls()
        for row in table.select(["name", "texts"]).to_pylist():
            for text in row["texts"]:
                index.whole.setdefault(content_words(text), row["name"])
                for gram in _ngrams(text):
                    index.ngrams[gram].add(len(index.names))
                index.names.append(row["name"])
        return index

    def find(self, text: str) -> str | None:
        """Return the data set that has a text: equal content words, or at least MIN_SHARE of its 5-grams; else None."""
        if (words := content_words(text)) and words in self.whole:
            return self.whole[words]
        if len(words_of(text)) < MIN_WORDS:
            return None
        ngrams = _ngrams(text)
        shared = Counter(n for gram in ngrams for n in self.ngrams.get(gram, ()))
        best = min(shared.items(), key=lambda item: (-item[1], item[0]), default=None)
        return self.names[best[0]] if best and best[1] >= MIN_SHARE * len(ngrams) else None


def _ngrams(text: str) -> set[tuple[str, ...]]:
    words = words_of(strip_opening(text))
    return {tuple(words[start : start + NGRAM_WORDS]) for start in range(len(words) - NGRAM_WORDS + 1)}
