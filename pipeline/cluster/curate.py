"""The stages that look at more than one row, as group-bys over all shards; each hop groups by one key.

What is done to a group is what the stages do on one machine: the functions are theirs. What is gathered in one place, by one
worker, is listed in docs/scale.md: counts, words that may be misspelled, and, where photos are compared, what they look like.
"""

import pickle
from collections import Counter, defaultdict
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.answers import normalize_answer
from pipeline.balance import (
    RARE,
    count_of_tail,
    find_pairs,
    first_words,
    keep_probability,
    match_entries,
    pair_id,
    read_entries,
    too_common,
)
from pipeline.cluster.fill import usual_file
from pipeline.cluster.job import Job, Task, Told
from pipeline.dedupe import (
    best_first,
    comparable_keys,
    find_repeated,
    find_widespread,
    merge_misspelled,
    name_clusters,
    remainders_of,
)
from pipeline.fingerprint import unit_interval
from pipeline.likeness import COMPARED, NEAR_BITS, compare_samples, hashes_of, near_hashes
from pipeline.measure import added
from pipeline.review import broken_pairs, review_annotations
from pipeline.split import split_annotations
from pipeline.stages import STAGES, apply, join_likeness, join_marks, kind_of_images, require_stage
from pipeline.store import aside, read_table, write_table
from pipeline.tables import BALANCED, LIKENESS, with_reason
from pipeline.texts import content_keys, content_words, text_key
from pipeline.types import Silence
from pipeline.verify import Usual, verify_annotations

SAID = pa.schema([pa.field("task", pa.string()), pa.field("key", pa.string())])  # what texts of a shard say
LEFT = pa.schema([pa.field("remainder", pa.uint64())])
NEAR = pa.schema([pa.field(name, pa.int64()) for name in ("page", "other", "bits")])
MISSPELLED = pa.schema([pa.field(name, pa.string()) for name in ("task", "wrong", "right")])
COUNTS = pa.schema([pa.field("name", pa.string()), pa.field("count", pa.int64())])
ENTRIES = pa.schema([pa.field("annotation_id", pa.string()), pa.field("entries", pa.list_(pa.int32()))])


def steps(job: Job) -> list[tuple[Task, bool]]:
    """Return what is to be done, in order, once the shards are filled; and whether by all numbers, or by one."""
    compared: list[tuple[Task, bool]] = [(compare_looks, True), (settle_looks, False)] if kind_of_images(job.config) else []
    return [
        (gather_usual, False),
        (apply_verify, True),
        *compared,
        (gather_remainders, False),
        (leave_comparable, True),
        (merge_keys, False),
        (send_texts, True),
        (drop_repeated, True),
        (drop_widespread, True),
        (apply_dedupe, True),
        (gather_counts, False),
        (pair_questions, True),
        (cap_answers, True),
        (settle_pairs, True),
        (apply_balance, True),
        (split_groups, True),
        (apply_split, True),
        *review_steps(),
    ]


def review_steps() -> list[tuple[Task, bool]]:
    """Return what is to be done once texts are split: what people said is done, and all is counted."""
    return [(send_pairs, True), (break_pairs, True), (apply_review, True), (send_looks, True), (count_looks, True)]


def gather_usual(job: Job, _: int) -> Told:
    """Add up what texts usually say, by which each one is judged."""
    parts = (_usual(usual_file(folder)) for folder in job.folders)
    with aside(job.hops / "usual.pickle") as path:
        path.write_bytes(pickle.dumps(reduce(added, parts, Usual())))
    return {}


def apply_verify(job: Job, number: int) -> Told:
    """Judge the texts of a shard, and write what those that stay say."""
    folder = job.shard(number)
    table = read_table(folder.stage("verify", "checked"))
    apply(folder, "verify", verify_annotations(table, job.config.verify, _usual(job.hops / "usual.pickle")), table)
    leave_keys(job, number, read_table(folder.stage("verify")))
    return {}


def _usual(path: Path) -> Usual:
    found: Usual = pickle.loads(path.read_bytes())  # noqa: S301  # our own workers'
    return found


