"""Compute the figures of a report: the funnel, distributions before and after balance, and clusters of duplicates."""

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

MAX_CLUSTERS = 50  # of each kind, the largest
MAX_MEMBERS = 12  # of a cluster
MAX_BARS = 15
MAX_COUNTED_TEXTS = 200_000  # of more, a share is counted
MAX_QUESTION_TYPES = 6
WORDS_A_BAR = 5  # of the lengths of captions
MAX_BAR_WORDS = 60  # longer captions share a bar
_TEXTS = ("clean_text", "clean_question", "clean_answer", "clean_record")
_DEDUPED = ["annotation_id", "sample_id", *_TEXTS, "cluster", "duplicate_of", "image_group", "image_reason"]


def funnel_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the funnel of a manifest; `adds_up` of a step: no row was lost in it, or between it and the step before."""
    kept_before: dict[str, int] = {}
    steps = []
    for step in manifest.get("funnel", []):
        whole = step["input"] == step["kept"] + sum(step["rejected"].values())
        follows = step["unit"] != "annotations" or step["input"] == kept_before.get("annotations", step["input"])
        steps.append(step | {"adds_up": whole and follows})
        kept_before[step["unit"]] = step["kept"]
    return steps


def steps_match(folder: Path, manifest: dict[str, Any]) -> bool:
    """Return whether the step files of a dataset folder are those of this version: they hold as many rows."""
    steps = [step for step in manifest.get("funnel", []) if step["unit"] == "annotations"]
    files = [(DatasetDir(folder).step_files(step["step"]), step["kept"]) for step in steps]
    return bool(files) and all(sum(open_table(path).metadata.num_rows for path in paths) == kept for paths, kept in files)


def distributions_of(folder: Path) -> list[dict[str, Any]]:
    """Return counts before and after balance: lengths of captions, answers by question type, words of captions.

    Each table has a `title`, what the rows `are`, the largest count (`top`), and rows of (name, before, after). Of very many
    texts a share is counted, drawn by lot, and `are` says so. A version that was made elsewhere has no step files here,
    and so no tables.
    """
    kept, rejected = (DatasetDir(folder).step_files("balance", which) for which in OUTPUTS)
    if not kept:
        return []
    every = max(1, ceil(sum(open_table(path).metadata.num_rows for path in (*kept, *rejected)) / MAX_COUNTED_TEXTS))
    lengths, concepts = (Counter[str](), Counter[str]()), (Counter[str](), Counter[str]())
    answers: tuple[dict[str, Counter[str]], ...] = (defaultdict(Counter), defaultdict(Counter))
    for paths, sides in ((kept, (0, 1)), (rejected, (0,))):  # kept rows count before and after
        for row in _read(paths, [*_TEXTS, "question_type"], every=every):
            if row["clean_text"] is not None:
                length, words = _length(row["clean_text"]), {*content_words(row["clean_text"])} - FUNCTION_WORDS
                for side in sides:
                    lengths[side][length] += 1
                    concepts[side].update(words)
            elif row["clean_question"] is not None:
                for side in sides:
                    answers[side][row["question_type"]][row["clean_answer"].casefold()] += 1
    by_length = sorted(lengths[0], key=lambda name: int(name.split("-")[0].rstrip("+")))
    tables = [_table("Words of a caption", "captions", *lengths, by_length)]
    common = sorted(answers[0], key=lambda kind: (-answers[0][kind].total(), kind))[:MAX_QUESTION_TYPES]
    tables += [_table(f"Answers to {visible(kind)} …", "questions", answers[0][kind], answers[1][kind]) for kind in common]
    tables = [table for table in [*tables, _table("Words that captions name", "captions", *concepts)] if table["rows"]]
    return [table | {"are": f"{table['are']}, one in {every}"} for table in tables] if every > 1 else tables


def clusters_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the clusters of dedupe: near-duplicate images, duplicate texts of one image, captions of too many images.

    For each kind, `found` is the number of clusters and `shown` lists the largest. Each member of a cluster has the `id` of
    its sample, its text (`said`), and whether it was `kept`.
    """
    kept_files, rejected_files = (DatasetDir(folder).step_files("dedupe", which) for which in OUTPUTS)
    if not kept_files:
        return {}
    rejected = list(_read(rejected_files, [*_DEDUPED, "reason"]))
    unasked_files = DatasetDir(folder).step_files("read", NEAR_DUPLICATES_FILE)
    groups = _groups_of_images([*kept_files, *rejected_files, *unasked_files])
    duplicated_ids = {row["duplicate_of"] for row in rejected if row["reason"] == "duplicate"}
    repeated_clusters = {row["cluster"] for row in rejected if row["reason"] == "caption_of_many_images"}
    images: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    texts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    captions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    in_clusters = {"image_group": groups, "annotation_id": duplicated_ids, "cluster": repeated_clusters}
    for kept, rows in ((True, _read(kept_files, _DEDUPED, among=in_clusters)), (False, iter(rejected))):
        for row in rows:
            text = visible(" ".join(row[name] for name in _TEXTS if row.get(name)))
            member = {"id": row["sample_id"], "said": text, "kept": kept}
            if row["image_group"] in groups:
                reason = (row["image_reason"] or "").replace("_", " ")
                images[row["image_group"]].setdefault(row["sample_id"], member | {"said": reason, "kept": not reason})
            if row["annotation_id"] in duplicated_ids:  # it is kept, unless it is itself a caption of too many images
                texts[row["annotation_id"]].insert(0, member)
            elif not kept and row["reason"] == "duplicate":
                texts[row["duplicate_of"]].append(member)
            is_repeated = row["cluster"] in repeated_clusters and row["clean_text"] is not None
            if is_repeated and (kept or row["reason"] == "caption_of_many_images"):
                captions[row["cluster"]].append(member)
    for row in _read(unasked_files, ["sample_id", "image_group", "image_reason"]):
        reason = row["image_reason"].replace("_", " ")
        images[row["image_group"]].setdefault(row["sample_id"], {"id": row["sample_id"], "said": reason, "kept": False})
    return {
        "Images that look alike": _largest([list(members.values()) for members in images.values()]),
        "Texts that say the same": _largest(list(texts.values())),
        "Captions of too many images": _largest(list(captions.values())),
    }


