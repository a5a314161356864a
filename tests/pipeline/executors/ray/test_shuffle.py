"""Shuffle: every row arrives once, in the shard of its key."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from pipeline.executors.ray.shards import Indices, Shuffle

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.int64())])


def rows(*numbers: int) -> pa.Table:
    return pa.table({"key": [f"k{n % 7}" for n in numbers], "value": numbers}, schema=SCHEMA)


def by_key(shuffle: Shuffle) -> Callable[[pa.Table], Indices]:
    return lambda table: shuffle.by_hash(table["key"].to_pylist())


def read_shard(shuffle: Shuffle, shard: int, readers: int) -> pa.Table:
    return pa.Table.from_batches(list(shuffle.read(shard, readers)))


def test_each_row_arrives_once_in_the_shard_of_its_key(tmp_path: Path) -> None:
    shuffle = Shuffle(tmp_path, 4)
    for reader in range(3):
        start = 100 * reader
        tables = [rows(*range(start, start + 50)), rows(), rows(*range(start + 50, start + 60))]
        shuffle.write(reader, tables, by_key(shuffle))
    shard_tables = [read_shard(shuffle, shard, 3) for shard in range(4)]
    values = sorted(n for table in shard_tables for n in table["value"].to_pylist())
    assert values == [start + n for start in (0, 100, 200) for n in range(60)]
    keys = [set(table["key"].to_pylist()) for table in shard_tables]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 7
    for table in shard_tables:
        assert table["value"].to_pylist() == sorted(table["value"].to_pylist())
