"""`synth generate --executor ray` on a real Ray cluster, with killed workers and drivers."""

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import Review, format_lines, text_name
from pipeline.dataset.version import Version, dataset_folder
from pipeline.executors.ray.shards import scratch_root
from pipeline.storage.object_store import parse_dataset_path
from tests.chat.server import Act, ChatServer, running_chat, task_name, uuid_of
from tests.commands import require_success, run_process, run_synth
from tests.hostile import LONG
from tests.hub import datasets
from tests.s3 import running_s3
from tests.whole.conftest import SYNTH, Run, descendants, is_alive, read_failure, wait_until

PHOTOS = pa.schema([("photo", datasets.IMAGE), ("caption", pa.string())])
THINGS = ("ring", "star", "cross", "disk", "arrow")


def scripted_replies(seconds: float = 0.0) -> Callable[[int, dict[str, Any]], Act]:
    """Return a script whose replies depend on the image. Some replies are invalid JSON."""

    def script(times: int, body: dict[str, Any]) -> Act:
        draws = hashlib.sha256(uuid_of(body).encode()).digest()
        thing, color = THINGS[draws[0] % 5], ("red", "blue")[draws[1] % 2]
        task = task_name(body)
        if task == "answer":
            is_boolean = "Is there" in json.dumps(body["messages"])
            text = json.dumps({"answer": "yes" if is_boolean else str(draws[4] % 3)})
        elif task == "boxes":
            boxes = [[0, 0, 28 + draws[5] % 28, 40], [5, 5, 9000, 9]][: draws[6] % 3]
            text = json.dumps({"boxes": [{"bbox_2d": box, "label": thing} for box in boxes]})
        elif task == "count":
            text = json.dumps({"many": json.dumps(body["messages"]).count("bbox_2d"), "sure": None})
        elif task == "caption":
            text = json.dumps({"caption": f"A small {color} {thing} lies in the middle of a white sheet."})
        else:
            question, answer = "How many things are seen?", str(draws[2] % 3)
            boolean = {"answer_type": "yes/no", "question": f"Is there a {thing} here?", "answer": "yes"}
            number = {"answer_type": "number", "question": question, "answer": answer}
            text = json.dumps({"qa": [boolean, number]})
        return Act(text="no JSON" if draws[3] < 16 else text, seconds=seconds)

    return script


@pytest.fixture
def synth(tmp_path: Path) -> Run:
    """Run `synth ARGUMENTS` in a new process, because Ray leaves threads."""
    return partial(run_process, cwd=tmp_path)


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    with running_chat(ChatServer(scripted_replies())) as server:
        yield server


