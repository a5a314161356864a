"""Frequent answers are down-sampled, rare ones stay, and row order does not matter."""

from collections import Counter
from typing import Any

import pyarrow as pa

from pipeline.steps.balance import RARE, STEP
from pipeline.tables import STRING, fields
from tests.step_runs import numbered_table, run_step

IDS = ("annotation_id", "sample_id", "image_group", "task")
SCHEMA = pa.schema(fields(STRING, *IDS, "clean_text", "clean_question", "clean_answer", "answer_type"))


def table(*rows: dict[str, Any]) -> pa.Table:
    return numbered_table(SCHEMA, rows, task="qa")


def question(text: str, answer: str) -> dict[str, Any]:
    return {"clean_question": text, "clean_answer": answer, "answer_type": "other"}


def questions(text: str, *answers: str) -> list[dict[str, Any]]:
    return [question(text, answer) for answer in answers]


def balance_rows(rows: pa.Table, seed: int = 0, shards: int = 1, **settings: Any) -> list[dict[str, Any]]:
    rows = run_step(STEP, rows, shards=shards, seed=seed, balance=settings)
    return [row for row in rows.to_pylist() if row["reason"] is None]


def test_common_answer_is_cut_to_its_share_and_rare_answers_stay() -> None:
    rows = balance_rows(table(*questions("Is there a dog?", *["yes"] * 900, *["no"] * 100)))
    assert 0.45 <= sum(row["clean_answer"] == "yes" for row in rows) / len(rows) <= 0.55
    answers = [*["red"] * 500, *["blue"] * 60, *["green"] * 40, *["mauve"] * 3]
    rows = balance_rows(table(*questions("What color is the car?", *answers)))
    counts = Counter(row["clean_answer"] for row in rows)
    assert counts["red"] == 68
    assert counts["red"] <= 0.4 * counts.total()
    assert (counts["blue"], counts["green"], counts["mauve"]) == (60, 40, 3)


def test_question_types_with_one_answer_or_few_questions_are_not_reduced() -> None:
    assert len(balance_rows(table(*questions("Where is the dog?", *["outside"] * 80)))) == 80
    assert len(balance_rows(table(*questions("Is there a dog?", *["yes"] * 20, "no")))) == 21
    rare = [*questions("Are there cats?", "no"), *questions("Does it rain?", "yes")]
    rows = balance_rows(table(*questions("Is there a dog?", *["yes", "no"] * 30), *rare))
    assert [row["question_type"] for row in rows] == ["is there"] * 60 + [RARE] * 2


def test_paired_questions_are_about_similar_images_that_are_not_near_duplicates() -> None:
    buses = [("A red bus and a tree.", "2"), ("A red bus and a bush.", "3")]
    descriptions = [*buses, ("A cat on a bed.", "2"), ("A cat on a sofa.", "2")]
    rows: list[dict[str, Any]] = []
    for n, (text, answer) in enumerate(descriptions):
        image = {"sample_id": f"s{n}", "image_group": f"s{n}"}
        rows += [image | {"task": "caption", "clean_text": text}, image | question("How many?", answer)]
    pairs = [row for row in balance_rows(table(*rows)) if row["pair_id"]]
    assert {row["sample_id"] for row in pairs} == {"s0", "s1"}
    assert len({row["pair_id"] for row in pairs}) == 1
    near = [{"image_group": "g", **question("Is it?", answer)} for answer in ("yes", "no")]
    assert [row["pair_id"] for row in balance_rows(table(*near))] == [None, None]


def test_result_depends_on_seed_but_not_on_row_order() -> None:
    def ids(rows: pa.Table, seed: int = 0) -> set[str]:
        return {row["annotation_id"] for row in balance_rows(rows, seed)}

    asked = table(*questions("Is there a dog?", *["yes"] * 400, *["no"] * 100))
    backwards = asked.take(list(range(499, -1, -1)))
    assert ids(asked) == ids(backwards) != ids(asked, seed=1)
    assert balance_rows(asked) == balance_rows(asked, shards=7)


def test_paired_questions_are_kept_first_and_broken_pairs_lose_their_id() -> None:
    # Twenty questions occur twice: once answered yes, once answered no.
    rows = [question(f"Is there a thing {n if n < 20 else n + 1000}?", "yes") for n in range(300)]
    rows += [question(f"Is there a thing {n}?", "no") for n in range(100)]
    kept_rows = balance_rows(table(*rows))
    pairs = Counter(row["pair_id"] for row in kept_rows if row["pair_id"])
    assert set(pairs.values()) == {2} and len(pairs) == 20
    # Some paired questions must be removed. Their partners then lose the pair id.
    rows = [question(f"Is it {n // 2}?", ("no", "yes")[n % 2]) for n in range(100)]
    rows += [question(f"Is it {n}?", "maybe") for n in range(50)]
    remaining = balance_rows(table(*rows), max_yes_no_frac=0.5, min_questions_per_type=1)
    assert set(Counter(row["pair_id"] for row in remaining if row["pair_id"]).values()) == {2}
