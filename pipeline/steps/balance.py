"""Step: balance. Down-sample over-represented answers and captions.

Questions: within each type ("how many", "is there"), no answer may exceed its share, so that guessing does not pay, as in VQAv2
(Goyal et al., 2017). A question that has different answers for two similar images is kept first; the two are a pair.
Captions, if the settings ask for it: MetaCLIP's algorithm (Xu et al., 2023), written from the paper: count how many captions
name each entry of a list, and keep a caption by the rarest entry that it names. The list is that of a file, or of all words of
the captions themselves but function words, and WordNet's names of several words: a list of base forms alone finds nothing in
"A waterskier performs tricks", and so drops it first.

The result depends on ids and the seed, not on the order of the rows.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ahocorasick
import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import BalanceConfig
from pipeline.digests import hash_to_unit
from pipeline.errors import ConfigError
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep
from pipeline.storage.database import hash_to_unit_sql, load, open_cursor, read
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import BALANCED, INT64, STRING, fields
from pipeline.text.content_keys import content_words
from pipeline.text.language import FUNCTION_WORDS
from pipeline.text.normalize import map_distinct, text_key, words_of
from pipeline.text.vqa_answers import normalize_answer
from pipeline.text.wordnet import names

RARE = "(rare)"  # questions whose own type is too rare are balanced together
MAX_ENTRIES_BYTES = 256_000_000  # of a file of entries
NEIGHBOURS = 24  # images searched for a partner, as many as VQAv2's annotators were shown
MATCHED_QUESTIONS = 65_536  # matched at once, or those of one key where they are more
GROUPED_CAPTIONS = 1_000_000  # whose words are collected by sample at once
BLOCK_ROWS = 1024  # whose words are compared at once
QUESTIONS = pa.schema([ROW, *fields(STRING, "annotation_id", "sample_id", "image", "key", "prefix", "answer")])
CAPTION_TEXTS = pa.schema([ROW, *fields(STRING, "sample_id", "clean_text")])
CAPTION_WORDS = pa.schema({"sample_id": STRING, "words": pa.list_(STRING)})
PAIRS = pa.schema({"row": INT64, "partner": INT64})
LIMITS = pa.schema({"question_type": STRING, "most": INT64})
CAPTIONS = pa.schema({"row": INT64, "annotation_id": STRING, "entries": pa.list_(pa.int32())})
ADDS = pa.schema([*BALANCED, pa.field("reason", STRING)])
FINDINGS = pa.schema([ROW, *ADDS])
_SPACED = str.maketrans({mark: f" {mark} " for mark in ",.;:?!`'\"()[]{}-/"} | {"\t": " ", "\n": " ", "\r": " "})

Indices = npt.NDArray[np.signedinteger[Any]]


def balance(comparison: Comparison) -> duckdb.DuckDBPyRelation:
    """Return the findings about all questions, and about captions if they are balanced, with the `reason` of surplus rows."""
    db, (config, seed) = comparison.db, comparison.settings
    balance_questions(db, comparison.rows, config, seed)
    if config.tail_frac is None:
        return db.sql("SELECT * FROM balanced_questions")
    balance_captions(db, comparison.rows, config, seed)
    return db.sql("SELECT * FROM balanced_questions UNION ALL SELECT * FROM balanced_captions")


def balance_questions(db: duckdb.DuckDBPyConnection, rows: AllRows, config: BalanceConfig, seed: int) -> None:
    """Make the table `balanced_questions` (FINDINGS) of all questions."""
    load(db, "questions", _questions(rows), QUESTIONS)
    db.execute(
        "CREATE TABLE types AS SELECT prefix, CASE WHEN count(*) >= ? THEN prefix ELSE ? END AS question_type "
        "FROM questions GROUP BY prefix",
        [config.min_questions_per_type, RARE],
    )
    pair_questions(db, rows)
    counts = db.sql("SELECT question_type, answer, count(*) AS count FROM questions JOIN types USING (prefix) GROUP BY ALL")
    load(db, "limits", [limit_answers(counts.to_arrow_table(), config)], LIMITS)
    chance = hash_to_unit_sql("'balance'", f"'{seed}'", "annotation_id")
    db.execute(
        f"""
        CREATE TABLE placed AS
        SELECT row, annotation_id, question_type, partner,
               row_number() OVER (PARTITION BY question_type, answer ORDER BY partner IS NULL, {chance}, row) > most AS is_cut
        FROM questions JOIN types USING (prefix) JOIN limits USING (question_type) LEFT JOIN pairs USING (row)
        """  # noqa: S608
    )
    # A pair is named by the digest of its two sorted ids (digests.digest).
    db.execute(
        """
        CREATE TABLE balanced_questions AS
        SELECT placed.row, placed.question_type,
               CASE WHEN NOT placed.is_cut AND NOT other.is_cut THEN
                   substr(sha256('["' || least(placed.annotation_id, other.annotation_id) || '","'
                                 || greatest(placed.annotation_id, other.annotation_id) || '"]'), 1, 16) END AS pair_id,
               NULL::INTEGER[] AS entries, NULL::DOUBLE AS keep_probability,
               CASE WHEN placed.is_cut THEN 'answer_too_common' END AS reason
        FROM placed LEFT JOIN placed AS other ON placed.partner = other.row
        """
    )


def pair_questions(db: duckdb.DuckDBPyConnection, rows: AllRows) -> None:
    """Make the table `pairs` (PAIRS, in both directions): equal questions about two images with different answers.

    The most similar images are paired first. Their similarity is that of the content words of their captions; each image is
    compared with the next `NEIGHBOURS` images that are asked the same, in the order of these words. Near-duplicate images are
    not paired, and no question is in two pairs.
    """
    db.execute(
        "CREATE TABLE candidates AS SELECT row, annotation_id, sample_id, image, key, answer FROM questions SEMI JOIN "
        "(SELECT key FROM questions GROUP BY key HAVING count(DISTINCT answer) > 1 AND count(DISTINCT image) > 1) USING (key)"
    )
    of_candidates = "FROM incoming SEMI JOIN candidates USING (sample_id) WHERE clean_text IS NOT NULL"
    load(db, "caption_texts", rows.batches("sample_id", "clean_text"), CAPTION_TEXTS, of_candidates)
    load(db, "caption_words", _caption_words(open_cursor(db)), CAPTION_WORDS)
    ((captions,),) = db.sql("SELECT count(*) FROM caption_words").fetchall()
    parts = -(-captions // GROUPED_CAPTIONS)  # lists that are being collected stay in memory
    db.execute("CREATE TABLE sample_words AS FROM caption_words LIMIT 0")
    for part in range(parts):
        db.execute(
            f"""
            INSERT INTO sample_words SELECT sample_id, list_sort(list_distinct(flatten(list(words))))
            FROM caption_words WHERE hash(sample_id) % {parts} = {part} GROUP BY sample_id
            """  # noqa: S608
        )
    db.execute(
        "CREATE TABLE ordered AS SELECT row, annotation_id, key, image, answer, coalesce(words, []) AS words "
        "FROM candidates LEFT JOIN sample_words USING (sample_id)"
    )
    load(db, "pairs", _match_all(open_cursor(db)), PAIRS)


def _match_all(db: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    tables = read(db.sql("FROM ordered ORDER BY key, words, annotation_id"))
    for groups in whole_groups(tables, "key", MATCHED_QUESTIONS):
        a, b = match_questions(groups)
        row = groups["row"].to_numpy()
        yield pa.table({"row": np.r_[row[a], row[b]], "partner": np.r_[row[b], row[a]]}, schema=PAIRS)


def match_questions(groups: pa.Table) -> tuple[Indices, Indices]:
    """Return the pairs among rows that ask the same: two arrays of row indices.

    Pairs are chosen greedily, by similarity, then by ids. All pairs that are the best of both their rows are chosen at once,
    then the best of the rest: the result is that of choosing one after the other. `groups` has the columns of the table
    `ordered`, by key, words and id; rows of one key are a group.
    """
    a, b, overlap = _neighbours(groups)
    rank = pc.rank(groups["annotation_id"].combine_chunks(), tiebreaker="first").to_numpy()
    ids = rank[a].astype(np.int64) << 32 | rank[b].astype(np.int64)
    order = np.lexsort((ids, -overlap))
    a, b = a[order], b[order]
    pairs_a, pairs_b = [a[:0]], [b[:0]]
    while len(a):
        best = np.full(groups.num_rows, len(a))
        for side in (a, b):  # the first pair in which each row stands
            first = np.full(groups.num_rows, len(a))
            first[side[::-1]] = np.arange(len(side))[::-1]
            best = np.minimum(best, first)
        is_best = (best[a] == np.arange(len(a))) & (best[b] == np.arange(len(a)))
        pairs_a.append(a[is_best])
        pairs_b.append(b[is_best])
        is_free = np.ones(groups.num_rows, bool)
        is_free[np.r_[a[is_best], b[is_best]]] = False
        remain = is_free[a] & is_free[b]
        a, b = a[remain], b[remain]
    return np.concatenate(pairs_a), np.concatenate(pairs_b)


def _neighbours(groups: pa.Table) -> tuple[Indices, Indices, npt.NDArray[np.float64]]:
    """Return the pairs of rows that may be matched, and the overlap (Jaccard index) of their words.

    Rows are compared in blocks: their words are bits of 64-bit numbers, [rows of the block, numbers].
    """
    codes = (groups[name].combine_chunks().dictionary_encode().indices.to_numpy() for name in ("key", "image", "answer"))
    key, image, answer = codes
    lists = groups["words"].combine_chunks()
    offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    words = lists.flatten().dictionary_encode().indices.to_numpy()
    count = np.diff(offsets)
    pairs: list[tuple[Indices, Indices, npt.NDArray[np.float64]]] = []
    for first in range(0, groups.num_rows, BLOCK_ROWS):
        end = min(first + BLOCK_ROWS, groups.num_rows)
        behind = min(end + NEIGHBOURS, groups.num_rows)
        distinct, column = np.unique(words[offsets[first] : offsets[behind]], return_inverse=True)
        has_word = np.zeros((behind - first, -(-max(1, len(distinct)) // 64) * 64), bool)
        has_word[np.repeat(np.arange(behind - first), count[first:behind]), column] = True
        bits = np.packbits(has_word, axis=1).view(np.uint64)
        for step in range(1, NEIGHBOURS + 1):
            a = np.arange(first, min(end, groups.num_rows - step), dtype=np.int32)
            b = a + step
            may_pair = (key[a] == key[b]) & (answer[a] != answer[b]) & (image[a] != image[b])
            a, b = a[may_pair], b[may_pair]
            shared = np.bitwise_count(bits[a - first] & bits[b - first]).sum(axis=1, dtype=np.int64)
            pairs.append((a, b, shared / np.maximum(1, count[a] + count[b] - shared)))
    return tuple(np.concatenate(part) for part in zip(*pairs, strict=True))  # type: ignore[return-value]


def whole_groups(tables: Iterable[pa.Table], column: str, min_rows: int) -> Iterator[pa.Table]:
    """Regroup tables that are ordered by a column: no value is in two of them, and all but the last have `min_rows` rows."""
    waiting: list[pa.Table] = []
    for table in tables:
        ends = pc.run_end_encode(table[column].combine_chunks()).run_ends
        last = ends[-2].as_py() if len(ends) > 1 else 0  # where the last group of the table begins
        if last or not waiting or waiting[-1][column][-1] != table[column][0]:
            waiting.append(table.slice(0, last))
            if sum(part.num_rows for part in waiting) >= min_rows:
                yield pa.concat_tables(waiting)
                waiting = []
        waiting.append(table.slice(last))
    if waiting:
        yield pa.concat_tables(waiting)


def _questions(rows: AllRows) -> Iterator[pa.Table]:
    for table in rows.batches("annotation_id", "sample_id", "image_group", "clean_question", "clean_answer"):
        table = table.filter(pc.is_valid(table["clean_question"])).combine_chunks()
        columns = {
            "image": table["image_group"],
            "key": map_distinct(table["clean_question"], text_key),
            "prefix": map_distinct(table["clean_question"], question_prefix),
            "answer": map_distinct(table["clean_answer"], normalize_answer),
        }
        columns |= {name: table[name] for name in ("row", "annotation_id", "sample_id")}
        yield pa.table(columns).select(QUESTIONS.names)


def _caption_words(db: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    for table in read(db.sql("FROM caption_texts")):
        words = pa.array(map(content_words, table["clean_text"].to_pylist()), CAPTION_WORDS.field("words").type)
        yield pa.table({"sample_id": table["sample_id"], "words": words}, schema=CAPTION_WORDS)


def balance_captions(db: duckdb.DuckDBPyConnection, rows: AllRows, config: BalanceConfig, seed: int) -> None:
    """Make the table `balanced_captions` (FINDINGS): the entries that each caption names, and whether it stays."""
    assert config.tail_frac is not None
    entries = read_entries(config.entries) if config.entries else vocabulary(rows)
    load(db, "captions", _captions(rows, entries), CAPTIONS)
    mentions = "SELECT unnest(entries) AS entry FROM captions"
    counts = dict(db.sql(f"SELECT entry, count(*) FROM ({mentions}) GROUP BY entry").fetchall())  # noqa: S608
    threshold = count_of_tail(list(counts.values()), config.tail_frac)
    load(db, "balanced_captions", _judge_captions(open_cursor(db), counts, threshold, seed), FINDINGS)


def _judge_captions(db: duckdb.DuckDBPyConnection, counts: dict[int, int], threshold: int, seed: int) -> Iterator[pa.Table]:
    for table in read(db.sql("FROM captions")):
        entries = table["entries"].to_pylist()
        kept = [keep_probability([counts[entry] for entry in named], threshold) for named in entries]
        chances = [hash_to_unit("balance", seed, name) for name in table["annotation_id"].to_pylist()]
        reasons = ["concepts_too_common" if chance >= share else None for chance, share in zip(chances, kept, strict=True)]
        nothing = pa.nulls(table.num_rows, pa.string())
        values = [table["row"], nothing, nothing, table["entries"], pa.array(kept), pa.array(reasons, pa.string())]
        yield pa.table(values, schema=FINDINGS)


def _captions(rows: AllRows, entries: tuple[str, ...]) -> Iterator[pa.Table]:
    for table in rows.batches("annotation_id", "clean_text"):
        table = table.filter(pc.is_valid(table["clean_text"]))
        named = pa.array(match_entries(table["clean_text"].to_pylist(), entries), CAPTIONS.field("entries").type)
        yield pa.table([table["row"], table["annotation_id"], named], schema=CAPTIONS)


def vocabulary(rows: AllRows) -> tuple[str, ...]:
    """Return the words of all captions, function words aside, and WordNet's names of several words."""
    words: set[str] = set()
    for table in rows.batches("clean_text"):
        for text in table["clean_text"].to_pylist():
            words.update(spaced(text).split() if text else ())
    return (*sorted(word for word in words - FUNCTION_WORDS if word[0].isalnum()), *(name for name in names() if " " in name))


