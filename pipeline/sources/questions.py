"""Tables that repeat an image, or a deck, with every question about it. One sample is one image or deck with its questions.

They are read twice: first the text columns of all rows, then the first row of each image.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.config import Config
from pipeline.sources.base import check_samples
from pipeline.sources.parquet import Tables, stored_split
from pipeline.sources.table_rows import PARTIAL_MESSAGE, build_sample, check_split
from pipeline.types import RawSample, ReferenceQA, Rejected, Source


def open_questions(
    config: Config,
    tables: Tables,
    key: str,
    images: Sequence[str],
    texts: Sequence[str],
    read_question: Callable[[dict[str, Any]], ReferenceQA],
    license: str,
    *,
    decks: bool = False,
) -> Source:
    """Return a source of images with the questions of the rows that share their `key`. Raise SourceError for a missing split.

    `images` are the columns of an image or of pages; `texts` those that `read_question` needs, and `key`.
    """
    split = config.source_split
    check_split(tables, split)

    def rows(start: int) -> Iterator[RawSample | Rejected]:
        questions: dict[tuple[str | None, Any], list[ReferenceQA]] = {}
        yielded = first_row = 0
        for _, file_split, row in tables.rows(texts, split):
            if isinstance(row, Rejected):
                yielded += 1
                if yielded > start:
                    yield row
                continue
            questions.setdefault((file_split, row[key]), []).append(read_question(row))
        if yielded < start:  # pass over images that nobody wants, by their keys alone
            for _, file_split, row in tables.rows((key,), split):
                if yielded == start:
                    break
                yielded += isinstance(row, Rejected) or questions.pop((file_split, row[key]), None) is not None
                first_row += 1
        for name, file_split, row in tables.rows((key, *images), split, first_row):
            if isinstance(row, Rejected):
                yield row
            elif reference_qa := questions.pop((file_split, row[key]), None):  # its first row
                pages = [row[column] for column in images]
                yield build_sample(name, pages, license, stored_split(file_split, split), reference_qa=tuple(reference_qa))

    return Source(
        name=config.source.partition("@")[0],
        revision=tables.revision,
        read=lambda start: check_samples(rows(start)),
        count=lambda: len(set(tables.values(key, split))),
        decks=decks,
        is_partial=tables.is_partial,
        messages=(PARTIAL_MESSAGE.format(name=tables.name),) if tables.is_partial else (),
    )
