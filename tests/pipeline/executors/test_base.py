"""Steps over shards: rows are kept or rejected for the same reasons for any number of shards."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import IMAGE_GROUPS_FILE, DatasetDir
from pipeline.dataset.records import write_record
from pipeline.dataset.reviews import Review, format_lines, text_name
from pipeline.digests import digest
from pipeline.images.near_duplicates import COMPARED_COLUMNS, compare_samples
from pipeline.plan import Plan
from pipeline.progress import NullProgress
from pipeline.run import steps_of
from pipeline.steps import filter as filter_
from pipeline.steps.base import RowStep, Work
from pipeline.steps.filter import judge_texts
from pipeline.steps.validate import validate_annotations
from pipeline.storage.files import read_table, write_table, write_text
from pipeline.tables import ANNOTATION, CHECK, IMAGE_GROUPS, SAMPLE
from tests.hostile import LONG
from tests.step_runs import ShardList, plan_of, with_results

THINGS = ("ring", "lizard", "star", "cat", "statue", "bottle", "lamp", "table")
COLORS = ("red", "blue", "green")
COMPARED_SCHEMA = pa.schema([SAMPLE.field(column) for column in COMPARED_COLUMNS])
REJECTED_COLUMNS = ("reason", "duplicate_of", "cluster", "near_duplicate_of")
KEPT_COLUMNS = (
    "cluster", "image_group", "question_type", "final_pair_id", "split",
    "final_text", "final_question", "agreement", "answered_blind",
)  # fmt: skip
# Digests by seed. A change means that other rows are kept, or rejected for other reasons.
OUTCOMES = {1: "9683a86f15edeaa8", 3: "a64b5b6442c646fd", 8: "0f5f297088dc6831"}


def settings() -> Config:
    balance = {"min_questions_per_type": 8, "max_answer_frac": 0.3}
    checks = {"checks": ["blind", "alignment"]}
    dedupe = {"images": "photos", "max_images_per_caption": 3}
    return resolve(source="folder:x", dedupe=dedupe, balance=balance, verify=checks)


# Without the requests of verify, whose answers are in the rows.
COMPARING = [
    replace(step, prepare=None)
    for step in steps_of(Plan.resolve(settings(), DatasetDir(Path())))
    if isinstance(step, RowStep) and step.name not in ("validate", "filter")
]


def samples(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Return samples: some are near-duplicates of the one before, and some have a split."""
    rows: list[dict[str, Any]] = []
    for n in range(count):
        pdq_hash = rng.randbytes(32)
        if n % 4 == 1:  # equal, a near-duplicate, or near
            inverted, previous = rng.choice((0, 1, 5)), rows[-1]["pdq_hashes"][0]
            pdq_hash = bytes(byte ^ 255 for byte in previous[:inverted]) + previous[inverted:]
        split, width = rng.choice((None, None, "train", "test")), rng.randint(50, 60)
        fields = {"split": split, "width_px": width, "height_px": 50}
        rows.append({"sample_id": digest([n]), "pdq_hashes": [pdq_hash], **fields})
    return rows


def question(text: str, answer: str, answer_type: str) -> dict[str, str]:
    return {"task": "qa", "style": "", "question": text, "answer": answer, "answer_type": answer_type}


def annotations(rows: list[dict[str, Any]], rng: random.Random) -> pa.Table:
    """Return captions and questions over few words, so that many of them are equal."""
    records = []
    for row in rows:
        captions = [f"A {rng.choice(COLORS)} {rng.choice(THINGS)} stands on a white table." for _ in range(3)]
        opened = f"The image shows {captions[1][0].lower()}{captions[1][1:]}"
        captions.append(rng.choice((captions[0].lower(), opened, "A wide and empty street.")))
        texts = [{"task": "caption", "style": f"s{n}", "text": text} for n, text in enumerate(captions)]
        for _ in range(3):
            thing = rng.choice(THINGS)
            yes_no = (f"Is there a {thing} here?", rng.choice(("yes", "yes", "no")), "yes/no")
            number = (f"How many {thing}s are seen?", str(rng.randint(1, 3)), "number")
            texts.append(question(*rng.choice((yes_no, number))))
        texts.append(question(f"{rng.choice(THINGS)} where now?", "left", "other"))
        for position, text in enumerate(texts):
            ids = {
                "sample_id": row["sample_id"],
                "request_id": digest([row["sample_id"], text["task"]]),
                "position": position,
            }
            ids |= {"annotation_id": digest([row["sample_id"], position]), "prompt_id": "p", "pages": 1}
            records.append(
                {**ids, "evidence_pages": [], "expression": "", "source_split": row["split"], **text}
            )
    return pa.Table.from_pylist(records, schema=ANNOTATION)


