"""Text files: bombs, depth and slow patterns end in one error, in bounded memory and time."""

import gzip
import json
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import SourceError
from pipeline.sources.texts import parse_list, read_captions
from pipeline.types import Source
from tests.pipeline.sources.reading import open_folder, open_path, rejected_of, samples_of


def bombs() -> dict[str, bytes]:
    """Return files of captions by name, each below 300 kB."""
    header = ",".join(["file_name", *map(str, range(20_000))]).encode()
    return {
        "lists.json.gz": gzip.compress(b"[" + b"[]," * 21_000_000 + b"[]]"),
        "objects.json.gz": gzip.compress(b'{"images":[' + b"{}," * 21_000_000 + b"{}]}"),
        "lines.jsonl.gz": gzip.compress(b"[]\n" * 21_000_000),
        "rows.csv.gz": gzip.compress(b"file_name,caption\n" + b"a,b\n" * 11_000_000),
        "wide.csv.gz": gzip.compress(header + b"\na" * 1_000),
        "deep.json": b'{"a.jpg":' + b"[" * 100_000,
    }


READ = """
import os, sys
from pathlib import Path
from pipeline.sources.texts import read_captions
from tests.hostile import limit_more_memory
for path in sys.argv[1:]:
    if not os.fork():
        limit_more_memory(2_000_000_000)  # as with a limit of a container
        try:
            read_captions(Path(path))
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, path
"""


def test_caption_file_bomb_gives_one_error_that_names_the_file(tmp_path: Path) -> None:
    files = bombs()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert len(data) < 300_000
    command = [sys.executable, "-c", READ, *(str(tmp_path / name) for name in files)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    for name, line in zip(files, result.stdout.splitlines(), strict=True):
        assert line.startswith(f"SourceError cannot read {tmp_path / name}: it"), line


def deep(levels: int) -> str:
    return json.dumps({"file_name": "a.png", "caption": None}).replace("null", "[" * levels + "]" * levels)


def folder_of(text: str, path: Path) -> Source:
    (path / "metadata.jsonl").write_text(text)
    return open_folder(path)


def archive_of(text: str, path: Path) -> Source:
    (path / "a.json").write_text(text)
    return open_path("archive", pack(path, "a.png", "a.json"))


def pack(folder: Path, *names: str) -> Path:
    """Write files of a folder to `a.tar`, and return its path."""
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name in names:
            archive.add(folder / name, name)
    return folder / "a.tar"


def captions_of(text: str, path: Path) -> Source:
    (path / "c.jsonl").write_text(text + '\n{"file_name": "a.png", "caption": "A wall."}')
    return open_folder(path, captions=[path / "c.jsonl"])


@pytest.mark.parametrize("levels", [300, 600, 900, 20_000])
@pytest.mark.parametrize("source_of", [folder_of, archive_of, captions_of])
def test_deeply_nested_caption_is_read_or_ignored_or_gives_one_error(
    source_of: Callable[[str, Path], Source], levels: int, tmp_path: Path
) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    try:
        (sample,) = samples_of(source_of(deep(levels), tmp_path))
        assert sample.references in ((), ("A wall.",))
    except SourceError as error:
        assert levels > 600 and "nested too deeply" in str(error)


@pytest.mark.parametrize(
    "part",
    ["'a', ", "'a' ", "'\\", "'", "\"'", "[", " ", "{'a': '", "1, "],
    ids=lambda part: part.replace(" ", "_"),
)
def test_list_in_a_long_cell_is_parsed_in_bounded_time_and_memory(part: str) -> None:
    text = "['a'" + part * (2_000_000 // len(part)) + "x]"
    tracemalloc.start()
    began = time.process_time()
    try:
        parse_list(text)
        parse_list(text[:90_000] + "]")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 5


def test_captions_that_are_not_utf8_are_reported_and_not_used(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("Schöne Grüße".encode("latin-1"))
    source = open_folder(tmp_path)
    assert f"text files that cannot be read: 1 ({tmp_path}/a.txt is not UTF-8)" in source.messages
    (sample,) = samples_of(source)
    assert sample.references == ()
    opened = open_path("archive", pack(tmp_path, "a.png", "a.txt"))
    assert [(row.source_row, row.reason) for row in rejected_of(opened)] == [
        ("a.tar/a.txt", "unreadable_text")
    ]
    (sample,) = samples_of(opened)
    assert sample.references == ()
    (tmp_path / "c.csv").write_bytes("file_name,caption\na.jpg,Grüße\n".encode("latin-1"))
    with pytest.raises(SourceError, match="codec"):
        read_captions(tmp_path / "c.csv")