def question_prefix(question: str) -> str:
    """Return the two words that say of which type a question is: "How many"."""
    return " ".join(words_of(question)[:2])


def limit_answers(counts: pa.Table, config: BalanceConfig) -> pa.Table:
    """Return the most questions of each type that may have the same answer (LIMITS), from a count of each type and answer."""
    of_type: dict[str, dict[str, int]] = defaultdict(dict)
    for row in counts.to_pylist():
        of_type[row["question_type"]][row["answer"]] = row["count"]
    most = [largest_count(kind, answers, config) for kind, answers in of_type.items()]
    return pa.table({"question_type": list(of_type), "most": most}, schema=LIMITS)


def largest_count(kind: str, answers: dict[str, int], config: BalanceConfig) -> int:
    """Return the most questions that any answer may keep, so that none has a larger share of what is left.

    Fewer answers than the share leaves room for are not cut: one alone has all of them, whatever is kept. Neither are the
    answers of rare types, where there are too few to say what is too common.
    """
    max_share, counts = config.max_share(answers.keys()), answers.values()
    if len(answers) * max_share < 1 or (kind == RARE and sum(counts) < config.min_questions_per_type):
        return max(counts)
    candidates = range(1, max(counts) + 1)
    return bisect_left(candidates, True, key=lambda most: most > max_share * sum(min(count, most) for count in counts))


