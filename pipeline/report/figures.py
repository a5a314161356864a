"""Compute a report's figures: the funnel, distributions before and after balance, and duplicate clusters."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import reduce
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.directory import NEAR_DUPLICATES_FILE, OUTPUTS, DatasetDir
from pipeline.dataset.images import ImageStore
from pipeline.errors import StoreError
from pipeline.report.rows import to_pylist
from pipeline.storage.files import open_table
from pipeline.text.content_keys import content_words
from pipeline.text.escape import visible
from pipeline.text.language import FUNCTION_WORDS
from pipeline.text.normalize import words_of

MAX_CLUSTERS = 50  # of each kind
MAX_MEMBERS = 12
MAX_BARS = 15
MAX_COUNTED_TEXTS = 200_000  # if there are more texts, a random sample is counted
MAX_QUESTION_TYPES = 6
WORDS_PER_BAR = 5
MAX_BAR_WORDS = 60  # longer captions share a bar
_TEXTS = ("clean_text", "clean_question", "clean_answer", "clean_record")
_CLUSTER_COLUMNS = [
    "annotation_id", "sample_id", *_TEXTS, "cluster", "duplicate_of", "image_group", "image_reason",
]  # fmt: skip


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
    """Return counts before and after balance: caption lengths, caption words, and answers by question type.

    A table has a `title`, the `unit` of its counts, the largest count (`top`), and rows of (name, before,
    after). If a sample of the texts is counted, `unit` states its share. Without step files, return [].
    """
    kept_files, rejected_files = (DatasetDir(folder).step_files("balance", which) for which in OUTPUTS)
    if not kept_files:
        return []
    every = max(1, ceil(_count_rows([*kept_files, *rejected_files]) / MAX_COUNTED_TEXTS))
    # Each is a pair of counts: before and after balance.
    lengths, words = (Counter[str](), Counter[str]()), (Counter[str](), Counter[str]())
    answers: tuple[dict[str, Counter[str]], ...] = (defaultdict(Counter), defaultdict(Counter))
    for paths, sides in ((kept_files, (0, 1)), (rejected_files, (0,))):
        for row in _read(paths, [*_TEXTS, "question_type"], every=every):
            for side in sides:
                if row["clean_text"] is not None:
                    lengths[side][_length_bar(row["clean_text"])] += 1
                    words[side].update({*content_words(row["clean_text"])} - FUNCTION_WORDS)
                elif row["clean_question"] is not None:
                    answers[side][row["question_type"]][row["clean_answer"].casefold()] += 1
    unit = f", one in {every}" if every > 1 else ""
    by_length = sorted(lengths[0], key=lambda name: int(name.split("-")[0].rstrip("+")))
    common = sorted(answers[0], key=lambda kind: (-answers[0][kind].total(), kind))[:MAX_QUESTION_TYPES]
    tables = [
        _table("Words per caption", f"captions{unit}", *lengths, by_length),
        *(
            _table(f"Answers to {visible(kind)} …", f"questions{unit}", answers[0][kind], answers[1][kind])
            for kind in common
        ),
        _table("Most frequent words", f"captions{unit}", *words),
    ]
    return [table for table in tables if table["rows"]]


def clusters_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the clusters that dedupe found: similar images, duplicate texts of an image, repeated captions.

    Each kind has the number of clusters (`count`), and the largest ones (`shown`). A member has the sample's
    `id`, its `text`, and whether it was `kept`.
    """
    kept_files, rejected_files = (DatasetDir(folder).step_files("dedupe", which) for which in OUTPUTS)
    if not kept_files:
        return {}
    rejected = list(_read(rejected_files, [*_CLUSTER_COLUMNS, "reason"]))
    unasked_files = DatasetDir(folder).step_files("read", NEAR_DUPLICATES_FILE)
    groups = _groups_of_images([*kept_files, *rejected_files, *unasked_files])
    duplicated_ids = {row["duplicate_of"] for row in rejected if row["reason"] == "duplicate"}
    repeated = {row["cluster"] for row in rejected if row["reason"] == "caption_of_many_images"}
    images: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    texts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    captions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    clustered = {"image_group": groups, "annotation_id": duplicated_ids, "cluster": repeated}
    for is_kept, rows in (
        (True, _read(kept_files, _CLUSTER_COLUMNS, among=clustered)),
        (False, iter(rejected)),
    ):
        for row in rows:
            text = visible(" ".join(row[name] for name in _TEXTS if row.get(name)))
            member = {"id": row["sample_id"], "text": text, "kept": is_kept}
            if row["image_group"] in groups:
                images[row["image_group"]].setdefault(row["sample_id"], _image_member(row))
            if row["annotation_id"] in duplicated_ids:
                texts[row["annotation_id"]].insert(0, member)
            elif not is_kept and row["reason"] == "duplicate":
                texts[row["duplicate_of"]].append(member)
            is_repeated = row["cluster"] in repeated and row["clean_text"] is not None
            if is_repeated and (is_kept or row["reason"] == "caption_of_many_images"):
                captions[row["cluster"]].append(member)
    for row in _read(unasked_files, ["sample_id", "image_group", "image_reason"]):
        images[row["image_group"]].setdefault(row["sample_id"], _image_member(row))
    return {
        "Similar images": _largest([list(members.values()) for members in images.values()]),
        "Duplicate texts of one image": _largest(list(texts.values())),
        "Captions of too many images": _largest(list(captions.values())),
    }


def images_of(folder: Path, ids: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (sample id, first image) for samples, including rejected ones. Skip missing images."""
    store = ImageStore(folder)
    for sample_id in store.in_order(ids) if ids else ():
        with suppress(StoreError):
            yield sample_id, store.read([sample_id])[0].as_py()[0]


def _image_member(row: dict[str, Any]) -> dict[str, Any]:
    reason = (row["image_reason"] or "").replace("_", " ")
    return {"id": row["sample_id"], "text": reason, "kept": not reason}


def _groups_of_images(paths: Iterable[Path]) -> set[str]:
    """Return the image groups that have several samples."""
    columns = ["image_group", "sample_id"]
    tables = [open_table(path, *columns).read(columns) for path in paths]
    groups = pa.concat_tables(tables, promote_options="permissive")  # their schemas differ in nullability
    counts = groups.group_by("image_group").aggregate([("sample_id", "count_distinct")])
    return set(counts.filter(pc.greater(counts["sample_id_count_distinct"], 1))["image_group"].to_pylist())


def _read(
    paths: Iterable[Path], columns: list[str], every: int = 1, among: dict[str, set[str]] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield one random row in `every`. `among` maps columns to the values that select a row."""
    random = np.random.default_rng(0)
    for path in paths:
        for batch in open_table(path, *columns).iter_batches(columns=columns):
            if every > 1:
                batch = batch.filter(pa.array(random.random(batch.num_rows) < 1 / every))
            if among is not None:
                masks = [
                    pc.is_in(batch[name], pa.array(values, pa.string())) for name, values in among.items()
                ]
                batch = batch.filter(reduce(pc.or_, masks))
            yield from to_pylist(batch)


def _largest(clusters: list[list[dict[str, Any]]]) -> dict[str, Any]:
    ordered = sorted(clusters, key=lambda members: (-len(members), members[0]["id"], members[0]["text"]))
    shown = [{"size": len(members), "members": members[:MAX_MEMBERS]} for members in ordered[:MAX_CLUSTERS]]
    return {"count": len(clusters), "shown": shown}


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