def images_of(folder: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (sample id, first image) of samples, which need not be in a version."""
    store = ImageStore(folder)
    for name in store.in_order(wanted) if wanted else ():
        with suppress(StoreError):  # a report shows the others
            yield name, store.read([name])[0].as_py()[0]


def _groups_of_images(paths: Iterable[Path]) -> set[str]:
    """Return the groups of images that hold more than one sample."""
    columns = ["image_group", "sample_id"]
    tables = [open_table(path, *columns).read(columns) for path in paths]
    groups = pa.concat_tables(tables, promote_options="permissive")  # one of them allows no null
    counts = groups.group_by("image_group").aggregate([("sample_id", "count_distinct")])
    return set(counts.filter(pc.greater(counts["sample_id_count_distinct"], 1))["image_group"].to_pylist())


def _read(
    paths: Iterable[Path], columns: list[str], every: int = 1, among: dict[str, set[str]] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield rows: one in `every`, drawn by lot, or those of which a column has one of the values in `among`."""
    draw = np.random.default_rng(0)  # rows may alternate: each second one could be of one style
    for path in paths:
        for batch in open_table(path, *columns).iter_batches(columns=columns):
            if every > 1:
                batch = batch.filter(pa.array(draw.random(batch.num_rows) < 1 / every))
            if among is not None:
                masks = [pc.is_in(batch[name], pa.array(values, pa.string())) for name, values in among.items()]
                batch = batch.filter(reduce(pc.or_, masks))
            yield from to_pylist(batch)


def _largest(clusters: list[list[dict[str, Any]]]) -> dict[str, Any]:
    ordered = sorted(clusters, key=lambda members: (-len(members), members[0]["id"], members[0]["said"]))
    shown = [{"size": len(members), "members": members[:MAX_MEMBERS]} for members in ordered[:MAX_CLUSTERS]]
    return {"found": len(clusters), "shown": shown}


def _length(text: str) -> str:
    word_count = len(words_of(text))
    if word_count > MAX_BAR_WORDS:
        return f"{MAX_BAR_WORDS + 1}+"
    first = (max(word_count, 1) - 1) // WORDS_A_BAR * WORDS_A_BAR + 1
    return f"{first}-{first + WORDS_A_BAR - 1}"


def _table(title: str, are: str, before: Counter[str], after: Counter[str], names: Sequence[str] = ()) -> dict[str, Any]:
    names = names or sorted(before, key=lambda name: (-before[name], name))[:MAX_BARS]
    rows = [(visible(name), before[name], after[name]) for name in names]
    return {"title": title, "are": are, "top": max((count for _, count, _ in rows), default=1), "rows": rows}