@dataclass(frozen=True)
class KilledRun:
    """Versions of the same photos: `one` from one process, `many` from a cluster with killed processes."""

    folder: Path
    chat: ChatServer
    undisturbed: Counter[str]  # requests for `one`
    # `many` was reviewed before its run was complete.
    review: "subprocess.CompletedProcess[str]"


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilledRun]:
    """Make the versions from photos that include copies and damaged images."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos").mkdir()
    for first, split in ((0, "train"), (20, "test"), (40, "validation")):
        rows = []
        for n in range(first, first + 24):  # the last four images are also in the next file
            image = {"bytes": b"broken", "path": None} if n % 11 == 10 else datasets.cell(n)
            rows.append({"photo": image, "caption": f"Thing {n} of {split}."})
        (folder / "photos" / f"{split}.parquet").write_bytes(datasets.parquet(rows, PHOTOS, rows_a_group=5))
    boxes = "{name: boxes, kind: boxes, prompt: 'Where are the things of {{ row.caption }}'}"
    (folder / "boxes.yaml").write_text(boxes)
    output = "{type: object, required: [many], properties: {many: {type: integer}, sure: {type: boolean}}}"
    asks = f"needs: [boxes], show_image: false, output: {output}, prompt: '{{{{ results.boxes }}}}'"
    (folder / "count.yaml").write_text(f"{{name: count, kind: record, {asks}}}")
    with running_chat(ChatServer(scripted_replies())) as chat:
        require_success(run_synth(*flags_of(chat), "--out", "one", cwd=folder))
        undisturbed = Counter(chat.times)
        chat.times.clear()
        kill_worker_and_driver(folder, chat)
        good = Review(sample_id="0" * 64, content="0" * 16, verdict="good")
        (folder / "m.jsonl").write_text(format_lines([good]))
        review = run_synth("review", "apply", "many", "m.jsonl", cwd=folder)
        require_success(run_process(*flags_of(chat), "--out", "many", "--executor", "ray", cwd=folder))
        yield KilledRun(folder, chat, undisturbed, review)


def kill_worker_and_driver(folder: Path, chat: ChatServer) -> None:
    """Start the run for `many`. Kill one of two workers, then the driver, while requests are in flight."""
    chat.script = scripted_replies(1.0)
    driver = start_on_cluster(folder, *flags_of(chat), "--out", "many", "--shards", "3")
    wait_until(lambda: sum(chat.times.values()) > 40, "40 requests")
    wait_until(lambda: len(descendants(driver.pid, "ray::_Worker")) == 2, "two workers")
    os.kill(descendants(driver.pid, "ray::_Worker")[0], signal.SIGKILL)
    last = sum(chat.times.values()) + 40
    quick, held = scripted_replies(1.0), scripted_replies(20.0)  # later requests stay in flight
    chat.script = lambda times, body: (quick if sum(chat.times.values()) <= last else held)(times, body)
    wait_until(lambda: sum(chat.times.values()) > last, "40 more requests")
    alive = descendants(driver.pid, "ray::_Worker")
    assert driver.poll() is None
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    chat.script = scripted_replies()
    wait_until(lambda: not any(map(is_alive, alive)), "the workers are gone")  # workers end with the driver


def flags_of(chat: ChatServer) -> tuple[str, ...]:
    """Return the arguments of `synth` that the runs for `one` and `many` share."""
    columns = ("--columns", "image=photo,context=caption")
    source = ("--source", "parquet:photos", *columns, "--exclude", "parquet:photos#validation")
    tasks = ("--tasks", "caption,qa", "--task", "boxes.yaml", "--task", "count.yaml")
    return ("generate", *source, *tasks, "--verify", "round_trip,blind", "--base-url", chat.url)


def write_review(folder: Path) -> None:
    """Write a review of the first text of `one` to `reviews.jsonl`."""
    rows = pq.read_table(folder / "one" / "steps" / "split" / "kept.parquet").to_pylist()
    sample_id, content = text_name(rows[0])
    review = Review(sample_id=sample_id, content=content, verdict="bad", reason="unclear")
    (folder / "reviews.jsonl").write_text(format_lines([review]))


def latest_version(folder: Path) -> Version:
    return DatasetDir(folder).version()


def rows_of(version: Version) -> dict[str, Any]:
    batches = version.batches(version.manifest["columns"])
    return {row["sample_id"]: row for _, batch in batches for row in batch.to_pylist()}


def test_cluster_makes_same_version_report_and_review_as_one_machine(killed_run: KilledRun) -> None:
    folder, chat = killed_run.folder, killed_run.chat
    local, distributed = latest_version(folder / "one"), latest_version(folder / "many")
    assert distributed.manifest["digest"] == local.manifest["digest"]
    assert rows_of(distributed) == rows_of(local)
    assert {len(row["boxes"]) for row in rows_of(local).values()} == {0, 1}
    assert {row["count"]["many"] for row in rows_of(local).values() if row["count"]} >= {1, 2}
    pairs = [pair for row in rows_of(local).values() for pair in row["qa"]]
    assert pairs and all(isinstance(pair["answered_blind"], bool) for pair in pairs)
    for name in local.manifest.keys() - {"files", "rejections"}:
        assert distributed.manifest[name] == local.manifest[name], name
    tables = [pq.read_table(version.path / "about/rejections.parquet") for version in (local, distributed)]
    rejections = [sorted(map(str, table.to_pylist())) for table in tables]
    assert rejections[0] == rejections[1]
    reasons = {reason for step in distributed.manifest["funnel"] for reason in step["rejected"]}
    assert {"banned_image", "duplicate_image", "unreadable_image"} <= reasons, reasons
    for step in distributed.manifest["funnel"]:
        assert step["input"] == step["kept"] + sum(step["rejected"].values())
    parts, before, flags = [], len(chat.bodies), flags_of(chat)
    write_review(folder)
    for out in ("one", "many"):
        assert run_synth("report", out, cwd=folder).returncode == 0
        page = (folder / out / "report.html").read_text()
        figures = r'<span class="bad">\d+</span> \w+|"step":"\w+"'
        parts.append(sorted(re.findall(figures, page)))
        assert "belong to another run" not in page
        done = run_synth("review", "apply", out, "reviews.jsonl", cwd=folder)
        assert "review: 1 reviews applied" in done.stderr, done.stderr
    assert parts[0] == parts[1]
    reviewed = [latest_version(folder / out).manifest for out in ("one", "many")]
    assert reviewed[0]["digest"] == reviewed[1]["digest"] != local.manifest["digest"]
    assert reviewed[1]["review"] == {"good": 0, "bad": 1, "edited": 0}
    # Each executor uses the replies that the other has journaled.
    on_cluster = ("--out", "one", "--executor", "ray", "--shards", "2")
    if LONG:
        assert "nothing new: v1.0.1" in run_process(*flags, *on_cluster, cwd=folder).stderr
    assert "nothing new: v1.0.1" in run_synth(*flags, "--out", "many", cwd=folder).stderr
    assert len(chat.bodies) == before
    refused = run_synth(*flags, "--out", "many", "--executor", "ray", "--shards", "5", cwd=folder)
    assert "has 3 shards, not 5" in read_failure(refused)[0]


def start_on_cluster(folder: Path, *command: str) -> "subprocess.Popen[bytes]":
    with (folder / "many.log").open("ab") as log:
        cluster = ("--executor", "ray", "--workers", "2")
        return subprocess.Popen([str(SYNTH), *command, *cluster], cwd=folder, stdout=log, stderr=log)


def count_journaled(home: Path) -> tuple[int, int]:
    """Return the numbers of sent requests and of distinct replies, over all shards."""
    sent, replies = 0, set[tuple[str, int]]()
    for path in home.glob("shards/*/journal/local.sqlite"):
        with sqlite3.connect(path) as db:
            sent += db.execute("SELECT COALESCE(SUM(times), 0) FROM asked").fetchone()[0]
            replies |= set(db.execute("SELECT request_id, attempt FROM replies"))
    return sent, len(replies)


def test_killed_cluster_run_resumes_with_same_command(killed_run: KilledRun) -> None:
    assert "many has no finished run to review" in read_failure(killed_run.review)[0]
    times, undisturbed = killed_run.chat.times, killed_run.undisturbed
    assert times.keys() == undisturbed.keys()
    repeated = sum((times - undisturbed).values())
    # Each of the three killed workers had at most 64 requests in flight.
    assert 0 < repeated <= 3 * 64
    sent, replies = count_journaled(killed_run.folder / "many")
    assert replies == sum(undisturbed.values())
    assert repeated <= sent - replies <= 3 * 64  # some requests were recorded, but not sent


@pytest.mark.skipif(not LONG, reason="two clusters of two nodes take three minutes: make test-long")
def test_nodes_without_shared_files_use_object_store(
    synth: Run, chat: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shard_of(key: str) -> int:  # a key begins with the sample id
        return int(key[:8], 16) * 3 >> 32

    home = f"s3://sets/{uuid4().hex}"
    flags = ("generate", "--source", "scenes", "--limit", "90", "--base-url", chat.url)
    assert synth(*flags, "--out", "one").returncode == 0
    undisturbed = Counter(chat.times)
    chat.times.clear()
    slow, quick = scripted_replies(45.0), scripted_replies(0.5)
    chat.script = lambda times, body: (slow if shard_of(uuid_of(body)) == 2 else quick)(times, body)
    with running_s3("sets") as keys:
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        driver = start_on_cluster(tmp_path, *flags, "--out", home, "--shards", "3")
        shards = parse_dataset_path(home) / "shards"
        wait_until(lambda: len([*shards.glob("*/filled.json")]) == 2, "two shards")
        wait_until(lambda: 2 in map(shard_of, chat.times), "the third shard")
        workers = descendants(driver.pid, "ray::_Worker")
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        wait_until(lambda: not any(map(is_alive, workers)), "the workers are gone")
        chat.script = scripted_replies()
        filled = {int(path.parent.name) for path in shards.glob("*/filled.json")}
        shutil.rmtree(scratch_root(parse_dataset_path(home)))  # as if the node were lost
        stray = parse_dataset_path(home) / "versions" / "v1.0.0" / "train-00009.parquet"
        stray.write_bytes(b"by a command that was killed before there was a manifest")
        done = require_success(synth(*flags, "--out", home, "--executor", "ray"))
        assert f"another command may be writing to {home}" in done.stderr
        assert not stray.exists()
        assert filled == {0, 1}
        assert done.stdout.strip() == f"{home}/versions/v1.0.0"
        assert chat.times.keys() == undisturbed.keys()
        repeated = (chat.times - undisturbed).keys()
        assert not set(map(shard_of, repeated)) & filled
        files = [path for path in scratch_root(parse_dataset_path(home)).rglob("*") if path.is_file()]
        assert {path.name for path in files} == {".lock"}  # the scratch folder of the node
        assert "nothing new: v1.0.0" in synth(*flags, "--out", home, "--executor", "ray").stderr
        assert len(list(shards.glob("*/journal/*.sqlite"))) == 3

        # Commands read a dataset in an object store like any other.
        assert synth("report", home).stdout.strip() == f"{dataset_folder(home)}/report.html"
        fetched, local = latest_version(tmp_path / dataset_folder(home)), latest_version(tmp_path / "one")
        assert fetched.manifest["digest"] == local.manifest["digest"] and rows_of(fetched) == rows_of(local)
        write_review(tmp_path)
        for out in ("one", home):
            done = require_success(synth("review", "apply", out, "reviews.jsonl", "--json"))
        assert json.loads(done.stdout)["digest"] == latest_version(tmp_path / "one").manifest["digest"]
        error, _ = read_failure(synth(*flags, "--out", "s3://none/mine", "--executor", "ray"))
        assert "s3://none/mine: The specified bucket does not exist" in error
    assert synth(*flags, "--out", home).returncode == 1  # the local executor writes to a disk only


def test_unreachable_cluster_is_an_error(chat: ChatServer, tmp_path: Path) -> None:
    command = ("generate", "--source", "scenes", "--limit", "4", "--base-url", chat.url, "--executor", "ray")
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:9"}
    error, hint = read_failure(run_synth(*command, "--out", "d", cwd=tmp_path, env=environment))
    assert "no Ray cluster at 127.0.0.1:9" in error and "ray start" in hint
    assert not chat.bodies
    local = ("--executor", "local", "--shards", "3")
    assert run_synth(*command, *local, cwd=tmp_path).returncode == 2