def match_entries(texts: Iterable[str], entries: tuple[str, ...]) -> list[list[int]]:
    """Return the entries that each text contains as whole words, each once, in order.

    Case is ignored and punctuation separated; MetaCLIP is case-sensitive and separates fewer marks.
    """
    automaton = _automaton(entries)
    return [sorted({entry for _, entry in automaton.iter(spaced(text))}) for text in texts]


def count_of_tail(counts: Sequence[int], share: float) -> int:
    """Return the count t such that entries named fewer than t times make up this share of all mentions."""
    if not counts:
        return 1
    ordered = np.sort(np.asarray(counts))
    return int(ordered[np.abs(np.cumsum(ordered) / ordered.sum() - share).argmin()])


def keep_probability(counts: Sequence[int], threshold: int) -> float:
    """Return the probability to keep a caption: that at least one entry keeps it, each by min(1, t / count); 1 for no entry."""
    lost = 1.0
    for count in counts:
        lost *= 1 - min(1.0, threshold / count)
    return 1 - lost if counts else 1.0


def read_entries(path: Path) -> tuple[str, ...]:
    """Return the entries for balancing captions: the lines of a file. Raises ConfigError if it has none."""
    hint = "balance.entries is a text file, one entry a line"
    try:
        lines = read_regular(path, max_bytes=MAX_ENTRIES_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError, UnsafeFileError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint=hint) from None
    entries = tuple(sorted({" ".join(line.lower().split()) for line in lines} - {""}))
    if not entries:
        raise ConfigError(f"{path} has no entries", hint=hint)
    return entries


def spaced(text: str) -> str:
    """Return a text in lower case with a space around each word and each mark."""
    return f" {' '.join(text.lower().translate(_SPACED).split())} "


@cache
def _automaton(entries: tuple[str, ...]) -> Any:
    automaton = ahocorasick.Automaton()
    for number, entry in enumerate(entries):
        automaton.add_word(spaced(entry), number)
    automaton.make_automaton()
    return automaton


STEP = RowStep(
    "balance",
    settings=lambda plan: (plan.config.balance, plan.config.seed),
    compare=balance,
    adds=ADDS,
    reads=lambda plan: [path] if (path := plan.config.balance.entries) else (),
    advice={
        "answer_too_common": "raise balance.max_answer_frac or balance.max_yes_no_frac",
        "concepts_too_common": "raise balance.tail_frac, or leave it out",
    },
)
