"""Stage: balance. Less of what there is too much of.

Questions: of each type ("how many", "is there"), no answer may make up more than its share, as VQAv2 made it so that guessing
does not pay (Goyal et al., 2017); a question that has another answer with a similar image is kept first, and the two are a
pair. Captions, where it is asked for: MetaCLIP's algorithm (Xu et al., 2023), written anew from the paper: count how many
captions name each entry of a list, and keep a caption by the rarest that it names.

Which rows stay is a function of their ids and the seed, not of their order.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ahocorasick
import numpy as np
import pyarrow as pa

from pipeline.answers import normalize_answer
from pipeline.config import BalanceConfig
from pipeline.errors import ConfigError
from pipeline.fingerprint import digest, unit_interval
from pipeline.tables import BALANCED, require, with_reason
from pipeline.texts import content_words, text_key, words_of
from pipeline.wordnet import names

RARE = "(rare)"  # the type of all questions whose own type is too rare to be balanced by itself
NEIGHBOURS = 24  # images that a partner is looked for among, as VQAv2's people were shown
_SPACED = str.maketrans({mark: f" {mark} " for mark in ",.;:?!`'\"()[]{}-/"} | {"\t": " ", "\n": " ", "\r": " "})


def balance_annotations(table: pa.Table, config: BalanceConfig, seed: int) -> pa.Table:
    """Return the same rows with their place in the balance (tables.BALANCED) and a `reason` where there are too many like them.

    Raises:
        ConfigError: the user's list of entries cannot be read.
    """
    require(table, "annotation_id", "sample_id", "task", "clean_text", "clean_question", "clean_answer", "answer_type")
    wanted = [
        "annotation_id",
        "sample_id",
        "task",
        "clean_text",
        "clean_question",
        "clean_answer",
        "answer_type",
        "image_group",
    ]
    rows = table.select([name for name in wanted if name in table.column_names]).to_pylist()
    chance = {row["annotation_id"]: unit_interval("balance", seed, row["annotation_id"]) for row in rows}
    questions = [n for n, row in enumerate(rows) if row["clean_question"] is not None]
    captions = [n for n, row in enumerate(rows) if row["clean_text"] is not None]
    columns: dict[str, list[Any]] = {name: [None] * len(rows) for name in BALANCED.names}
    reasons: list[str | None] = [None] * len(rows)
    _balance_answers(rows, questions, config, chance, columns, reasons)
    if config.tail_share is not None:
        _balance_captions(rows, captions, config, chance, columns, reasons)
    for field in BALANCED:
        table = table.append_column(field, pa.array(columns[field.name], field.type))
    return with_reason(table, reasons)


def _balance_answers(
    rows: list[dict[str, Any]],
    questions: list[int],
    config: BalanceConfig,
    chance: dict[str, float],
    columns: dict[str, list[Any]],
    reasons: list[str | None],
) -> None:
    types = question_types([rows[n]["clean_question"] for n in questions], config.min_questions_per_type)
    pairs = find_pairs([rows[n] for n in questions], _entities(rows))
    partner = {questions[a]: questions[b] for pair in pairs for a, b in (pair, pair[::-1])}
    of_type: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for n, kind in zip(questions, types, strict=True):
        columns["question_type"][n] = kind
        of_type[kind][normalize_answer(rows[n]["clean_answer"])].append(n)
    for kind, answers in of_type.items():
        for found in answers.values():
            found.sort(key=lambda n: (n not in partner, chance[rows[n]["annotation_id"]]))
        for n in too_common(kind, answers, config):
            reasons[n] = "answer_too_common"
    for n, other in partner.items():
        if reasons[n] is None and reasons[other] is None:
            columns["pair_id"][n] = pair_id(*(rows[each]["annotation_id"] for each in (n, other)))


def _balance_captions(
    rows: list[dict[str, Any]],
    captions: list[int],
    config: BalanceConfig,
    chance: dict[str, float],
    columns: dict[str, list[Any]],
    reasons: list[str | None],
) -> None:
    assert config.tail_share is not None
    matched = match_entries([rows[n]["clean_text"] for n in captions], read_entries(config.entries))
    counts = Counter(entry for found in matched for entry in found)
    threshold = count_of_tail(list(counts.values()), config.tail_share)
    for n, found in zip(captions, matched, strict=True):
        kept = keep_probability([counts[entry] for entry in found], threshold)
        columns["entries"][n], columns["keep_probability"][n] = found, kept
        if chance[rows[n]["annotation_id"]] >= kept:
            reasons[n] = "concepts_too_common"


def question_types(questions: Sequence[str], min_questions: int) -> list[str]:
    """Return the type of each question: its first two words, or `RARE` where fewer than so many begin like it."""
    types = [first_words(question) for question in questions]
    counts = Counter(types)
    return [kind if counts[kind] >= min_questions else RARE for kind in types]


def first_words(question: str) -> str:
    """Return the two words that say of which type a question is."""
    return " ".join(words_of(question)[:2])


def too_common(kind: str, answers: Mapping[str, Sequence[int]], config: BalanceConfig) -> list[int]:
    """Return the questions of a type that are to go, of those with each answer, which stand in the order to keep them in."""
    if kind == RARE and sum(map(len, answers.values())) < config.min_questions_per_type:
        return []  # too few to say what is too common
    most = largest_count([len(found) for found in answers.values()], config.max_share(answers.keys()))
    return [n for found in answers.values() for n in found[most:]]


def pair_id(one: str, other: str) -> str:
    """Return the name of a pair of annotations."""
    return digest(sorted((one, other)))[:16]


def largest_count(counts: Sequence[int], max_share: float) -> int:
    """Return the most rows that any answer may keep, so that none has a larger share of what is left.

    Fewer answers than `max_share` leaves room for are not cut: one alone has all of them, whatever is kept.
    """
    if len(counts) * max_share < 1:
        return max(counts, default=0)
    candidates = range(1, max(counts) + 1)
    return bisect_left(candidates, True, key=lambda most: most > max_share * sum(min(count, most) for count in counts))


def find_pairs(questions: Sequence[dict[str, Any]], entities: dict[str, frozenset[str]]) -> list[tuple[int, int]]:
    """Return pairs of positions: the same question about two images with two answers, most similar images first.

    Images are as similar as the content words of their captions; each is compared with the next `NEIGHBOURS` of those asked the
    same, in the order of these words. Two that look the same (`image_group`) are no pair; no question is in two pairs.
    """
    asked: dict[str, list[int]] = defaultdict(list)
    for n, row in enumerate(questions):
        asked[text_key(row["clean_question"])].append(n)
    answers = [normalize_answer(row["clean_answer"]) for row in questions]
    words = [entities.get(row["sample_id"], frozenset()) for row in questions]
    pairs: list[tuple[int, int]] = []
    for same in asked.values():
        same.sort(key=lambda n: (sorted(words[n]), questions[n]["annotation_id"]))
        found = [
            (-_overlap(words[a], words[b]), questions[a]["annotation_id"], questions[b]["annotation_id"], a, b)
            for at, a in enumerate(same)
            for b in same[at + 1 : at + 1 + NEIGHBOURS]
            if answers[a] != answers[b] and _place(questions[a]) != _place(questions[b])
        ]
        taken: set[int] = set()
        for _, _, _, a, b in sorted(found):
            if not taken & {a, b}:
                taken |= {a, b}
                pairs.append((a, b))
    return pairs


def match_entries(texts: Iterable[str], entries: tuple[str, ...]) -> list[list[int]]:
    """Return, for each text, the entries that stand in it as whole words, each once, in order.

    Both are in lower case, and punctuation stands apart; MetaCLIP is case-sensitive and sets fewer marks apart.
    """
    automaton = _automaton(entries)
    return [sorted({entry for _, entry in automaton.iter(spaced(text))}) for text in texts]


def count_of_tail(counts: Sequence[int], share: float) -> int:
    """Return the count t for which the entries that are named fewer than t times have this share of all that is named."""
    if not counts:
        return 1
    ordered = np.sort(np.asarray(counts))
    return int(ordered[np.abs(np.cumsum(ordered) / ordered.sum() - share).argmin()])


def keep_probability(counts: Sequence[int], threshold: int) -> float:
    """Return the probability that at least one entry of a caption keeps it, each by min(1, t / its count); 1 for no entry."""
    lost = 1.0
    for count in counts:
        lost *= 1 - min(1.0, threshold / count)
    return 1 - lost if counts else 1.0


def read_entries(path: Path | None) -> tuple[str, ...]:
    """Return the entries that captions are balanced over: a file of the user's, one a line, or WordNet's names.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    if path is None:
        return names()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="balance.entries is a text file, one entry a line") from None
    found = tuple(sorted({" ".join(line.lower().split()) for line in lines} - {""}))
    if not found:
        raise ConfigError(f"{path} has no entries", hint="balance.entries is a text file, one entry a line")
    return found


def spaced(text: str) -> str:
    """Return a text as it is matched: in lower case, with a space around each word and each mark."""
    return f" {' '.join(text.lower().translate(_SPACED).split())} "


@cache
def _automaton(entries: tuple[str, ...]) -> Any:
    automaton = ahocorasick.Automaton()
    for number, entry in enumerate(entries):
        automaton.add_word(spaced(entry), number)
    automaton.make_automaton()
    return automaton


def _entities(rows: Iterable[dict[str, Any]]) -> dict[str, frozenset[str]]:
    """Return the content words of each sample's captions."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["clean_text"] is not None:
            found[row["sample_id"]].update(content_words(row["clean_text"]))
    return {sample_id: frozenset(words) for sample_id, words in found.items()}


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(1, len(one | other))


def _place(row: dict[str, Any]) -> str:
    return str(row.get("image_group") or row["sample_id"])
