"""Audits in Label Studio 1.23 and Argilla 2.8. The exports were written by these tools, and shortened."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.review_tools import audit_files
from pipeline.dataset.reviews import Verdict, read_lines
from pipeline.errors import ConfigError

SAMPLE, CONTENT = "a" * 64, "b" * 16
NAME = f"7-{SAMPLE}-{CONTENT}"
IMAGE = "data:image/webp;base64,UklGRhoBAABXRUJQ"
TEXT = {"content": CONTENT, "kind": "plain", "text": "A <b>red</b> ring."}
ITEM = {"id": SAMPLE, "images": [IMAGE, IMAGE], "text": TEXT, "repeat": False}
CHOICES = {"from_name": "verdict", "to_name": "text", "type": "choices", "origin": "manual"}
LABELS = {"from_name": "words", "to_name": "text", "type": "labels"}  # of another interface


def label_studio_export() -> list[dict[str, Any]]:
    words = {"start": 2, "end": 5, "text": "red", "labels": ["wrong words"]}
    error = CHOICES | {"from_name": "error", "value": {"choices": ["color"]}}
    wrong = [CHOICES | {"value": {"choices": ["wrong"]}}, error, LABELS | {"value": words}]
    skipped: dict[str, Any] = {"completed_by": 3, "result": wrong, "was_cancelled": True}
    annotations = [{"completed_by": 1, "result": wrong, "was_cancelled": False}, skipped]
    return [{"id": 1, "data": {"id": NAME, "text": "A red ring."}, "annotations": annotations}]


def argilla_export() -> list[dict[str, Any]]:
    user, other = (f"00000000-0000-0000-0000-00000000000{n}" for n in (1, 2))
    verdicts = [{"value": "wrong", "user_id": user}, {"value": "right", "user_id": other}]
    responses = {"verdict": verdicts, "error": [{"value": "color", "user_id": user}]}
    return [{"id": NAME, "fields": {"text": "A red ring."}, "responses": responses, "status": "pending"}]


@pytest.mark.parametrize(
    ("exported", "expected"),
    [
        (label_studio_export(), [("Label Studio user 1", "wrong", "color")]),
        (
            argilla_export(),
            [
                ("Argilla user 00000000-0000-0000-0000-000000000001", "wrong", "color"),
                ("Argilla user 00000000-0000-0000-0000-000000000002", "right", "other"),
            ],
        ),
    ],
)
def test_verdicts_are_read_from_exports_of_other_tools(
    tmp_path: Path, exported: list[dict[str, Any]], expected: list[tuple[str, str, str]]
) -> None:
    (tmp_path / "export.json").write_text(json.dumps(exported))
    verdicts = read_lines(tmp_path / "export.json")
    assert {(verdict.name, verdict.seed) for verdict in verdicts if isinstance(verdict, Verdict)} == {
        ((SAMPLE, CONTENT), 7)
    }
    assert [(v.reviewer, v.verdict, v.error) for v in verdicts if isinstance(v, Verdict)] == expected


def test_second_verdict_on_a_repeated_task_is_kept(tmp_path: Path) -> None:
    files = audit_files("label-studio", [ITEM, ITEM | {"repeat": True}], 7, "Title")
    tasks = json.loads(files["tasks.json"])
    assert [task["data"]["id"] for task in tasks] == [NAME, f"{NAME}-repeat"]
    result = [CHOICES | {"value": {"choices": ["right"]}}]
    exported = [task | {"annotations": [{"completed_by": 1, "result": result}]} for task in tasks]
    (tmp_path / "export.json").write_text(json.dumps(exported))
    assert [v.repeat for v in read_lines(tmp_path / "export.json") if isinstance(v, Verdict)] == [False, True]


def test_label_studio_task_has_text_and_images() -> None:
    tasks = json.loads(audit_files("label-studio", [ITEM], 7, "Title")["tasks.json"])
    values = {"id": NAME, "text": "A <b>red</b> ring.", "kind": "plain"}
    assert tasks == [{"data": values | {"images": [IMAGE, IMAGE]}}]


def test_argilla_record_has_a_field_for_each_page_and_the_kind_as_metadata() -> None:
    files = {name: json.loads(text) for name, text in audit_files("argilla", [ITEM], 7, "My data v1").items()}
    fields = {"text": "A <b>red</b> ring.", "page_1": IMAGE, "page_2": IMAGE}
    record = {"id": NAME, "fields": fields, "metadata": {"kind": "plain"}}
    assert files["records.json"] == [record]
    settings = files[".argilla/settings.json"]
    assert [field["name"] for field in settings["fields"]] == [*fields]
    assert files[".argilla/dataset.json"] == {"name": "my-data-v1"}
    names = audit_files("argilla", [ITEM], 7, "- Фото: Straße_1 v1.0.0")
    assert json.loads(names[".argilla/dataset.json"]) == {"name": "stra-e_1-v1-0-0"}


def test_broken_export_error_names_the_tools(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text('[{"id": 1}]')
    with pytest.raises(ConfigError, match="not exported by Label Studio or Argilla") as caught:
        read_lines(tmp_path / "export.json")
    assert "Label Studio or Argilla" in (caught.value.hint or "")