def leave_keys(job: Job, number: int, table: pa.Table) -> None:
    """Write what the texts of a shard say (SAID, each once), and what is left of those with a word that may be misspelled."""
    texts = pc.coalesce(table["clean_text"], table["clean_question"], "").combine_chunks()
    said = pa.table({"task": table["task"], "key": content_keys(texts)}, schema=SAID).group_by(["task", "key"]).aggregate([])
    write_table(job.shard(number).stage("dedupe", "said"), [said.sort_by([("task", "ascending"), ("key", "ascending")])], SAID)
    remainders = remainders_of(pc.unique(said["key"]))
    left = pa.table({"remainder": remainders}, schema=LEFT)
    write_table(job.shard(number).stage("dedupe", "remainders"), [left], LEFT)


def compare_looks(job: Job, number: int) -> Told:
    """Compare a part of all images with all others, by their looks."""
    kind = kind_of_images(job.config)
    assert kind
    looks = pa.concat_tables([read_table(folder.stage("source"), columns=["looks"]) for folder in job.folders])
    _, hashes = hashes_of(looks["looks"].to_pylist())
    near = near_hashes(hashes, NEAR_BITS[kind], number, job.shards)
    table = pa.Table.from_pylist([dict(zip(NEAR.names, each, strict=True)) for each in near], schema=NEAR)
    write_table(job.hops / "near" / f"{number:05d}.parquet", [table], NEAR)
    return {}


def settle_looks(job: Job, _: int) -> Told:
    """Say which samples are to go for another that looks like them, and tell their shards."""
    samples = pa.concat_tables([read_table(folder.stage("source"), columns=list(COMPARED)) for folder in job.folders])
    tables = [read_table(job.hops / "near" / f"{number:05d}.parquet") for number in range(job.shards)]
    near = [(row["page"], row["other"], row["bits"]) for table in tables for row in table.to_pylist()]
    known = compare_samples(samples, kind_of_images(job.config), near)
    alone = pc.and_(pc.equal(known["sample_id"], known["image_group"]), pc.is_null(known["image_reason"]))
    job.hop("likeness").send(0, [known.filter(pc.invert(alone))], lambda rows: job.shard_of(rows["sample_id"].to_pylist()))
    return {}


def gather_remainders(job: Job, _: int) -> Told:
    """Gather what is left of texts with a word that may be misspelled."""
    found = [read_table(folder.stage("dedupe", "remainders"))["remainder"].to_numpy() for folder in job.folders]
    write_table(job.hops / "remainders.parquet", [pa.table({"remainder": np.unique(np.concatenate(found))}, schema=LEFT)], LEFT)
    return {}


def leave_comparable(job: Job, number: int) -> Told:
    """Write the texts of a shard that may be a misspelling, or that one may be a misspelling of."""
    said = read_table(job.shard(number).stage("dedupe", "said"))
    remainders = read_table(job.hops / "remainders.parquet")["remainder"].to_numpy()
    wanted = comparable_keys(pc.unique(said["key"]), remainders)
    write_table(job.shard(number).stage("dedupe", "comparable"), [said.filter(pc.is_in(said["key"], wanted))], SAID)
    return {}


def merge_keys(job: Job, _: int) -> Told:
    """Find out which texts are misspellings of which."""
    said = pa.concat_tables([read_table(folder.stage("dedupe", "comparable")) for folder in job.folders])
    merged = merge_misspelled(pc.unique(said["key"]))
    there = set(zip(said["task"].to_pylist(), said["key"].to_pylist(), strict=True))
    rows = [{"task": task, "wrong": key, "right": merged[key]} for task, key in sorted(there) if key in merged]
    rows = [row for row in rows if (row["task"], row["right"]) in there]
    write_table(job.hops / "misspelled.parquet", [pa.Table.from_pylist(rows, schema=MISSPELLED)], MISSPELLED)
    return {}


def send_texts(job: Job, number: int) -> Told:
    """Send what dedupe has to know of each text to the others about images that look the same."""
    table = _with_likeness(job, number)
    columns = ["annotation_id", "sample_id", "image_group", "image_reason", "task", "agreement", "alignment", "hedges"]
    texts = pc.coalesce(table["clean_text"], table["clean_question"], "").combine_chunks()
    wrong = read_table(job.hops / "misspelled.parquet")
    say = {(row["task"], row["wrong"]): row["right"] for row in wrong.to_pylist()}
    said = zip(table["task"].to_pylist(), content_keys(texts).to_pylist(), strict=True)
    keys = pa.array([f"{task}\n{say.get((task, key), key)}" for task, key in said], pa.string())
    _send(job, "texts", number, table.select(columns).append_column("said", keys), "image_group")
    return {}


