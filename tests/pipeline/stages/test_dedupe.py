"""Dedupe: repeated texts of one image are rejected, equal texts of other images stay, and decisive words keep texts apart."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from pipeline.stages.dedupe import STAGE
from pipeline.tables import IMAGE_GROUPS
from tests.stage_runs import run_stage

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("annotation_id", "sample_id", "task", "prompt_id", "clean_text", "clean_record")]
    + [("clean_question", pa.string()), ("agreement", pa.float64()), ("alignment", pa.float64()), ("hedge_count", pa.int32())]
)


def table(*rows: dict[str, Any]) -> pa.Table:
    """Return rows named by their position, each of its own sample unless the row gives one."""
    defaults = [
        {"annotation_id": f"{n:06d}", "sample_id": f"s{n}", "task": "caption", "prompt_id": "p"} for n in range(len(rows))
    ]
    return pa.Table.from_pylist([default | row for default, row in zip(defaults, rows, strict=True)], schema=SCHEMA)


def captions(*texts: str, **more: Any) -> pa.Table:
    return table(*({"clean_text": text, **more} for text in texts))


def deduped(rows: pa.Table, shards: int = 1, **settings: Any) -> pa.Table:
    return run_stage(STAGE, rows, shards=shards, dedupe=settings)


def reasons(rows: pa.Table, shards: int = 1, **settings: Any) -> dict[str, str | None]:
    marked = deduped(rows, shards, **settings)
    return dict(zip(marked["annotation_id"].to_pylist(), marked["reason"].to_pylist(), strict=True))


def test_of_captions_of_one_image_that_say_the_same_one_is_kept_and_named() -> None:
    rows = captions("A red ring.", "There is a  RED ring", "A blue ring.", sample_id="s")
    marked = deduped(rows)
    assert marked["reason"].to_pylist() == [None, "duplicate", None]
    assert marked["duplicate_of"].to_pylist() == [None, "000000", None]
    assert marked["cluster"][0] == marked["cluster"][1] != marked["cluster"][2]


def grouped(rows: pa.Table, monkeypatch: pytest.MonkeyPatch, *reasons: str | None) -> list[str | None]:
    """Return the reasons of rows whose images form one group and have the given reasons."""
    ids = rows["sample_id"].to_pylist()
    groups = pa.table([ids, ["g"] * len(ids), list(reasons), [None] * len(ids)], schema=IMAGE_GROUPS)
    monkeypatch.setattr("pipeline.stages.dedupe.group_images", lambda shards, kind: groups)
    marked = deduped(rows)
    assert marked["image_group"].to_pylist() == ["g"] * len(ids)
    row_reasons: list[str | None] = marked["reason"].to_pylist()
    return row_reasons


def test_images_that_look_the_same_count_as_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grouped(captions("A red ring.", "A red ring."), monkeypatch, None, None) == [None, "duplicate"]


def test_a_rejected_image_rejects_its_annotations_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = captions("A red ring.", "A red ring.", "A blue ring.")
    reason = "near_duplicate_image"
    assert grouped(rows, monkeypatch, reason, None, reason) == [reason, None, reason]


def test_the_same_question_about_another_image_is_no_duplicate() -> None:
    question = {"task": "qa", "clean_question": "What is the man doing?"}
    assert set(reasons(table(*[question] * 50)).values()) == {None}


def test_a_caption_and_a_question_are_not_duplicates() -> None:
    rows = table({"sample_id": "s", "clean_text": "A ring"}, {"sample_id": "s", "task": "qa", "clean_question": "A ring?"})
    assert list(reasons(rows).values()) == [None, None]


def test_a_caption_stands_with_so_many_images_and_no_more() -> None:
    reason_of = reasons(captions(*["A man stands on a beach."] * 7, "A man runs on a beach."), max_images_per_caption=3)
    assert list(reason_of.values()) == [None] * 3 + ["caption_of_many_images"] * 4 + [None]


def test_of_equal_captions_that_of_a_person_stays() -> None:
    by_model: dict[str, Any] = {"sample_id": "s", "clean_text": "A red ring", "agreement": 1.0}
    by_person: dict[str, Any] = {"sample_id": "s", "clean_text": "a red ring!", "prompt_id": "human"}
    for rows in ([by_model, by_person], [by_person, by_model]):
        found = deduped(table(*rows))
        kept = [row["prompt_id"] for row in found.to_pylist() if row["reason"] is None]
        assert kept == ["human"]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"agreement": 1.0}, {"agreement": 0.5}),
        ({"alignment": 0.3}, {"alignment": 0.2}),
        ({"hedge_count": 0}, {"hedge_count": 1}),
        ({"agreement": 1.0, "alignment": 0.1}, {"agreement": 0.0, "alignment": 0.9}),
    ],
)
def test_the_best_of_a_cluster_is_kept_whichever_comes_first(better: dict[str, Any], worse: dict[str, Any]) -> None:
    row = {"sample_id": "s", "clean_text": "A red ring."}
    assert list(reasons(table(row | worse, row | better)).values()) == ["duplicate", None]
    assert list(reasons(table(row | better, row | worse)).values()) == [None, "duplicate"]


# Words of this test only; none of them is shared with the code.
ANIMALS = ["otter", "walrus", "pelican", "badger", "lizard", "heron", "donkey", "ferret", "magpie", "hamster"]
COATS = ["crimson", "turquoise", "spotted", "ginger", "silver"]
DEEDS = ["naps beside", "leaps over", "peers at", "hides behind"]
THINGS = ["the anvil", "a wicker basket", "the mossy boulder", "a broken ladder", "the copper kettle", "an empty barrel"]


def planted(count: int) -> tuple[list[str], list[tuple[str, str]], list[tuple[str, str]]]:
    """Return captions, each reworded, and each altered in meaning; the last two as (kind of change, text)."""
    rng = random.Random("planted")
    bases = [f"A {c} {a} {d} {t}." for c, a, d, t in itertools.product(COATS, ANIMALS, DEEDS, THINGS)]
    rng.shuffle(bases)
    bases = bases[:count]
    reworded = [(kind, make(base, rng)) for base, (kind, make) in zip(bases, itertools.cycle(REWORDED.items()), strict=False)]
    altered = [(kind, make(base, rng)) for base, (kind, make) in zip(bases, itertools.cycle(ALTERED.items()), strict=False)]
    return bases, reworded, altered


def _moved(base: str, rng: random.Random) -> str:
    deed = next(phrase for phrase in DEEDS if phrase in base)
    front, back = base.rstrip(".").split(f" {deed} ")
    return f"{deed.capitalize()} {back}, {front[0].lower()}{front[1:]}."


def _swapped(base: str, values: list[str], rng: random.Random) -> str:
    old = next(value for value in values if value in base)
    return base.replace(old, rng.choice([value for value in values if value != old]))


REWORDED: dict[str, Callable[[str, random.Random], str]] = {
    "case and marks": lambda base, rng: base.upper().replace(".", " !"),
    "opening": lambda base, rng: (
        rng.choice(("This photo shows ", "In the image, there is ", "We can see ")) + base[0].lower() + base[1:]
    ),
    "articles": lambda base, rng: base.replace("A ", "The ", 1).replace(" the ", " that ").replace(" an ", " the "),
    "adverbs": lambda base, rng: base.replace("A ", "There is a really ", 1),
    "order of clauses": _moved,
}
ALTERED: dict[str, Callable[[str, random.Random], str]] = {
    "color": lambda base, rng: _swapped(base, COATS, rng),
    "subject": lambda base, rng: _swapped(base, ANIMALS, rng),
    "deed": lambda base, rng: _swapped(base, DEEDS, rng),
    "number": lambda base, rng: base.replace("A ", "Three ", 1),
    "negation": lambda base, rng: (
        base.replace(" naps", " never naps").replace(" leaps", " never leaps").replace("A ", "No ", 1)
    ),
    "plural": lambda base, rng: base.replace(
        next(a for a in ANIMALS if a in base), next(a for a in ANIMALS if a in base) + "s"
    ),
}


def test_planted_duplicates_are_found_and_decisive_words_keep_texts_apart() -> None:
    bases, reworded, altered = planted(1200)
    texts = [*bases, *(text for _, text in reworded), *(text for _, text in altered)]
    marked = deduped(captions(*texts))
    cluster = marked["cluster"].to_pylist()
    n = len(bases)
    right = sum(cluster[index] == cluster[n + index] for index in range(n))
    wrong = sum(cluster[index] == cluster[2 * n + index] for index in range(n))
    clusters: dict[str, set[str]] = {}
    for index, name in enumerate(cluster[: 2 * n]):
        clusters.setdefault(name, set()).add(bases[index % n])
    assert right >= 0.80 * n, f"recall {right / n:.3f}"
    assert wrong == 0
    assert right / (right + sum(len(different) > 1 for different in clusters.values())) >= 0.995


def test_order_and_shards_do_not_matter() -> None:
    bases, reworded, _ = planted(300)
    rows = captions(*bases, *(text for _, text in reworded), *bases)
    shuffled = rows.take(random.Random(1).sample(range(rows.num_rows), rows.num_rows))
    assert reasons(rows) == reasons(shuffled) == reasons(rows, shards=7)


def test_a_cluster_is_named_by_its_first_id_whatever_the_order() -> None:
    rows = captions("A yellow ring.", "A blue ring.", "the yellow ring", "Yellow ring")
    expected = {"000000": "000000", "000001": "000001", "000002": "000000", "000003": "000000"}
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        marked = deduped(rows.take(order))
        assert dict(zip(marked["annotation_id"].to_pylist(), marked["cluster"].to_pylist(), strict=True)) == expected


def test_no_rows_are_no_clusters() -> None:
    assert deduped(captions("A ring.").slice(0, 0)).num_rows == 0


def test_texts_without_words_are_not_merged() -> None:
    rows = captions("", " ", "?", "the", "yes", "no", *["5"] * 3, sample_id="s")
    assert list(reasons(rows).values()) == [None] * 6 + [None, "duplicate", "duplicate"]


def test_of_equal_captions_in_two_styles_that_share_a_reply_one_stays() -> None:
    """A prompt of a user's own may ask the same for both."""
    rows = captions("A red ring.", "A red ring.", sample_id="s", annotation_id="same")
    assert sorted(map(str, deduped(rows)["reason"].to_pylist())) == ["None", "duplicate"]
