"""Compute a report's figures: the funnel, and distributions before and after balance."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.dataset.directory import OUTPUTS, DatasetDir
from pipeline.dataset.images import ImageStore
from pipeline.errors import StoreError
from pipeline.report.rows import to_pylist
from pipeline.storage.files import open_table
from pipeline.text.escape import visible
from pipeline.text.normalize import words_of

MAX_BARS = 15
MAX_COUNTED_TEXTS = 200_000  # if there are more texts, a random sample is counted
MAX_QUESTION_TYPES = 6
WORDS_PER_BAR = 5
MAX_BAR_WORDS = 60  # longer captions share a bar
_TEXTS = ("clean_text", "clean_question", "clean_answer")


def funnel_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the funnel of a manifest. `adds_up` is true if no row was lost in the step or just before it."""
    kept_before: dict[str, int] = {}
    steps = []
    for step in manifest.get("funnel", []):
        is_complete = step["input"] == step["kept"] + sum(step["rejected"].values())
        follows = step["unit"] != "annotations" or step["input"] == kept_before.get(
            "annotations", step["input"]
        )
        steps.append(step | {"adds_up": is_complete and follows})
        kept_before[step["unit"]] = step["kept"]
    return steps


def steps_match(folder: Path, manifest: dict[str, Any]) -> bool:
    """Return whether the step files in a dataset folder have the row counts in the manifest of a version."""
    dataset = DatasetDir(folder)
    steps = [step for step in manifest.get("funnel", []) if step["unit"] == "annotations"]
    return bool(steps) and all(
        _count_rows(dataset.step_files(step["step"])) == step["kept"] for step in steps
    )


def _count_rows(paths: Iterable[Path]) -> int:
    return sum(open_table(path).metadata.num_rows for path in paths)


def distributions_of(folder: Path) -> list[dict[str, Any]]:
    """Return counts before and after balance: caption lengths, and answers by question type.

    A table has a `title`, the `unit` of its counts, the largest count (`top`), and rows of (name, before,
    after). If a sample of the texts is counted, `unit` states its share. Without step files, return [].
    """
    kept_files, rejected_files = (DatasetDir(folder).step_files("balance", which) for which in OUTPUTS)
    if not kept_files:
        return []
    every = max(1, ceil(_count_rows([*kept_files, *rejected_files]) / MAX_COUNTED_TEXTS))
    # Each is a pair of counts: before and after balance.
    lengths = (Counter[str](), Counter[str]())
    answers: tuple[dict[str, Counter[str]], ...] = (defaultdict(Counter), defaultdict(Counter))
    for paths, sides in ((kept_files, (0, 1)), (rejected_files, (0,))):
        for row in _read(paths, [*_TEXTS, "question_type"], every):
            for side in sides:
                if row["clean_text"] is not None:
                    lengths[side][_length_bar(row["clean_text"])] += 1
                elif row["clean_question"] is not None:
                    answers[side][row["question_type"]][row["clean_answer"].casefold()] += 1
    unit = f", one in {every}" if every > 1 else ""
    by_length = sorted(lengths[0], key=lambda name: int(name.split("-")[0].rstrip("+")))
    common = sorted(answers[0], key=lambda kind: (-answers[0][kind].total(), kind))[:MAX_QUESTION_TYPES]
    tables = [
        _table("Words per caption", f"captions{unit}", *lengths, by_length),
        *(
            _table(_questions_title(kind), f"questions{unit}", answers[0][kind], answers[1][kind])
            for kind in common
        ),
    ]
    return [table for table in tables if table["rows"]]


def images_of(folder: Path, ids: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (sample id, first image) for samples, including rejected ones. Skip missing images."""
    store = ImageStore(folder)
    for sample_id in store.in_order(ids) if ids else ():
        with suppress(StoreError):
            yield sample_id, store.read([sample_id])[0].as_py()[0]


def _read(paths: Iterable[Path], columns: list[str], every: int) -> Iterator[dict[str, Any]]:
    """Yield one random row in `every`."""
    random = np.random.default_rng(0)
    for path in paths:
        for batch in open_table(path, *columns).iter_batches(columns=columns):
            if every > 1:
                batch = batch.filter(pa.array(random.random(batch.num_rows) < 1 / every))
            yield from to_pylist(batch)


def _questions_title(kind: str) -> str:
    # The balance step names the types with few questions "(rare)".
    return f"Answers to other questions {kind}" if kind == "(rare)" else f"Answers to {visible(kind)} …"


def _length_bar(text: str) -> str:
    word_count = len(words_of(text))
    if word_count > MAX_BAR_WORDS:
        return f"{MAX_BAR_WORDS + 1}+"
    first = (max(word_count, 1) - 1) // WORDS_PER_BAR * WORDS_PER_BAR + 1
    return f"{first}-{first + WORDS_PER_BAR - 1}"


def _table(
    title: str, unit: str, before: Counter[str], after: Counter[str], names: Sequence[str] = ()
) -> dict[str, Any]:
    names = names or sorted(before, key=lambda name: (-before[name], name))[:MAX_BARS]
    rows = [(visible(name), before[name], after[name]) for name in names]
    return {
        "title": title,
        "unit": unit,
        "top": max((count for _, count, _ in rows), default=1),
        "rows": rows,
    }