def drop_repeated(job: Job, number: int) -> Told:
    """Of texts of images that look the same and that say the same, keep the best."""
    table = job.received("texts", number)
    best = best_first(table)
    repeats = find_repeated(table, _codes(table["said"]), best[_stays(table["image_reason"])[best]])
    ids = table["annotation_id"].combine_chunks()
    reason = pc.if_else(pa.array(repeats >= 0), "duplicate", table["image_reason"].combine_chunks())
    table = table.append_column("duplicate_of", ids.take(pa.array(repeats, mask=repeats < 0)))
    hop = job.hop("said")
    hop.send(number, [table.append_column("reason", reason)], hop.by("said"))
    return {}


def drop_widespread(job: Job, number: int) -> Told:
    """Of captions that say the same of different images, keep a few."""
    table = job.received("said", number)
    cluster, best = _codes(table["said"]), best_first(table)
    found = find_widespread(table, cluster, best[_stays(table["reason"])[best]], job.config.dedupe)
    marked = np.zeros(table.num_rows, bool)
    marked[found] = True
    reason = pc.if_else(pa.array(marked), "caption_of_many_images", table["reason"].combine_chunks())
    table = table.set_column(table.column_names.index("reason"), "reason", reason)
    table = table.append_column("cluster", name_clusters(cluster, table["annotation_id"].combine_chunks()))
    _send_home(job, "deduped", number, table, "annotation_id", "cluster", "duplicate_of", "reason")
    return {}


def apply_dedupe(job: Job, number: int) -> Told:
    """Do to a shard's texts what was found, and send its questions to those in the same words."""
    folder, table = job.shard(number), _with_likeness(job, number)
    marked = _joined(table, job.received("deduped", number), "annotation_id")
    apply(folder, "dedupe", marked, table)
    rows = read_table(folder.stage("dedupe")).to_pylist()
    named: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["clean_text"] is not None:
            named[row["sample_id"]].update(content_words(row["clean_text"]))
    asked = [
        {name: row[name] for name in ("annotation_id", "sample_id", "image_group", "clean_question", "clean_answer")}
        | {
            "words": sorted(named[row["sample_id"]]),
            "asked": text_key(row["clean_question"]),
            "kind": first_words(row["clean_question"]),
        }
        for row in rows
        if row["clean_question"] is not None
    ]
    _send(job, "asked", number, pa.Table.from_pylist(asked, schema=ASKED), "asked")
    _leave_counts(job, number, "kinds", Counter(row["kind"] for row in asked))
    if job.config.balance.tail_share is not None:
        captions = [row for row in rows if row["clean_text"] is not None]
        found = match_entries([row["clean_text"] for row in captions], read_entries(job.config.balance.entries))
        ids = [row["annotation_id"] for row in captions]
        write_table(
            folder.stage("balance", "entries"), [pa.table({"annotation_id": ids, "entries": found}, schema=ENTRIES)], ENTRIES
        )
        _leave_counts(job, number, "named", Counter(str(entry) for each in found for entry in each))
    return {}


ASKED = pa.schema(
    [
        *(
            pa.field(name, pa.string())
            for name in ("annotation_id", "sample_id", "image_group", "clean_question", "clean_answer", "asked", "kind")
        ),
        pa.field("words", pa.list_(pa.string())),
    ]
)


def gather_counts(job: Job, _: int) -> Told:
    """Add up how many questions begin alike, and how many captions name each entry."""
    for name in ("kinds", "named") if job.config.balance.tail_share is not None else ("kinds",):
        total: Counter[str] = Counter()
        for folder in job.folders:
            for row in read_table(folder.stage("balance", name)).to_pylist():
                total[row["name"]] += row["count"]
        write_table(job.hops / f"{name}.parquet", [_counted(total)], COUNTS)
    return {}


def pair_questions(job: Job, number: int) -> Told:
    """Find partners among questions in the same words, and send all questions to those of their type."""
    table = job.received("asked", number)
    rows = table.to_pylist()
    entities = {row["sample_id"]: frozenset(row["words"]) for row in rows}
    partner: list[str | None] = [None] * len(rows)
    for a, b in find_pairs(rows, entities):
        partner[a], partner[b] = rows[b]["annotation_id"], rows[a]["annotation_id"]
    usual = {name for name, count in _counts(job, "kinds").items() if count >= job.config.balance.min_questions_per_type}
    kinds = [row["kind"] if row["kind"] in usual else RARE for row in rows]
    table = table.select(["annotation_id", "clean_answer", "shard"])
    table = table.append_column("partner", pa.array(partner, pa.string()))
    hop = job.hop("kinds")
    hop.send(number, [table.append_column("kind", pa.array(kinds, pa.string()))], hop.by("kind"))
    return {}


