"""Step: balance. Down-sample over-represented answers.

At most a given share of the questions of one type ("how many", "is there") may have the same
answer, so that a model cannot score by guessing, as in VQAv2 (Goyal et al., 2017). Questions that form a pair
are kept first. A pair is the same question about two similar images with different answers.

The result depends on ids and the seed, but not on the row order.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import BalanceConfig
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep, whole_groups
from pipeline.storage.database import hash_to_unit_sql, load, open_cursor, read
from pipeline.tables import BALANCED, INT64, STRING, fields
from pipeline.text.content_keys import content_words
from pipeline.text.normalize import map_distinct, text_key, words_of
from pipeline.text.vqa_answers import normalize_answer

# Questions of rare types are balanced together under this type.
RARE = "(rare)"
# Number of similar images that are searched for the second question of a pair, as many as in VQAv2.
NEIGHBOURS = 24
QUESTIONS = pa.schema(
    [ROW, *fields(STRING, "annotation_id", "sample_id", "image", "key", "prefix", "answer")]
)
CAPTION_TEXTS = pa.schema([ROW, *fields(STRING, "sample_id", "clean_text")])
SAMPLE_WORDS = pa.schema({"sample_id": STRING, "words": pa.list_(STRING)})
PAIRS = pa.schema(fields(INT64, "row", "partner"))
LIMITS = pa.schema({"question_type": STRING, "max_count": INT64})
ADDS = pa.schema([*BALANCED, *fields(STRING, "reason")])


def balance(comparison: Comparison) -> duckdb.DuckDBPyRelation:
    """Return the type and the pair of each question, and a `reason` for each question to reject."""
    db, rows, (config, seed) = comparison.db, comparison.rows, comparison.settings
    load(db, "questions", _questions(rows), QUESTIONS)
    db.execute(
        "CREATE TABLE types AS FROM questions "
        "SELECT prefix, CASE WHEN count(*) >= ? THEN prefix ELSE ? END AS question_type GROUP BY prefix",
        [config.min_questions_per_type, RARE],
    )
    _pair_questions(db, rows)
    typed = "FROM questions JOIN types USING (prefix)"
    counts = db.sql(f"SELECT question_type, answer, count(*) AS count {typed} GROUP BY ALL")
    by_type: dict[str, dict[str, int]] = defaultdict(dict)
    for kind, answer, count in counts.fetchall():
        by_type[kind][answer] = count
    limits = [max_answer_count(kind, answers, config) for kind, answers in by_type.items()]
    load(db, "limits", [pa.table([list(by_type), limits], schema=LIMITS)], LIMITS)
    chance = hash_to_unit_sql("'balance'", f"'{seed}'", "annotation_id")
    # `pair_id` is the digest of the two sorted annotation ids (digests.digest).
    db.execute(
        f"""
        CREATE TABLE placed AS
        SELECT row, annotation_id, question_type, partner,
               row_number() OVER (PARTITION BY question_type, answer ORDER BY partner IS NULL, {chance}, row)
                   > max_count AS is_surplus
        {typed} JOIN limits USING (question_type) LEFT JOIN pairs USING (row);
        """
    )
    return db.sql(
        """
        SELECT placed.row, placed.question_type,
               CASE WHEN NOT placed.is_surplus AND NOT other.is_surplus THEN
                   substr(sha256('["' || least(placed.annotation_id, other.annotation_id) || '","'
                                 || greatest(placed.annotation_id, other.annotation_id) || '"]'), 1, 16)
               END AS pair_id,
               CASE WHEN placed.is_surplus THEN 'answer_too_common' END AS reason
        FROM placed LEFT JOIN placed AS other ON placed.partner = other.row
        """
    )


def _pair_questions(db: duckdb.DuckDBPyConnection, rows: AllRows) -> None:
    """Create the table `pairs` (PAIRS): the same question about two images with different answers.

    Images with the same question are ordered by the content words of their captions, and each is compared
    with the next NEIGHBOURS images. The most similar pairs (Jaccard index) are chosen first. Near-duplicates
    are never paired. A question is in at most one pair. The table holds both directions of a pair.
    """
    db.execute(
        """
        CREATE TABLE candidates AS FROM questions SEMI JOIN (
            FROM questions SELECT key GROUP BY key
            HAVING count(DISTINCT answer) > 1 AND count(DISTINCT image) > 1
        ) USING (key)
        """
    )
    of_candidates = "FROM incoming SEMI JOIN candidates USING (sample_id) WHERE clean_text IS NOT NULL"
    load(db, "caption_texts", rows.batches("sample_id", "clean_text"), CAPTION_TEXTS, of_candidates)
    load(db, "sample_words", _sample_words(open_cursor(db)), SAMPLE_WORDS)
    db.execute(
        f"""
        CREATE TABLE ordered AS
        SELECT row, annotation_id, key, image, answer, coalesce(words, []) AS words,
               row_number() OVER (PARTITION BY key ORDER BY coalesce(words, []), annotation_id) AS place
        FROM candidates LEFT JOIN sample_words USING (sample_id);

        CREATE TABLE neighbours AS
        SELECT one.row, other.row AS partner, one.annotation_id, other.annotation_id AS partner_id,
               len(list_intersect(one.words, other.words)) AS shared,
               shared / greatest(1, len(one.words) + len(other.words) - shared) AS overlap
        FROM (SELECT *, unnest(range(place + 1, place + 1 + {NEIGHBOURS})) AS next_place FROM ordered) AS one
        JOIN ordered AS other ON one.key = other.key AND one.next_place = other.place
        WHERE one.answer <> other.answer AND one.image <> other.image
        """  # noqa: S608
    )
    load(db, "pairs", _match_greedily(open_cursor(db)), PAIRS)


def _match_greedily(db: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    paired: set[int] = set()
    query = "SELECT row, partner FROM neighbours ORDER BY overlap DESC, annotation_id, partner_id"
    for table in read(db.sql(query)):
        pairs = []
        for row, partner in zip(table["row"].to_pylist(), table["partner"].to_pylist(), strict=True):
            if row not in paired and partner not in paired:
                paired.update((row, partner))
                pairs += [{"row": row, "partner": partner}, {"row": partner, "partner": row}]
        yield pa.Table.from_pylist(pairs, schema=PAIRS)


def _sample_words(db: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    """Yield the content words in the captions of each sample. Captions of one sample must be adjacent."""
    for table in whole_groups(read(db.sql("FROM caption_texts ORDER BY row")), "sample_id", 1):
        words: dict[str, set[str]] = defaultdict(set)
        for row in table.to_pylist():
            words[row["sample_id"]].update(content_words(row["clean_text"]))
        yield pa.table([[*words], [*map(sorted, words.values())]], schema=SAMPLE_WORDS)


def _questions(rows: AllRows) -> Iterator[pa.Table]:
    for table in rows.batches("annotation_id", "sample_id", "image_group", "clean_question", "clean_answer"):
        table = table.filter(pc.is_valid(table["clean_question"])).combine_chunks()
        columns = {
            "image": table["image_group"],
            "key": map_distinct(table["clean_question"], text_key),
            "prefix": map_distinct(table["clean_question"], lambda text: " ".join(words_of(text)[:2])),
            "answer": map_distinct(table["clean_answer"], normalize_answer),
        }
        columns |= {name: table[name] for name in ("row", "annotation_id", "sample_id")}
        yield pa.table(columns).select(QUESTIONS.names)


def max_answer_count(kind: str, answers: dict[str, int], config: BalanceConfig) -> int:
    """Return how many questions of one type may have the same answer, so that no share exceeds the maximum.

    If a type has so few distinct answers that some share must exceed the maximum, all questions are kept. If
    there are too few questions of rare types to balance, all of these questions are kept too.
    """
    max_share, counts = config.max_share(answers.keys()), answers.values()
    if len(answers) * max_share < 1 or (kind == RARE and sum(counts) < config.min_questions_per_type):
        return max(counts)
    candidates = range(1, max(counts) + 1)
    return bisect_left(
        candidates, True, key=lambda limit: limit > max_share * sum(min(count, limit) for count in counts)
    )


STEP = RowStep(
    "balance",
    settings=lambda plan: (plan.config.balance, plan.config.seed),
    compare=balance,
    adds=ADDS,
    advice={"answer_too_common": "raise balance.max_answer_frac or balance.max_yes_no_frac"},
)
