"""Curation over shards: the same rows go and stay, for the same reasons, as in one process."""

import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pytest

from pipeline.cluster import curate
from pipeline.cluster.fill import usual_file
from pipeline.cluster.job import Job
from pipeline.config import Config, resolve
from pipeline.fingerprint import digest
from pipeline.likeness import COMPARED, compare_samples
from pipeline.marks import Mark, format_marks, name_of
from pipeline.objects import is_object, place
from pipeline.stages import STAGES, apply, join_likeness, join_marks, kind_of_images
from pipeline.store import Folder, read_table, remove, write_table, write_text
from pipeline.tables import ANNOTATION, CHECK, SAMPLE
from pipeline.types import Silence
from pipeline.verify import Usual

GROUPED = ("verify", "dedupe", "balance", "split", "review")
THINGS = ("ring", "rimg", "star", "cat", "statue", "statur", "lamp", "table")  # some of them misspelled
NOTHING = pa.schema([("request_id", pa.string()), ("reason", pa.string())])
COLORS = ("red", "blue", "green")


def settings(**more: Any) -> Config:
    balance = {"min_questions_per_type": 8, "tail_share": 0.02, "max_answer_share": 0.3}
    return resolve(source="folder:x", dedupe={"images": "photos", "max_images_per_caption": 3}, balance=balance, **more)