def checked(table: pa.Table, plan: Plan) -> pa.Table:
    """Return the annotations that pass filter. Some are answerable blind, and alignments are random."""
    judges: tuple[Callable[[pa.Table], pa.Table], ...] = (
        validate_annotations,
        lambda rows: judge_texts(rows, filter_.STEP.settings(plan)),
    )
    for judge in judges:
        table = judge(table)
        table = table.filter(pc.is_null(table["reason"])).drop_columns(["reason"])
    rows = table.to_pylist()
    blind = {"kind": "blind", "question": "?"}
    checks = [
        [{**blind, "expected": row["clean_answer"], "answer": "left"}]
        if row["answer_type"] == "other"
        else []
        for row in rows
    ]
    fits = [random.Random(row["annotation_id"]).random() if row["clean_text"] else None for row in rows]
    table = table.append_column("checks", pa.array(checks, pa.list_(CHECK)))
    return with_results(table.append_column("alignment", pa.array(fits, pa.float64())))


class World:
    """Rows sharded by sample id, before the steps that compare rows."""

    def __init__(self, home: Path, seed: int, shards: int, count: int = 120) -> None:
        rng = random.Random(seed)
        config = settings()
        self.plan = plan_of(home, config)
        self.dataset = self.plan.dataset
        self.shards = [DatasetDir(home / f"shard-{n}") for n in range(shards)]
        rows = samples(count, rng)
        table = checked(annotations(rows, rng), self.plan)
        groups = compare_samples(pa.Table.from_pylist(rows, schema=COMPARED_SCHEMA), "photos")
        write_table(self.dataset.step_file("read", IMAGE_GROUPS_FILE), [groups], IMAGE_GROUPS)
        for n, shard in enumerate(self.shards):
            of_shard = {row["sample_id"] for row in rows if int(row["sample_id"][:8], 16) * shards >> 32 == n}
            sample_table = pa.Table.from_pylist(
                [row for row in rows if row["sample_id"] in of_shard], schema=COMPARED_SCHEMA
            )
            texts = table.filter(pc.is_in(table["sample_id"], pa.array(sorted(of_shard), pa.string())))
            write_table(shard.step_file("read"), [sample_table], sample_table.schema)
            write_table(shard.step_file("filter"), [texts], texts.schema)
            for name in ("read", "filter"):
                write_record(shard, name, "key")

    def compare(self) -> None:
        before = "filter"
        for step in COMPARING:
            step.run(Work(self.plan, ShardList(self.shards), NullProgress(), None), before)
            before = step.name

    def rows(self, step: str, which: str) -> list[dict[str, Any]]:
        rows = [row for shard in self.shards for row in read_table(shard.step_file(step, which)).to_pylist()]
        return sorted(rows, key=lambda row: str(row["annotation_id"]))

    def outcome(self) -> dict[str, list[Any]]:
        """Return the outcome by annotation id: its step, and the columns that explain it."""
        outcomes: dict[str, list[Any]] = {}
        for step in COMPARING:
            for row in self.rows(step.name, "rejected"):
                outcomes[row["annotation_id"]] = [step.name, *(row.get(name) for name in REJECTED_COLUMNS)]
        for row in self.rows("review", "kept"):
            outcomes[row["annotation_id"]] = ["kept", *(row[name] for name in KEPT_COLUMNS)]
        return outcomes


@pytest.mark.parametrize("shards", [1, 3, 8] if LONG else [3])
@pytest.mark.parametrize("seed", OUTCOMES)
def test_rows_have_the_same_outcome_for_any_number_of_shards(tmp_path: Path, seed: int, shards: int) -> None:
    world = World(tmp_path, seed, shards)
    world.compare()
    # Reject one kept text, and edit a question of a pair.
    kept = world.rows("split", "kept")
    paired = next(row for row in kept if row["pair_id"])
    unpaired = next(row for row in kept if not row["pair_id"])
    edit = {"verdict": "edited", "question": "Which one is it?", "answer": paired["clean_answer"]}
    reviews = [reviewed(unpaired, verdict="bad", reason="unclear"), reviewed(paired, **edit)]
    write_text(world.dataset.reviews, format_lines(reviews))
    world.compare()
    outcome = world.outcome()
    assert hashlib.sha256(json.dumps(outcome, sort_keys=True).encode()).hexdigest()[:16] == OUTCOMES[seed]
    assert {values[1] for values in outcome.values() if values[0] != "kept"} == {
        "answerable_without_image", "low_alignment", "near_duplicate_image", "near_held_out_image",
        "duplicate", "caption_of_many_images", "answer_too_common", "reviewed_unclear",
    }  # fmt: skip


def reviewed(row: dict[str, Any], **values: Any) -> Review:
    sample_id, content = text_name(row)
    return Review.model_validate({"sample_id": sample_id, "content": content, **values})


def test_empty_shards_change_nothing(tmp_path: Path) -> None:
    worlds = [World(tmp_path / f"{shards}", 0, shards, count=3) for shards in (1, 5)]
    for world in worlds:
        world.compare()
    assert worlds[0].outcome() == worlds[1].outcome()
    assert any(not read_table(shard.step_file("review")).num_rows for shard in worlds[1].shards)
