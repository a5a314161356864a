"""Stage: dedupe. Of annotations of one image that say the same, the best is kept; a caption may stand with a few images only.

"Say the same" is no similarity (pipeline/texts.py): captions that differ in one decisive word are nearly the same string. The
same question about another image is no duplicate: "What is the man doing?" has another answer there. Which one of a cluster
stays depends on what is known of the annotations alone, never on their order.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

import pyarrow as pa

from pipeline.config import DedupeConfig
from pipeline.tables import require, with_reason
from pipeline.texts import content_key, misspelled_words, says_the_same, without_word

WORSE_IF_MISSING = 0.0  # a score that was not asked for is the same for all


def dedupe_annotations(table: pa.Table, config: DedupeConfig) -> pa.Table:
    """Return the same rows with the `cluster` that they are in, what they are a `duplicate_of`, and a `reason`.

    Where the table has them, `image_group` widens an image to those that look like it, `image_reason` rejects all of an image's
    annotations, and `agreement` and `alignment` say which of a cluster is best.
    """
    require(table, "annotation_id", "sample_id", "task", "clean_text", "clean_question")
    names = [name for name in _COLUMNS if name in table.column_names]
    rows = table.select(names).to_pylist()
    keys = [content_key(row["clean_text"] or row["clean_question"] or "") for row in rows]
    merged = merge_misspelled(set(keys))
    clusters = [
        sha256(f"{row['task']}\0{merged.get(key, key)}".encode()).hexdigest()[:16] for row, key in zip(rows, keys, strict=True)
    ]
    reasons: list[str | None] = [row.get("image_reason") for row in rows]
    kept_of: list[str | None] = [None] * len(rows)
    of_image: dict[tuple[str, str], str] = {}  # (image group, cluster) -> the annotation that is kept
    times: Counter[str] = Counter()
    for n in sorted(range(len(rows)), key=lambda n: _best_first(rows[n])):
        row, cluster = rows[n], clusters[n]
        if reasons[n] is not None:
            continue
        place = (row.get("image_group") or row["sample_id"], cluster)
        if place in of_image:
            reasons[n], kept_of[n] = "duplicate", of_image[place]
        elif row["task"] == "caption" and times[cluster] >= config.max_images_per_caption:
            reasons[n] = "caption_of_many_images"
        else:
            of_image[place] = row["annotation_id"]
            times[cluster] += 1
    table = table.append_column("cluster", pa.array(clusters, pa.string()))
    return with_reason(table.append_column("duplicate_of", pa.array(kept_of, pa.string())), reasons)


def merge_misspelled(keys: Iterable[str]) -> dict[str, str]:
    """Return, for each content key with a misspelled word, the key that it is a misspelling of.

    Each pair of keys that differ in one word would be found by comparing all with all. Here each key is looked up under what is
    left of it without the word: a table of the misspelled ones, then one pass over all. What could be two things is left alone.
    """
    left_out: dict[tuple[str, str], set[str]] = defaultdict(set)
    contexts: set[str] = set()
    known = sorted(keys)
    for key in known:
        for at in misspelled_words(key):
            word, context = without_word(key, at)
            contexts.add(context)
            for variant in _variants(word):
                left_out[context, variant].add(key)
    if not contexts:
        return {}
    meant: dict[str, set[str]] = defaultdict(set)
    for key in known:
        for at in sorted(set(range(key.count(" ") + 1)).difference(misspelled_words(key))):
            word, context = without_word(key, at)
            if context in contexts:
                near = {wrong for variant in _variants(word) for wrong in left_out.get((context, variant), ())}
                for wrong in near:
                    if says_the_same(wrong, key):
                        meant[wrong].add(key)
    return _follow({wrong: right.pop() for wrong, right in meant.items() if len(right) == 1})


def _follow(step: dict[str, str]) -> dict[str, str]:
    """Return where each chain of steps ends; every step has one misspelled word less, so all of them end."""
    ends: dict[str, str] = {}
    for key in step:
        end = key
        while end in step:
            end = step[end]
        ends[key] = end
    return ends


def _variants(word: str) -> Sequence[str]:
    """Return the word and all it leaves with one letter out: two words that are one edit apart share one of these."""
    return [word, *{word[:at] + word[at + 1 :] for at in range(len(word))}]


_COLUMNS = (
    "annotation_id",
    "sample_id",
    "task",
    "clean_text",
    "clean_question",
    "image_group",
    "image_reason",
    "agreement",
    "alignment",
    "hedges",
)


def _best_first(row: dict[str, Any]) -> tuple[float, float, int, str]:
    scores = [-(row.get(name) or WORSE_IF_MISSING) for name in ("agreement", "alignment")]
    return (scores[0], scores[1], row.get("hedges") or 0, row["annotation_id"])