def cap_answers(job: Job, number: int) -> Told:
    """Reject answers that are too common among the questions of a type, and send all to their partners."""
    table = job.received("kinds", number)
    rows = table.to_pylist()
    of_kind: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    chance = [unit_interval("balance", job.config.seed, row["annotation_id"]) for row in rows]
    for n in sorted(range(len(rows)), key=lambda n: (rows[n]["partner"] is None, chance[n])):
        of_kind[rows[n]["kind"]][normalize_answer(rows[n]["clean_answer"])].append(n)
    reasons: list[str | None] = [None] * len(rows)
    for kind, answers in of_kind.items():
        for n in too_common(kind, answers, job.config.balance):
            reasons[n] = "answer_too_common"
    both = [pair_id(row["annotation_id"], row["partner"]) if row["partner"] else row["annotation_id"] for row in rows]
    table = table.append_column("both", pa.array(both, pa.string()))
    hop = job.hop("capped")
    hop.send(number, [with_reason(table, reasons)], hop.by("both"))
    return {}


def settle_pairs(job: Job, number: int) -> Told:
    """Name pairs of which both questions stay."""
    table = job.received("capped", number)
    stay = Counter(table.filter(pc.is_null(table["reason"]))["both"].to_pylist())
    pairs = [both if stay[both] == 2 else None for both in table["both"].to_pylist()]
    table = table.append_column("pair_id", pa.array(pairs, pa.string())).rename_columns({"kind": "question_type"})
    _send_home(job, "balanced", number, table, "annotation_id", "question_type", "pair_id", "reason")
    return {}


def apply_balance(job: Job, number: int) -> Told:
    """Do to a shard's texts what was found, and send the splits that its source says to images that look the same."""
    folder = job.shard(number)
    table = read_table(folder.stage("dedupe"))
    marked = _joined(table, job.received("balanced", number), "annotation_id")
    entries: list[list[int] | None] = [None] * table.num_rows
    kept: list[float | None] = [None] * table.num_rows
    if job.config.balance.tail_share is not None:
        counts = {int(name): count for name, count in _counts(job, "named").items()}
        threshold = count_of_tail(list(counts.values()), job.config.balance.tail_share)
        found = _joined(table.select(["annotation_id"]), read_table(folder.stage("balance", "entries")), "annotation_id")
        entries = found["entries"].to_pylist()
        kept = [None if each is None else keep_probability([counts[entry] for entry in each], threshold) for each in entries]
    reasons = [
        "concepts_too_common" if share is not None and unit_interval("balance", job.config.seed, name) >= share else reason
        for name, share, reason in zip(table["annotation_id"].to_pylist(), kept, marked["reason"].to_pylist(), strict=True)
    ]
    marked = marked.drop_columns(["reason"])
    for name, values in (("entries", entries), ("keep_probability", kept)):
        marked = marked.append_column(BALANCED.field(name), pa.array(values, BALANCED.field(name).type))
    apply(folder, "balance", with_reason(marked, reasons), table)
    groups = read_table(folder.stage("balance"), columns=["image_group", "sample_id", "source_split"])
    _send(job, "groups", number, groups.group_by(groups.column_names).aggregate([]), "image_group")
    return {}


def split_groups(job: Job, number: int) -> Told:
    """Put images that look the same into one split."""
    table = job.received("groups", number)
    found = split_annotations(table, job.config.split, job.config.seed)
    _send_home(job, "splits", number, found, "sample_id", "split")
    return {}


def apply_split(job: Job, number: int) -> Told:
    """Split a shard's texts."""
    folder = job.shard(number)
    table = read_table(folder.stage("balance"))
    marked = _joined(table, job.received("splits", number), "sample_id")
    apply(folder, "split", with_reason(marked, [None] * table.num_rows), table)
    return {}