def samples(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Samples of which some look like another one, in splits that some of them have."""
    rows: list[dict[str, Any]] = []
    for n in range(count):
        look = rng.randbytes(32)
        if n % 4 == 1:  # the same, nearly the same, or near
            apart = rng.choice((0, 1, 5))
            look = bytes(b ^ 255 for b in rows[-1]["looks"][0][:apart]) + rows[-1]["looks"][0][apart:]
        about = {"split": rng.choice((None, None, "train", "test")), "width_px": rng.randint(50, 60), "height_px": 50}
        rows.append({"sample_id": digest([n]), "looks": [look], **about})
    return rows


def annotations(rows: list[dict[str, Any]], rng: random.Random) -> pa.Table:
    """Captions and questions of a small world, so that many of them meet."""
    found = []
    for row in rows:
        said = [f"A {rng.choice(COLORS)} {rng.choice(THINGS)} stands on a white table." for _ in range(3)]
        said.append(
            rng.choice((said[0].lower(), f"The image shows {said[1][0].lower()}{said[1][1:]}", "A wide and empty street."))
        )
        texts: list[dict[str, Any]] = [{"task": "caption", "style": f"s{n}", "text": text} for n, text in enumerate(said)]
        for _ in range(3):
            thing = rng.choice(THINGS)
            yes_no = {
                "question": f"Is there a {thing} here?",
                "answer": rng.choice(("yes", "yes", "no")),
                "answer_type": "yes/no",
            }
            number = {"question": f"How many {thing}s are seen?", "answer": str(rng.randint(1, 3)), "answer_type": "number"}
            texts.append({"task": "qa", "style": "", **rng.choice((yes_no, number))})
        rare = {"question": f"{rng.choice(THINGS)} where now?", "answer": "left", "answer_type": "other"}
        texts.append({"task": "qa", "style": "", **rare})
        for position, text in enumerate(texts):
            ids = {"sample_id": row["sample_id"], "request_id": digest([row["sample_id"], text["task"]]), "position": position}
            ids |= {"annotation_id": digest([row["sample_id"], position]), "prompt_id": "p", "pages": 1}
            found.append({**ids, "evidence_pages": [], "expression": "", "source_split": row["split"], **text})
    return pa.Table.from_pylist(found, schema=ANNOTATION)


def checked(table: pa.Table, config: Config) -> pa.Table:
    """What filter leaves of annotations, asked again: some can be guessed; how well captions fit is drawn by lot."""
    for name in ("validate", "filter"):
        if name == "filter":
            table = table.append_column("repeats", pa.nulls(len(table), pa.string()))
        table = STAGES[name](table, config)
        table = table.filter(pa.compute.is_null(table["reason"])).drop_columns(["reason"])
    rows = table.to_pylist()
    blind = {"kind": "blind", "question": "?"}
    checks = [
        [{**blind, "expected": row["clean_answer"], "answer": "left"}] if row["answer_type"] == "other" else [] for row in rows
    ]
    fits = [random.Random(row["annotation_id"]).random() if row["clean_text"] else None for row in rows]
    table = table.append_column("checks", pa.array(checks, pa.list_(CHECK)))
    return table.append_column("alignment", pa.array(fits, pa.float64()))


def in_one_process(folder: Folder, rows: list[dict[str, Any]], table: pa.Table, config: Config) -> None:
    for name in GROUPED:
        if name == "dedupe":
            looks = pa.Table.from_pylist(rows, schema=pa.schema([SAMPLE.field(column) for column in COMPARED]))
            table = join_likeness(table, compare_samples(looks, kind_of_images(config)))
        if name == "review":
            table = join_marks(folder, table, Silence())
        apply(folder, name, STAGES[name](table, config), table)
        table = read_table(folder.stage(name))


def over_shards(
    job: Job, rows: list[dict[str, Any]], table: pa.Table, order: Callable[[int], list[int]]
) -> list[dict[str, Any]]:
    """Do the steps as workers would, one number after another; return all that they told."""
    schema = pa.schema([SAMPLE.field(column) for column in COMPARED])
    mine = pa.Table.from_pylist(rows, schema=schema)
    for number in range(job.shards):
        folder = job.shard(number)
        parts = [whole.filter(pa.array(job.shard_of(whole["sample_id"].to_pylist()) == number)) for whole in (mine, table)]
        samples, texts = parts
        write_table(folder.stage("source"), [samples], samples.schema)
        write_table(folder.stage("verify", "checked"), [texts], texts.schema)
        usual_file(folder).write_bytes(pickle.dumps(Usual.of(texts)))
        for stage in ("source", "generate", "validate", "filter"):  # of which only the sums are wanted
            for which in ("kept", "rejected"):
                if not folder.stage(stage, which).exists():
                    write_table(folder.stage(stage, which), [NOTHING.empty_table()], NOTHING)
    return [task(job, n) for task, by_all in curate.steps(job) for n in (order(job.shards) if by_all else [0])]


def left(folders: list[Folder], stage: str, which: str) -> list[dict[str, Any]]:
    tables = [read_table(folder.stage(stage, which)) for folder in folders]
    return sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["annotation_id"])


@pytest.fixture(params=["folder", "object store"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "many" if request.param == "folder" else place(f"memory://{uuid4().hex}")
    yield path
    remove(path)


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_over_shards_the_same_rows_go_for_the_same_reasons(tmp_path: Path, home: Path, shards: int) -> None:
    rng = random.Random(shards)
    rows = samples(120, rng)
    config = settings()
    table = checked(annotations(rows, rng), config)
    one = Folder(tmp_path / "one")
    in_one_process(one, rows, table, config)
    # People have their say: of texts that stay, one is bad, and a question of a pair is asked in other words.
    kept = left([one], "split", "kept")
    paired = next(row for row in kept if row["pair_id"])
    other = next(row for row in kept if not row["pair_id"])
    bad = Mark.model_validate({**named(other), "mark": "bad", "reason": "unclear"})
    words = {"question": "Which one is it?", "answer": paired["clean_answer"]}
    marks = format_marks([bad, Mark.model_validate({**named(paired), "mark": "edited", **words})])
    for folder in (one, Folder(home)):
        write_text(folder.marks, marks)
    in_one_process(one, rows, table, config)
    filled = tuple(f"{number:05d}/filled" for number in range(shards)) if is_object(home) else ()
    job = Job(config, home, tmp_path, shards, 1, "embedded", "s", "r", "files", "inputs", filled)
    told = over_shards(job, rows, table, lambda count: random.Random(0).sample(range(count), count))
    for stage in GROUPED:
        for which in ("kept", "rejected"):
            assert left(job.folders, stage, which) == left([one], stage, which), (stage, which)
    reasons = {row["reason"] for stage in GROUPED for row in left([one], stage, "rejected")}
    assert reasons == {
        "answerable_without_image",
        "low_alignment",
        "near_duplicate_image",
        "near_held_out_image",
        "duplicate",
        "caption_of_many_images",
        "answer_too_common",
        "concepts_too_common",
        "marked_unclear",
    }
    assert sum(one["marks"] for one in told if "marks" in one) == 2
    groups = Counter(group for group, _ in {(row["image_group"], row["sample_id"]) for row in left([one], "review", "kept")})
    assert sum(one["groups"] for one in told if "groups" in one) == sum(count > 1 for count in groups.values())
    final = left([one], "review", "kept")
    assert any(row["final_pair_id"] for row in final)
    assert sum(row["pair_id"] is not None and row["final_pair_id"] is None for row in final) == 2


def named(row: dict[str, Any]) -> dict[str, str]:
    sample_id, content = name_of(row)
    return {"sample_id": sample_id, "content": content}


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = samples(3, rng)
    config = settings()
    table = checked(annotations(rows, rng), config)
    job = Job(config, tmp_path, tmp_path, 16, 1, "embedded", "s", "r", "files", "inputs")
    over_shards(job, rows, table, lambda count: list(range(count)))
    in_one_process(Folder(tmp_path / "one"), rows, table, config)
    assert left(job.folders, "review", "kept") == left([Folder(tmp_path / "one")], "review", "kept")
