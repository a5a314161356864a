"""Stage: dedupe. Of annotations of one image that say the same, the best is kept; a caption may stand with a few images only.

"Say the same" is no similarity (pipeline/texts.py): captions that differ in one decisive word are nearly the same string. The
same question about another image is no duplicate: "What is the man doing?" has another answer there. Which one of a cluster
stays depends on what is known of the annotations alone, never on their order.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import DedupeConfig
from pipeline.tables import require, with_reason
from pipeline.texts import content_keys, is_unknown, says_the_same

BEST_FIRST = (("agreement", "descending"), ("alignment", "descending"), ("hedges", "ascending"), ("annotation_id", "ascending"))
BATCH = 10_000  # rows whose texts are Python objects at once

Indices = npt.NDArray[np.int64]


def dedupe_annotations(table: pa.Table, config: DedupeConfig) -> pa.Table:
    """Return the same rows with the `cluster` that they are in, what they are a `duplicate_of`, and a `reason`.

    Where the table has them, `image_group` widens an image to those that look like it, `image_reason` rejects all of an image's
    annotations, and `agreement`, `alignment` and `hedges` say which of a cluster is best.
    """
    require(table, "annotation_id", "sample_id", "task", "clean_text", "clean_question")
    cluster = _clusters(table)
    reasons = np.array(table["image_reason"] if "image_reason" in table.column_names else [None] * table.num_rows, dtype=object)
    best = best_first(table)
    best = best[[reasons[n] is None for n in best]]  # what is to go keeps nothing else from staying
    repeats = find_repeated(table, cluster, best)
    reasons[repeats >= 0] = "duplicate"
    reasons[find_widespread(table, cluster, best[repeats[best] < 0], config)] = "caption_of_many_images"
    ids = table["annotation_id"].combine_chunks()
    table = table.append_column("cluster", name_clusters(cluster, ids))
    table = table.append_column("duplicate_of", ids.take(pa.array(repeats, mask=repeats < 0)))
    return with_reason(table, reasons.tolist())


def best_first(table: pa.Table) -> Indices:
    """Return the rows in the order in which they are to be kept."""
    found: Indices = pc.sort_indices(table, sort_keys=[key for key in BEST_FIRST if key[0] in table.column_names]).to_numpy()
    return found


def find_repeated(table: pa.Table, cluster: Indices, best: Indices) -> Indices:
    """Return, for each row, the row of its cluster that is kept for its image; -1 where that is the row itself.

    Args:
        table: the rows.
        cluster: the number of the cluster of each.
        best: those that may stay, the best first.
    """
    known = [name for name in ("image_group", "sample_id") if name in table.column_names]
    image = pc.coalesce(*(table[name] for name in known)).combine_chunks().dictionary_encode().indices.to_numpy()
    place = image.astype(np.int64) * (1 + cluster.max(initial=0)) + cluster
    _, first, which = np.unique(place[best], return_index=True, return_inverse=True)
    kept = best[first][which]
    repeats = np.full(table.num_rows, -1)
    repeats[best[kept != best]] = kept[kept != best]
    return repeats


def find_widespread(table: pa.Table, cluster: Indices, best: Indices, config: DedupeConfig) -> Indices:
    """Return the captions of clusters that stand with too many images; `best` are those that may stay, the best first."""
    captions: Indices = best[pc.equal(table["task"], "caption").to_numpy(zero_copy_only=False)[best]]
    return captions[_rank(cluster[captions]) >= config.max_images_per_caption]


def name_clusters(cluster: Indices, ids: pa.Array) -> pa.Array:
    """Return of each row the first id of its cluster."""
    order = pc.sort_indices(ids).to_numpy()
    _, first, which = np.unique(cluster[order], return_index=True, return_inverse=True)
    named = np.empty(len(order), np.int64)
    named[order] = order[first][which]
    return ids.take(pa.array(named))


def _clusters(table: pa.Table) -> Indices:
    """Return the number of each row's cluster: equal for rows of one task that say the same."""
    batches = table.select(["task", "clean_text", "clean_question"]).combine_chunks().to_batches(max_chunksize=BATCH)
    said = [content_keys(pc.coalesce(batch["clean_text"], batch["clean_question"], "")) for batch in batches]
    keys = pa.chunked_array(said, pa.string()).dictionary_encode().combine_chunks()
    tasks = table["task"].combine_chunks().dictionary_encode()
    count = max(1, len(keys.dictionary))
    number: Indices = tasks.indices.to_numpy().astype(np.int64) * count + keys.indices.to_numpy()
    merged = merge_misspelled(keys.dictionary)
    wrong, right = (
        pc.index_in(pa.array(side, pa.string()), keys.dictionary).to_numpy() for side in (list(merged), list(merged.values()))
    )
    target, there = np.arange(count * len(tasks.dictionary)), np.zeros(count * len(tasks.dictionary), bool)
    there[number] = True
    for first in range(0, len(target), count):  # of each task
        known = there[first + right]
        target[first + wrong[known]] = first + right[known]
    return target[number]