def send_pairs(job: Job, number: int) -> Told:
    """Send questions of pairs to their partners, in their last words."""
    table = join_marks(job.folder, read_table(job.shard(number).stage("split")), Silence())
    reviewed = review_annotations(table, ())
    paired = reviewed.filter(pc.is_valid(reviewed["final_pair_id"]))
    columns = ["final_pair_id", "final_question", "final_answer", "reason"]
    _send(job, "pairs", number, paired.select(columns), "final_pair_id")
    return {}


def break_pairs(job: Job, number: int) -> Told:
    """Find out which pairs people have broken."""
    table = job.received("pairs", number)
    broken = pa.array(sorted(broken_pairs(table.to_pylist())), pa.string())
    _send_home(job, "broken", number, table.filter(pc.is_in(table["final_pair_id"], broken)), "final_pair_id")
    return {}


def apply_review(job: Job, number: int) -> Told:
    """Do to a shard's texts what people said of them; tell how many marks apply."""
    folder = job.shard(number)
    table = join_marks(job.folder, read_table(folder.stage("split")), Silence())
    broken = set(job.received("broken", number)["final_pair_id"].to_pylist())
    apply(folder, "review", review_annotations(table, broken), table)
    return {"marks": len(table) - table["mark"].null_count}


def send_looks(job: Job, number: int) -> Told:
    """Send the samples of a shard that stay to those that look the same; tell what each stage did to the shard."""
    folder = job.shard(number)
    stay = read_table(folder.stage("review"), columns=["image_group", "sample_id"])
    _send(job, "looks", number, stay.group_by(stay.column_names).aggregate([]), "image_group")
    replies = len(read_table(folder.stage("generate"), columns=["request_id"])["request_id"].unique())
    sums = {name: require_stage(folder, name) for name in ("source", *STAGES)}
    return {"sums": {**sums, "generate": (replies, {})}}


def count_looks(job: Job, number: int) -> Told:
    """Tell how many groups there are of several images that look the same."""
    counts = Counter(job.received("looks", number)["image_group"].to_pylist())
    return {"groups": sum(count > 1 for count in counts.values())}


def _with_likeness(job: Job, number: int) -> pa.Table:
    """Return what verify has kept of a shard, with what is known of its samples beside the others."""
    folder = job.shard(number)
    table = read_table(folder.stage("verify"))
    ids = read_table(folder.stage("source"), columns=["sample_id"])["sample_id"]
    found = job.received("likeness", number, 1).to_pylist() if kind_of_images(job.config) else []
    alike = {row["sample_id"]: row for row in found}
    alone = {"image_reason": None, "looks_like": None}
    rows = [alike.get(name) or {"sample_id": name, "image_group": name, **alone} for name in ids.to_pylist()]
    return join_likeness(table, pa.Table.from_pylist(rows, schema=LIKENESS))


def _joined(table: pa.Table, other: pa.Table, key: str) -> pa.Table:
    """Join the columns of another table to each row, by a key that it has once; null where it has none."""
    found = other.take(pc.index_in(table[key], other[key]))
    for name in found.column_names:
        if name != key and name != "shard":
            table = table.append_column(name, found[name])
    return table


def _send(job: Job, name: str, number: int, table: pa.Table, key: str) -> None:
    hop = job.hop(name)
    hop.send(number, [table.append_column("shard", pa.array([number] * table.num_rows, pa.int64()))], hop.by(key))


def _send_home(job: Job, name: str, number: int, table: pa.Table, *columns: str) -> None:
    job.hop(name).send(number, [table.select([*columns, "shard"])], lambda rows: rows["shard"].to_numpy())


def _codes(values: pa.ChunkedArray) -> Any:
    """Return a number for each value, the same for equal ones."""
    return values.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


def _stays(reasons: pa.ChunkedArray) -> Any:
    return pc.is_null(reasons).to_numpy()


def _leave_counts(job: Job, number: int, name: str, counts: Counter[str]) -> None:
    write_table(job.shard(number).stage("balance", name), [_counted(counts)], COUNTS)


def _counted(counts: Counter[str]) -> pa.Table:
    return pa.Table.from_pylist([{"name": name, "count": count} for name, count in sorted(counts.items())], schema=COUNTS)


def _counts(job: Job, name: str) -> dict[str, int]:
    table = read_table(job.hops / f"{name}.parquet")
    return dict(zip(table["name"].to_pylist(), table["count"].to_pylist(), strict=True))
