"""Balance: frequent answers and captions are down-sampled, rare ones stay, and row order does not matter."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config.sections import BalanceConfig
from pipeline.errors import ConfigError
from pipeline.steps.balance import (
    RARE,
    STEP,
    count_of_tail,
    keep_probability,
    max_answer_count,
    match_entries,
    read_entries,
)
from pipeline.steps.base import whole_groups
from pipeline.text.wordnet import names
from tests.step_runs import run_step

COLUMNS = ("annotation_id", "sample_id", "image_group", "task", "clean_text", "clean_question", "clean_answer", "answer_type")
SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])


def table(*rows: dict[str, Any]) -> pa.Table:
    defaults = [
        {"annotation_id": f"{n:06d}", "sample_id": f"s{n}", "image_group": f"s{n}", "task": "qa"} for n in range(len(rows))
    ]
    return pa.Table.from_pylist([default | row for default, row in zip(defaults, rows, strict=True)], schema=SCHEMA)


def question_rows(question: str, *answers: str) -> list[dict[str, Any]]:
    return [{"clean_question": question, "clean_answer": answer, "answer_type": "other"} for answer in answers]


def captions(*texts: str) -> pa.Table:
    return table(*({"task": "caption", "clean_text": text} for text in texts))


def balance_rows(rows: pa.Table, seed: int = 0, shards: int = 1, **settings: Any) -> list[dict[str, Any]]:
    marked = run_step(STEP, rows, shards=shards, seed=seed, balance=settings)
    kept_rows: list[dict[str, Any]] = [row for row in marked.to_pylist() if row["reason"] is None]
    return kept_rows


def largest(counts: list[int], share: float) -> int:
    answers = {f"answer {n}": count for n, count in enumerate(counts)}
    return max_answer_count("what is", answers, BalanceConfig(max_answer_frac=share, max_yes_no_frac=max(share, 0.5)))


@pytest.mark.parametrize(("yes", "no"), [(900, 100), (100, 900), (520, 480)])
def test_of_yes_and_no_neither_is_much_more_than_half(yes: int, no: int) -> None:
    rows = table(*question_rows("Is there a dog?", *["yes"] * yes, *["no"] * no))
    share = sum(row["clean_answer"] == "yes" for row in balance_rows(rows)) / len(balance_rows(rows))
    assert 0.45 <= share <= 0.55


def test_no_answer_of_a_type_has_more_than_its_share_and_rare_ones_stay() -> None:
    rows = table(*question_rows("What color is the car?", *["red"] * 500, *["blue"] * 60, *["green"] * 40, *["mauve"] * 3))
    counts = Counter(row["clean_answer"] for row in balance_rows(rows))
    assert counts["red"] == largest([500, 60, 40, 3], 0.4) == 68
    assert counts["red"] <= 0.4 * counts.total()
    assert (counts["blue"], counts["green"], counts["mauve"]) == (60, 40, 3)


def test_two_chances_are_the_union_of_both() -> None:
    assert keep_probability([10, 100], 5) == pytest.approx(1 - 0.5 * 0.95)
    assert keep_probability([3, 1000], 5) == keep_probability([], 5) == 1.0


def test_a_type_with_one_answer_and_a_handful_of_questions_are_left_alone() -> None:
    assert len(balance_rows(table(*question_rows("Where is the dog?", *["outside"] * 80)))) == 80
    assert len(balance_rows(table(*question_rows("Is there a dog?", *["yes"] * 20, "no")))) == 21
    rare = [*question_rows("Are there cats?", "no"), *question_rows("Does it rain?", "yes")]
    rows = balance_rows(table(*question_rows("Is there a dog?", *["yes", "no"] * 30), *rare))
    assert [row["question_type"] for row in rows] == ["is there"] * 60 + [RARE] * 2


@pytest.mark.parametrize(
    ("counts", "share", "most"),
    [([7], 0.4, 7), ([7, 7], 0.4, 7), ([9, 1], 0.55, 1), ([3, 3, 3], 0.4, 3), ([100, 50, 50], 0.4, 66)],
)
def test_the_max_answer_count_is_the_last_that_keeps_the_share(counts: list[int], share: float, most: int) -> None:
    assert largest(counts, share) == most


def test_a_pair_asks_the_same_of_two_similar_images_and_gets_two_answers() -> None:
    descriptions = [
        ("A red bus and a tree.", "2"),
        ("A red bus and a bush.", "3"),
        ("A cat on a bed.", "2"),
        ("A cat on a sofa.", "2"),
    ]
    rows: list[dict[str, Any]] = []
    for n, (text, answer) in enumerate(descriptions):
        image = {"sample_id": f"s{n}", "image_group": f"s{n}"}
        rows.append(image | {"task": "caption", "clean_text": text})
        rows.append(image | {"clean_question": "How many are there?", "clean_answer": answer, "answer_type": "number"})
    pairs = [row for row in balance_rows(table(*rows)) if row["pair_id"]]
    assert {row["sample_id"] for row in pairs} == {"s0", "s1"}
    assert len({row["pair_id"] for row in pairs}) == 1


def test_images_that_look_the_same_are_no_pair() -> None:
    rows = [{"image_group": "g", "clean_question": "Is it?", "clean_answer": answer} for answer in ("yes", "no")]
    assert [row["pair_id"] for row in balance_rows(table(*rows))] == [None, None]


def test_entries_are_found_as_whole_words_nested_ones_too() -> None:
    entries = ("panda", "red panda", "red", "and", "t-shirt", "5")
    matches = match_entries(["A Red  panda, and\n5 T-shirts; a t-shirt.", "pandas", "Red"], entries)
    assert [[entries[n] for n in row] for row in matches] == [["panda", "red panda", "red", "and", "t-shirt", "5"], [], ["red"]]


def test_matching_equals_the_naive_search() -> None:
    rng = random.Random("match")
    entries = (*rng.sample(names(), 3000), "dog", "hot dog", "dog house")
    vocabulary = [word for entry in rng.sample(entries, 400) for word in entry.split()] + ["dog", "hot", "house", ",", "the"]
    texts = [" ".join(rng.choices(vocabulary, k=12)) for _ in range(300)]

    def spaced(text: str) -> str:
        for mark in ",.;:?!`'\"()[]{}-/":
            text = text.replace(mark, f" {mark} ")
        return f" {' '.join(text.lower().split())} "

    naive = [[n for n, entry in enumerate(entries) if spaced(entry) in spaced(text)] for text in texts]
    assert match_entries(texts, entries) == naive
    assert sum(map(len, naive)) > 1000


@pytest.fixture(scope="module")
def zipf() -> pa.Table:
    """Return 4,000 captions over 100 words, the n-th of them n times rarer than the first."""
    rng = random.Random("zipf")
    words = [f"w{n}" for n in range(100)]
    return captions(*(" ".join(rng.choices(words, [1 / (n + 1) for n in range(100)], k=1)) for _ in range(4000)))


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("entries") / "entries.txt"
    path.write_text("\n".join(f"W{n}" for n in range(100)), encoding="utf-8")
    return path


def test_the_tail_stays_whole_and_the_head_as_the_formula_says(zipf: pa.Table, entries: Path) -> None:
    share = 0.2
    before = Counter(zipf["clean_text"].to_pylist())
    threshold = count_of_tail(list(before.values()), share)
    after = Counter(row["clean_text"] for row in balance_rows(zipf, tail_frac=share, entries=entries))
    assert all(after[word] == count for word, count in before.items() if count <= threshold)
    head = [word for word, count in before.items() if count > 2 * threshold]
    for word in head:
        chance = keep_probability([before[word]], threshold)
        sigma = (before[word] * chance * (1 - chance)) ** 0.5
        assert abs(after[word] - before[word] * chance) <= 3 * sigma
    assert len(head) >= 5


def test_the_order_of_rows_does_not_matter_and_the_seed_does(zipf: pa.Table, entries: Path) -> None:
    def ids(rows: pa.Table, seed: int = 0) -> set[str]:
        return {row["annotation_id"] for row in balance_rows(rows, seed, tail_frac=0.1, entries=entries)}

    shuffled = zipf.take(random.Random(3).sample(range(zipf.num_rows), zipf.num_rows))
    assert ids(zipf) == ids(shuffled) != ids(zipf, seed=1)
    questions = table(*question_rows("Is there a dog?", *["yes"] * 400, *["no"] * 100))
    backwards = questions.take(list(range(499, -1, -1)))
    assert {row["annotation_id"] for row in balance_rows(questions)} == {
        row["annotation_id"] for row in balance_rows(backwards)
    }
    assert balance_rows(questions) == balance_rows(questions, shards=7)
    assert balance_rows(zipf, tail_frac=0.1, entries=entries) == balance_rows(zipf, shards=5, tail_frac=0.1, entries=entries)


def test_without_a_list_a_caption_is_kept_for_its_rarest_word_in_whatever_form() -> None:
    common = [
        f"Two men are walking with a w{number} in the park." for number in range(100) for _ in range(1000 // (number + 1))
    ]
    rare = ["A waterskier performs tricks.", "Runners competing in the Olympics.", "Elephants carrying their handlers."]
    kept = balance_rows(captions(*common, *rare), tail_frac=0.06)
    assert set(rare) <= {row["clean_text"] for row in kept}
    assert len(kept) < 0.6 * len(common)
    assert {row["keep_probability"] for row in kept if row["clean_text"] in rare} == {1.0}


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_a_list_that_cannot_be_used_is_one_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"list\.txt"):
        read_entries(path)


def test_questions_of_a_pair_stay_rather_than_others_and_a_broken_pair_is_none() -> None:
    questions: list[dict[str, Any]] = []
    for n in range(400):
        answer = "yes" if n < 300 else "no"
        # Twenty questions answered yes have the wording of a question answered no.
        question = f"Is there a thing {n % 300}?" if n < 20 or n >= 300 else f"Is there a thing {n + 1000}?"
        questions.append({"clean_question": question, "clean_answer": answer, "answer_type": "yes/no"})
    kept_rows = balance_rows(table(*questions))
    pairs = Counter(row["pair_id"] for row in kept_rows if row["pair_id"])
    assert set(pairs.values()) == {2} and len(pairs) == 20
    # More questions of one side are paired than may stay: a question that lost its partner is in no pair.
    rows = [{"clean_question": f"Is it {n // 2}?", "clean_answer": ("no", "yes")[n % 2]} for n in range(100)]
    rows += [{"clean_question": f"Is it {n}?", "clean_answer": "maybe"} for n in range(50)]
    remaining = balance_rows(table(*rows), max_yes_no_frac=0.5, min_questions_per_type=1)
    assert all(count == 2 for count in Counter(row["pair_id"] for row in remaining if row["pair_id"]).values())


@pytest.mark.parametrize(("rows_a_table", "min_rows"), [(1, 3), (3, 1), (100, 3)])
def test_regrouped_tables_cut_no_group(rows_a_table: int, min_rows: int) -> None:
    keys = list("aabbbbbcddefgggh")
    whole = pa.table({"key": keys})
    tables = [whole.slice(n, rows_a_table) for n in range(0, len(keys), rows_a_table)]
    regrouped = [part["key"].to_pylist() for part in whole_groups(tables, "key", min_rows)]
    assert [key for part in regrouped for key in part] == keys
    assert sum(len(set(part)) for part in regrouped) == len(set(keys))
    assert all(len(part) >= min_rows for part in regrouped[:-1])
