"""Extension: a contributor adds a step and a source in two files each."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.chat.server import Act, ChatServer, running_chat, task_of

ROOT = Path(__file__).parents[2]
STEP = {
    "pipeline/steps/quiet.py": '''
"""Step: quiet. Reject captions in capitals."""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.steps.base import RowStep


def judge_capitals(table: pa.Table, _: None) -> pa.Table:
    """Append `reason` to captions in capitals."""
    is_loud = pc.fill_null(pc.utf8_is_upper(table["clean_text"]), False)
    return table.append_column("reason", pc.if_else(is_loud, "in_capitals", None))


STEP = RowStep("quiet", judge=judge_capitals)
''',
    "pipeline/run.py": [
        ("import ask, balance, dedupe, read,", "import ask, balance, dedupe, quiet, read,"),
        ("    verify.STEP,", "    quiet.STEP,\n    verify.STEP,"),
    ],
}
SOURCE = {
    "pipeline/sources/stripes.py": '''
"""Source: stripes, one image for each pair of gray levels."""

import io

from PIL import Image

from pipeline.config import Config
from pipeline.images.decode import image_id
from pipeline.sources.base import SourceSpec
from pipeline.types import Sample, Source


def open_stripes(config: Config, _: str) -> Source:
    """Return a source of images of 64 x 64 px."""
    limit = config.limit or 100
    return Source(name="stripes", revision="1", read=lambda start: map(draw_stripes, range(start, limit)))


def draw_stripes(number: int) -> Sample:
    """Draw one image."""
    image = Image.new("L", (64, 64), 2 * number)
    for top in range(0, 64, 8):
        image.paste(255 - number, (0, top, 64, top + 4))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = file.getvalue()
    size = {"width_px": 64, "height_px": 64}
    return Sample(id=image_id(data), source_row=str(number), images=(data,), license="cc0-1.0", **size)


SPEC = SourceSpec(
    name="stripes", what="gray stripes", license="cc0-1.0", needs="-", example="--source stripes",
    open=open_stripes, image_kind=None,
)
''',
    "pipeline/sources/__init__.py": [
        ("folder, scenes, tables\n", "folder, scenes, stripes, tables\n"),
        ("    benchmarks.SLIDEVQA,", "    benchmarks.SLIDEVQA,\n    stripes.SPEC,"),
    ],
}  # fmt: skip


def reply(_: int, body: dict[str, Any]) -> Act:
    is_plain = task_of(body) == "Task: caption, plain"
    text = "TWO STRIPES AND NO MORE" if is_plain else f"A field of gray, number {len(str(body)) % 97}."
    return Act(json.dumps({"caption": text}))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a folder with links to all files of the package, which `extend` replaces."""
    for top in ("pipeline", "prompts", "data_cards"):
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                link = tmp_path / "package" / path.relative_to(ROOT)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    return tmp_path / "package"


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    with running_chat(ChatServer(reply)) as server:
        yield server


def extend(package: Path, files: dict[str, Any]) -> None:
    for name, change in files.items():
        path = package / name
        text = change
        if isinstance(change, list):
            text = path.read_text(encoding="utf-8")
            for old, new in change:
                assert text.count(old) == 1, (name, old)
                text = text.replace(old, new)
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.lstrip("\n"), encoding="utf-8")


def test_added_step_and_source_need_two_files_each(package: Path, chat: ChatServer, tmp_path: Path) -> None:
    extend(package, STEP | SOURCE)
    command = [sys.executable, "-m", "pipeline", "generate", "--source", "stripes", "--limit", "20"]
    command += ["--out", "data", "--tasks", "caption", "--base-url", chat.url]
    env = os.environ | {"PYTHONPATH": str(package)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    version = tmp_path / "data" / "versions" / "v1.0.0"
    funnel = {step["step"]: step for step in json.loads((version / "manifest.json").read_text())["funnel"]}
    steps = ["validate", "filter", "quiet", "verify", "dedupe", "balance", "split", "review"]
    assert list(funnel) == ["read", "ask", *steps, "write"]
    assert funnel["quiet"]["rejected"] == {"in_capitals": 20}
    rows = [row for file in version.rglob("t*-*.parquet") for row in pq.read_table(file).to_pylist()]
    assert {row["source"] for row in rows} == {"stripes"}
    assert {len(row["captions"]) for row in rows} == {1}
