"""Frequent answers and captions are down-sampled, rare ones stay, and row order does not matter."""

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
    match_entries,
    max_answer_count,
    read_entries,
)
from pipeline.tables import STRING, fields
from pipeline.text.wordnet import names
from tests.step_runs import numbered_table, run_step

IDS = ("annotation_id", "sample_id", "image_group", "task")
SCHEMA = pa.schema(fields(STRING, *IDS, "clean_text", "clean_question", "clean_answer", "answer_type"))


def table(*rows: dict[str, Any]) -> pa.Table:
    return numbered_table(SCHEMA, rows, task="qa")


def question(text: str, answer: str) -> dict[str, Any]:
    return {"clean_question": text, "clean_answer": answer, "answer_type": "other"}


def questions(text: str, *answers: str) -> list[dict[str, Any]]:
    return [question(text, answer) for answer in answers]


def captions(*texts: str) -> pa.Table:
    return table(*({"task": "caption", "clean_text": text} for text in texts))


def balance_rows(rows: pa.Table, seed: int = 0, shards: int = 1, **settings: Any) -> list[dict[str, Any]]:
    rows = run_step(STEP, rows, shards=shards, seed=seed, balance=settings)
    return [row for row in rows.to_pylist() if row["reason"] is None]


def largest(counts: list[int], share: float) -> int:
    answers = {f"answer {n}": count for n, count in enumerate(counts)}
    config = BalanceConfig(max_answer_frac=share, max_yes_no_frac=max(share, 0.5))
    return max_answer_count("what is", answers, config)


@pytest.mark.parametrize(("yes", "no"), [(900, 100), (100, 900), (520, 480)])
def test_yes_and_no_are_balanced(yes: int, no: int) -> None:
    rows = table(*questions("Is there a dog?", *["yes"] * yes, *["no"] * no))
    share = sum(row["clean_answer"] == "yes" for row in balance_rows(rows)) / len(balance_rows(rows))
    assert 0.45 <= share <= 0.55


def test_common_answer_is_cut_to_its_share_and_rare_answers_stay() -> None:
    answers = [*["red"] * 500, *["blue"] * 60, *["green"] * 40, *["mauve"] * 3]
    rows = table(*questions("What color is the car?", *answers))
    counts = Counter(row["clean_answer"] for row in balance_rows(rows))
    assert counts["red"] == largest([500, 60, 40, 3], 0.4) == 68
    assert counts["red"] <= 0.4 * counts.total()
    assert (counts["blue"], counts["green"], counts["mauve"]) == (60, 40, 3)


def test_keep_probability_combines_all_matched_entries() -> None:
    assert keep_probability([10, 100], 5) == pytest.approx(1 - 0.5 * 0.95)
    assert keep_probability([3, 1000], 5) == keep_probability([], 5) == 1.0


def test_question_types_with_one_answer_or_few_questions_are_not_reduced() -> None:
    assert len(balance_rows(table(*questions("Where is the dog?", *["outside"] * 80)))) == 80
    assert len(balance_rows(table(*questions("Is there a dog?", *["yes"] * 20, "no")))) == 21
    rare = [*questions("Are there cats?", "no"), *questions("Does it rain?", "yes")]
    rows = balance_rows(table(*questions("Is there a dog?", *["yes", "no"] * 30), *rare))
    assert [row["question_type"] for row in rows] == ["is there"] * 60 + [RARE] * 2


@pytest.mark.parametrize(
    ("counts", "share", "most"),
    [([7], 0.4, 7), ([7, 7], 0.4, 7), ([9, 1], 0.55, 1), ([3, 3, 3], 0.4, 3), ([100, 50, 50], 0.4, 66)],
)
def test_max_answer_count_respects_the_configured_share(counts: list[int], share: float, most: int) -> None:
    assert largest(counts, share) == most


def test_pair_is_one_question_with_two_answers_about_similar_images() -> None:
    descriptions = [
        ("A red bus and a tree.", "2"),
        ("A red bus and a bush.", "3"),
        ("A cat on a bed.", "2"),
        ("A cat on a sofa.", "2"),
    ]
    rows: list[dict[str, Any]] = []
    for n, (text, answer) in enumerate(descriptions):
        image = {"sample_id": f"s{n}", "image_group": f"s{n}"}
        rows += [
            image | {"task": "caption", "clean_text": text},
            image | question("How many are there?", answer),
        ]
    pairs = [row for row in balance_rows(table(*rows)) if row["pair_id"]]
    assert {row["sample_id"] for row in pairs} == {"s0", "s1"}
    assert len({row["pair_id"] for row in pairs}) == 1


def test_near_duplicate_images_are_not_paired() -> None:
    rows = [{"image_group": "g", **question("Is it?", answer)} for answer in ("yes", "no")]
    assert [row["pair_id"] for row in balance_rows(table(*rows))] == [None, None]


def test_entries_match_whole_words_and_may_overlap() -> None:
    entries = ("panda", "red panda", "red", "and", "t-shirt", "5")
    matches = match_entries(["A Red  panda, and\n5 T-shirts; a t-shirt.", "pandas", "Red"], entries)
    assert [[entries[n] for n in row] for row in matches] == [[*entries], [], ["red"]]


