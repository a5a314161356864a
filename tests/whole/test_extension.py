"""Extension: a contributor adds a row step with one file and its place in the order of steps."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tests.chat.server import Act, ChatServer, running_chat, task_of
from tests.commands import run_python
from tests.whole.conftest import ROOT, read_manifest

STEP = '''"""Step: quiet. Reject captions in capitals."""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.steps.base import RowStep


def judge_capitals(table: pa.Table, _: None) -> pa.Table:
    """Append `reason` to captions in capitals."""
    is_loud = pc.fill_null(pc.utf8_is_upper(table["clean_text"]), False)
    return table.append_column("reason", pc.if_else(is_loud, "in_capitals", None))


STEP = RowStep("quiet", judge=judge_capitals)
'''
RUN_CHANGES = (
    ("import ask, balance, dedupe, read,", "import ask, balance, dedupe, quiet, read,"),
    ("    verify.STEP,", "    quiet.STEP,\n    verify.STEP,"),
)


def reply(_: int, body: dict[str, Any]) -> Act:
    is_brief = task_of(body) == "Task: caption, brief"
    text = "TWO STRIPES AND NO MORE" if is_brief else f"A field of gray, number {len(str(body)) % 97}."
    return Act(json.dumps({"caption": text}))


def test_added_step_needs_one_new_file_and_its_place_in_the_order(tmp_path: Path) -> None:
    package = tmp_path / "package"
    for name in ("pipeline", "prompts", "data_cards"):
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, package / name, copy_function=os.symlink, ignore=without)
    (package / "pipeline/steps/quiet.py").write_text(STEP)
    run = package / "pipeline/run.py"
    text = run.read_text()
    for old, new in RUN_CHANGES:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    run.unlink()
    run.write_text(text)
    with running_chat(ChatServer(reply)) as chat:
        command = ("-m", "pipeline", "generate", "--source", "scenes", "--limit", "20", "--out", "data")
        options, env = ("--tasks", "caption", "--base-url", chat.url), {"PYTHONPATH": str(package)}
        run_python(*command, *options, cwd=tmp_path, env=os.environ | env)
    funnel = {step["step"]: step for step in read_manifest(tmp_path / "data")["funnel"]}
    steps = ["validate", "filter", "quiet", "verify", "dedupe", "balance", "split", "review"]
    assert list(funnel) == ["read", "ask", *steps, "write"]
    assert funnel["quiet"]["rejected"] == {"in_capitals": 20}
