"""Hops of rows: everything that is sent arrives, at the one place that its key says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import prompts
from pipeline.cluster.exchange import Exchange
from pipeline.cluster.fill import Filler
from pipeline.cluster.job import DEATHS, Job, Told, do, named_files
from pipeline.cluster.run import begin
from pipeline.config import resolve
from pipeline.errors import ClusterError, TableError
from pipeline.fingerprint import digest
from pipeline.generate.prompt import template
from pipeline.objects import place

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.int64())])


def rows(*numbers: int) -> pa.Table:
    return pa.table({"key": [f"k{n % 7}" for n in numbers], "value": numbers}, schema=SCHEMA)


def job(folder: Path, shards: int) -> Job:
    config = resolve(source="scenes")
    return Job(config, folder, folder, shards, 1, "embedded", "s", "r", digest(named_files(config)), "inputs")


def test_each_row_arrives_once_and_equal_keys_at_one_place(tmp_path: Path) -> None:
    hop = Exchange(tmp_path, 4)
    for sender in range(3):
        tables = [rows(*range(100 * sender, 100 * sender + 50)), rows(), rows(*range(100 * sender + 50, 100 * sender + 60))]
        hop.send(sender, tables, hop.by("key"))
    found = [hop.receive(receiver, 3) for receiver in range(4)]
    assert sorted(n for table in found for n in table["value"].to_pylist()) == [s + n for s in (0, 100, 200) for n in range(60)]
    keys = [set(table["key"].to_pylist()) for table in found]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 7
    for table in found:
        assert table["value"].to_pylist() == sorted(table["value"].to_pylist())  # in the order in which they were sent


def test_a_receiver_that_was_sent_nothing_gets_a_table_without_rows(tmp_path: Path) -> None:
    hop = Exchange(tmp_path, 3)
    hop.send(0, [rows(1)], lambda table: np.array([2]))
    assert hop.receive(0, 1).num_rows == 0
    assert hop.receive(0, 1).schema.equals(SCHEMA)
    assert hop.receive(2, 1)["value"].to_pylist() == [1]


def test_a_hop_that_is_sent_again_is_the_same_and_one_that_was_cut_short_is_not_there(tmp_path: Path) -> None:
    hop = Exchange(tmp_path, 3)
    hop.send(0, [rows(1, 2)], hop.by("key"))
    before = hop.file(0).stat().st_ino
    hop.send(0, [rows(1, 2)], hop.by("key"))
    assert hop.file(0).stat().st_ino == before

    def cut_short(table: pa.Table) -> np.ndarray:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        hop.send(1, [rows(1)], cut_short)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.arrow"]


def test_a_key_that_is_no_column_is_named(tmp_path: Path) -> None:
    hop = Exchange(tmp_path, 3)
    with pytest.raises(TableError, match="missing column"):
        hop.send(0, [rows(1)], hop.by("colour"))


@pytest.mark.parametrize("shards", [1, 3, 16, 1000])
def test_shards_are_of_one_size_and_in_the_order_of_their_ids(tmp_path: Path, shards: int) -> None:
    ids = sorted(digest([n]) for n in range(5000))
    ids = ["0" * 64, *ids, "f" * 64]
    numbers = job(tmp_path, shards).shard_of(ids)
    assert (np.diff(numbers) >= 0).all()
    assert numbers[0] == 0 and numbers[-1] == shards - 1
    assert np.bincount(numbers, minlength=shards).max() < 3 * max(5, 5000 / shards)
    filler = Filler(job(tmp_path, shards))
    for sample_id, number in zip(ids[::50], numbers[::50].tolist(), strict=True):
        first, behind = filler.range_of(number)
        assert first <= sample_id < behind


def test_a_worker_that_cannot_see_the_folder_of_the_command_says_so(tmp_path: Path) -> None:
    lost = Job(resolve(source="scenes"), tmp_path, tmp_path / "elsewhere", 1, 1, "embedded", "s", "r", "files", "inputs")
    with pytest.raises(ClusterError, match=r"a worker cannot see .*elsewhere"):
        lost.enter()


def test_nodes_that_share_no_files_still_need_those_that_the_settings_name(tmp_path: Path) -> None:
    away = tmp_path / "elsewhere"
    config = resolve(source="scenes", generate={"prompts": tmp_path / "prompts"}, balance={"entries": tmp_path / "entries.txt"})
    (tmp_path / "entries.txt").write_text("dog\n")
    home = place("memory://b")
    seen = Job(config, home, away, 1, 1, "embedded", "s", "r", digest(named_files(config)), "inputs")
    seen.enter()
    seen.enter()
    (tmp_path / "entries.txt").write_text("dog\ncat\n")  # as another node has it
    other = digest(named_files(config))
    assert other != seen.files
    (tmp_path / "entries.txt").write_text("dog\n")
    with pytest.raises(ClusterError, match="a worker sees other files than the command: prompts"):
        replace(seen, files=other).enter()


def test_prompts_of_ones_own_are_among_the_files_that_settings_name(tmp_path: Path) -> None:
    mine = tmp_path / "prompts" / "caption" / "v1.j2"
    mine.parent.mkdir(parents=True)
    config = resolve(source="scenes", generate={"prompts": tmp_path / "prompts"})
    before = named_files(config)
    mine.write_text((Path(prompts.__file__).parent / "caption" / "v1.j2").read_text() + " Mine.")
    template.cache_clear()  # another process
    assert named_files(config)["prompts"] != before["prompts"]


def test_a_step_that_ends_one_worker_after_the_other_is_given_up(tmp_path: Path) -> None:
    here = job(tmp_path, 4)

    def dies(job: Job, number: int) -> Told:
        raise KeyboardInterrupt  # as little as kill -9 is it an error that is told

    for _ in range(DEATHS + 1):
        with pytest.raises(KeyboardInterrupt):
            do(here, dies, 2)
    with pytest.raises(ClusterError, match="dies-2 has ended 4 workers"):
        do(here, dies, 2)
    assert do(here, lambda job, number: {"number": number}, 2) == {"number": 2}  # another task is another matter
    begin(here)  # the same command, once more
    with pytest.raises(KeyboardInterrupt):
        do(here, dies, 2)


def test_a_task_that_got_on_before_its_worker_died_is_begun_again(tmp_path: Path) -> None:
    here = job(tmp_path, 4)
    begun: list[int] = []

    def dies(job: Job, number: int) -> Told:
        begun.append(number)
        raise KeyboardInterrupt

    for _ in range(3 * DEATHS):
        with pytest.raises(KeyboardInterrupt):
            do(here, dies, 2, lambda folder: len(begun))
    assert len(begun) == 3 * DEATHS