def test_matching_equals_the_naive_search() -> None:
    rng = random.Random("match")
    entries = (*rng.sample(names(), 3000), "dog", "hot dog", "dog house")
    vocabulary = [word for entry in rng.sample(entries, 400) for word in entry.split()]
    vocabulary += ["dog", "hot", "house", ",", "the"]
    texts = [" ".join(rng.choices(vocabulary, k=12)) for _ in range(300)]

    def spaced(text: str) -> str:
        for mark in ",.;:?!`'\"()[]{}-/":
            text = text.replace(mark, f" {mark} ")
        return f" {' '.join(text.lower().split())} "

    words = [*map(spaced, entries)]
    naive = [[n for n, entry in enumerate(words) if entry in text] for text in map(spaced, texts)]
    assert match_entries(texts, entries) == naive
    assert sum(map(len, naive)) > 1000


@pytest.fixture(scope="module")
def zipf() -> pa.Table:
    """Return 4,000 captions over 100 words, the n-th of them n times rarer than the first."""
    rng = random.Random("zipf")
    words = [f"w{n}" for n in range(100)]
    return captions(*rng.choices(words, [1 / (n + 1) for n in range(100)], k=4000))


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("entries") / "entries.txt"
    path.write_text("\n".join(f"W{n}" for n in range(100)), encoding="utf-8")
    return path


def test_tail_is_kept_and_head_is_sampled_by_formula(zipf: pa.Table, entries: Path) -> None:
    share = 0.2
    before = Counter(zipf["clean_text"].to_pylist())
    threshold = count_of_tail(list(before.values()), share)
    settings: dict[str, Any] = {"tail_frac": share, "entries": entries, "keep_best_caption": False}
    after = Counter(row["clean_text"] for row in balance_rows(zipf, **settings))
    assert all(after[word] == count for word, count in before.items() if count <= threshold)
    head = [word for word, count in before.items() if count > 2 * threshold]
    for word in head:
        chance = keep_probability([before[word]], threshold)
        sigma = (before[word] * chance * (1 - chance)) ** 0.5
        assert abs(after[word] - before[word] * chance) <= 3 * sigma
    assert len(head) >= 5


def test_result_depends_on_seed_but_not_on_row_order(zipf: pa.Table, entries: Path) -> None:
    def ids(rows: pa.Table, seed: int = 0) -> set[str]:
        return {row["annotation_id"] for row in balance_rows(rows, seed, **settings)}

    settings: dict[str, Any] = {"tail_frac": 0.1, "entries": entries, "keep_best_caption": False}
    shuffled = zipf.take(random.Random(3).sample(range(zipf.num_rows), zipf.num_rows))
    assert ids(zipf) == ids(shuffled) != ids(zipf, seed=1)
    asked = table(*questions("Is there a dog?", *["yes"] * 400, *["no"] * 100))
    backwards = asked.take(list(range(499, -1, -1)))
    assert {row["annotation_id"] for row in balance_rows(asked)} == {
        row["annotation_id"] for row in balance_rows(backwards)
    }
    assert balance_rows(asked) == balance_rows(asked, shards=7)
    assert balance_rows(zipf, **settings) == balance_rows(zipf, shards=5, **settings)


def test_caption_with_rare_word_is_kept_without_entry_file() -> None:
    common = [
        f"Two men are walking with a w{number} in the park."
        for number in range(100)
        for _ in range(1000 // (number + 1))
    ]
    rare = ["A waterskier performs tricks.", "Runners competing in the Olympics.", "Elephants carry people."]
    kept = balance_rows(captions(*common, *rare), tail_frac=0.06, keep_best_caption=False)
    assert set(rare) <= {row["clean_text"] for row in kept}
    assert len(kept) < 0.6 * len(common)
    assert {row["keep_probability"] for row in kept if row["clean_text"] in rare} == {1.0}


def test_each_image_keeps_at_least_its_best_caption(zipf: pa.Table, entries: Path) -> None:
    names = [f"image{number // 4}" for number in range(zipf.num_rows)]
    rows = zipf.set_column(zipf.column_names.index("sample_id"), "sample_id", pa.array(names))
    settings: dict[str, Any] = {"tail_frac": 0.05, "entries": entries}
    kept = balance_rows(rows, **settings)
    assert {row["sample_id"] for row in kept} == {*names} and len(kept) < rows.num_rows
    chances = {row["annotation_id"]: row["keep_probability"] for row in kept}
    before = balance_rows(rows, **settings, keep_best_caption=False)
    assert {row["annotation_id"] for row in before} <= chances.keys()
    assert len({row["sample_id"] for row in before}) < len({*names})


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_unusable_entry_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"list\.txt"):
        read_entries(path)


def test_paired_questions_are_kept_first_and_broken_pairs_lose_their_id() -> None:
    # Twenty of 300 questions answered yes equal a question answered no.
    rows = [question(f"Is there a thing {n if n < 20 else n + 1000}?", "yes") for n in range(300)]
    rows += [question(f"Is there a thing {n}?", "no") for n in range(100)]
    kept_rows = balance_rows(table(*rows))
    pairs = Counter(row["pair_id"] for row in kept_rows if row["pair_id"])
    assert set(pairs.values()) == {2} and len(pairs) == 20
    # More questions of one side are paired than may stay: a question that lost its partner is in no pair.
    rows = [question(f"Is it {n // 2}?", ("no", "yes")[n % 2]) for n in range(100)]
    rows += [question(f"Is it {n}?", "maybe") for n in range(50)]
    remaining = balance_rows(table(*rows), max_yes_no_frac=0.5, min_questions_per_type=1)
    assert set(Counter(row["pair_id"] for row in remaining if row["pair_id"]).values()) == {2}
