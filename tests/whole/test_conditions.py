"""Conditions of tasks and checks, from the settings of docs/conditions.md to a version with its price."""

import hashlib
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.chat.server import Act, ChatServer, running_chat, task_name, task_of, uuid_of
from tests.commands import require_success, run_synth
from tests.whole.conftest import ROOT, load_rows

PAGE = (ROOT / "docs/conditions.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(console|yaml)\n(.*?)```", PAGE, re.DOTALL)
KINDS = ["photo"] * 5 + ["document"] * 4 + ["blank"] * 10 + ["small"] * 2


class Model:
    """A model that classifies an image by its place in KINDS."""

    def __init__(self, kinds: dict[str, str]) -> None:
        self.kinds = kinds  # by image
        self.requests: Counter[str] = Counter()

    def __call__(self, times: int, body: dict[str, Any]) -> Act | None:
        task, image = task_name(body), uuid_of(body)
        self.requests[task] += 1
        if task == "kind":
            kind = self.kinds[image]
            return Act(json.dumps({"kind": "photo" if kind == "small" else kind}))
        if task == "reading":
            return Act(f"Invoice {image[:6]}")
        if task == "caption":
            ending = "in the rain" if task_of(body).endswith("detailed") else "at night"
            return Act(f"A lamp stands on a desk beside a stack of books {ending}, with number {image[:8]}.")
        return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number, kind in enumerate(KINDS):
        size = (96, 96) if kind == "small" else (320, 240)
        Image.effect_noise(size, 40 + number).convert("RGB").save(tmp_path / f"photos/{number:02}.png")
    for kind, text in BLOCKS:
        if kind == "yaml":
            name, _, content = text.removeprefix("# ").partition("\n")
            (tmp_path / name).write_text(content)
    return tmp_path


def test_documented_example_sends_only_requests_that_its_conditions_allow(folder: Path) -> None:
    files = sorted((folder / "photos").iterdir())
    model = Model({hashlib.sha256(path.read_bytes()).hexdigest(): KINDS[n] for n, path in enumerate(files)})
    with running_chat(ChatServer(model)) as chat:
        settings = folder / "synth.yaml"
        settings.write_text(settings.read_text().replace("http://localhost:8000/v1", chat.url))
        commands = [line[2:] for kind, text in BLOCKS if kind == "console" for line in text.splitlines()]
        assert [command.split()[1] for command in commands] == ["preview", "generate", "report"]
        for command in commands:
            done = require_success(run_synth(*shlex.split(command)[1:], cwd=folder))
            if "generate" in command:
                lines = done.stderr
        counts = {name: model.requests[name] for name in ("kind", "caption", "qa", "reading")}
        assert counts == {"kind": 21, "caption": 7 + 4 + 5, "qa": 7, "reading": 4}
        (folder / "kind.yaml").write_text((folder / "kind.yaml").read_text().replace('"blank"', '"blnk"'))
        refused = run_synth("generate", "--config", "synth.yaml", cwd=folder)
        assert "`keep_if` of the task kind, character 17: 'blnk' is not a possible value" in refused.stderr
        assert "did you mean blank?" in refused.stderr and model.requests["kind"] == 21
    (dataset,) = (folder / "data").iterdir()
    rows = load_rows(dataset)
    assert len(rows) == 11 and {row["kind"] for row in rows} == {"photo", "document"}
    for row in rows:
        styles = {caption["style"] for caption in row["captions"]}
        is_photo = row["kind"] == "photo"
        assert styles == {"plain"} | ({"detailed"} if is_photo and row["width_px"] >= 256 else set())
        assert bool(row["reading"]) == (not is_photo)
    (path,) = dataset.glob("versions/*/manifest.json")
    manifest = json.loads(path.read_text())
    funnel = {step["step"]: step for step in manifest["funnel"]}
    assert funnel["validate"]["rejected"] == {"dropped_by_kind": 50, "condition_false": 4 + 4 + 2 + 7}
    assert funnel["write"]["rejected"] == {"dropped_by_kind": 10}
    assert manifest["skipped_checks"] == {"claims": {"condition_false": 11}}
    check_price(manifest, lines)
    card, page = ((path.parent / "README.md").read_text(), (dataset / "report.html").read_text())
    assert "claims: skipped for 11 texts" in card and "skipped for 11 texts" in page
    assert "tokens, cost" in card and "s per kept text" in page and "s per kept text" not in card
    assert "dropped by kind" in page


def check_price(manifest: dict[str, Any], lines: str) -> None:
    price = {entry["texts"]: entry for entry in manifest["price"]}
    assert price.keys() == {"captions", "questions", "kind", "reading", ""}
    kind = price["kind"]
    assert (kind["requests"], kind["kept"]) == (21, 11)
    assert (kind["prompt_tokens"], kind["reply_tokens"]) == (21 * 40, 21 * 12)
    assert kind["cost"] == pytest.approx(21 * (40 * 0.2 + 12 * 0.6) / 1e6)
    per_text = 21 * 52 / 11
    assert f"price of kind: {per_text:,.0f} tokens, cost 0.000029 per kept text (11 kept)" in lines
    assert "price of all texts with their checks: " in lines and "per correct text: not measured" in lines