def _rank(values: Indices) -> Indices:
    """Return how many equal values stand before each one."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(values) else order
    rank = np.empty(len(values), np.int64)
    rank[order] = np.arange(len(values)) - np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    return rank


def merge_misspelled(keys: pa.Array) -> dict[str, str]:
    """Return, for each content key with a misspelled word, the key that it is a misspelling of.

    Each pair of keys that differ in one word would be found by comparing all with all. Here each is looked up under what is
    left of it without the word: a table of those with an unknown word, then those of which as much is left, by a sum of numbers
    that stand for words. What could be two things is left alone.
    """
    ordered = keys.take(pc.sort_indices(keys))
    numbers = _Numbers()
    left_out: dict[tuple[str, str], set[str]] = defaultdict(set)
    remainders: list[npt.NDArray[np.uint64]] = []
    for part in _slices(ordered):
        key_of, place, unknown, left = numbers.words_of(part)
        remainders.append(left[unknown])
        for n in np.flatnonzero(unknown).tolist():
            key = part[key_of[n]].as_py()
            wrong, rest = _apart(key, place[n])
            for variant in _variants(wrong):
                left_out[rest, variant].add(key)
    looked_for = np.unique(np.concatenate(remainders)) if remainders else np.zeros(0, np.uint64)
    meant: dict[str, set[str]] = defaultdict(set)
    for part in _slices(ordered):
        key_of, place, unknown, left = numbers.words_of(part)
        for n in np.flatnonzero(~unknown & np.isin(left, looked_for)).tolist():
            key = part[key_of[n]].as_py()
            right, rest = _apart(key, place[n])
            for wrong in {wrong for variant in _variants(right) for wrong in left_out.get((rest, variant), ())}:
                if says_the_same(wrong, key):
                    meant[wrong].add(key)
    return _follow({wrong: right.pop() for wrong, right in meant.items() if len(right) == 1})


def remainders_of(keys: pa.Array) -> npt.NDArray[np.uint64]:
    """Return what is left of keys without a word that no dictionary has: another key may be the same with the right one."""
    numbers, found = _Numbers(), [np.zeros(0, np.uint64)]
    for part in _slices(keys):
        _, _, unknown, left = numbers.words_of(part)
        found.append(np.unique(left[unknown]))
    return np.unique(np.concatenate(found))


def comparable_keys(keys: pa.Array, remainders: npt.NDArray[np.uint64]) -> pa.Array:
    """Return the keys that `merge_misspelled` has to see, if these are the remainders of all: for the rest it does nothing."""
    numbers, found = _Numbers(), [np.zeros(0, np.int64)]
    for first, part in enumerate(_slices(keys)):
        key_of, _, unknown, left = numbers.words_of(part)
        found.append(first * BATCH + np.unique(key_of[unknown | np.isin(left, remainders)]))
    return keys.take(pa.array(np.concatenate(found)))


def _slices(keys: pa.Array) -> list[pa.Array]:
    return [keys.slice(at, BATCH) for at in range(0, len(keys), BATCH)]


class _Numbers:
    """Numbers that stand for words, the same everywhere: what is left of a key without a word is a sum without a number."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, bool]] = {}

    def words_of(self, keys: pa.Array) -> tuple[Indices, Indices, npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """Return, for all words of some keys: which key, the place in it, whether no dictionary has it, and what is left."""
        words = pc.split_pattern(keys, " ")
        encoded = words.flatten().dictionary_encode()
        for word in encoded.dictionary.to_pylist():
            if word not in self._known:
                drawn = hashlib.blake2b(word.encode(), digest_size=8).digest()
                self._known[word] = int.from_bytes(drawn) >> 1, is_unknown(word)
        known = [self._known[word] for word in encoded.dictionary.to_pylist()]
        at, starts = encoded.indices.to_numpy(), words.offsets.to_numpy() - words.offsets[0].as_py()
        key = np.repeat(np.arange(len(keys)), np.diff(starts))
        number = np.array([number for number, _ in known], np.uint64)[at]
        left = (np.add.reduceat(number, starts[:-1]) if len(number) else number)[key] - number
        return key, np.arange(len(key)) - starts[key], np.array([unknown for _, unknown in known], bool)[at], left


def _apart(key: str, at: int) -> tuple[str, str]:
    """Return a word of a key, and all others from the one behind it: the same wherever the key starts."""
    words = key.split(" ")
    return words[at], " ".join(words[at + 1 :] + words[:at])


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
