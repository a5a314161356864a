"""Checks are asked about some annotations at a time, and come to the same."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import EngineError, TableError
from pipeline.run import generate_dataset
from pipeline.steps import verify
from pipeline.storage.files import read_table
from tests.chat.server import ChatServer, running_chat

CHECKS = ["round_trip", "blind", "claims", "covers", "references", "alignment"]


def checked(folder: Path) -> tuple[list[dict[str, Any]], int, int]:
    """Return the rows of the step verify, how many requests were sent, and how many distinct ones."""
    with running_chat(ChatServer()) as chat, suppress(TableError):  # no row may be left
        generate_dataset(
            resolve(source="scenes", limit=12, base_url=[chat.url], model="model", verify={"checks": CHECKS}), folder
        )
    dataset = DatasetDir(folder)
    rows = [row for which in ("kept", "rejected") for row in read_table(dataset.step_file("verify", which)).to_pylist()]
    return rows, len(chat.bodies), len({str(body) for body in chat.bodies})


def test_checks_of_a_part_of_the_annotations_at_a_time_are_those_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sent, distinct = checked(tmp_path / "whole")
    assert len(whole) == 36 and all(row["checks"] for row in whole if row["question"] is not None)
    held: list[int] = []
    ask = verify.AnnotationChecker.ask_all_checks

    def noted(self: verify.AnnotationChecker, rows: list[dict[str, Any]]) -> Any:
        held.append(len(rows))
        return ask(self, rows)

    monkeypatch.setattr(verify.AnnotationChecker, "ask_all_checks", noted)
    monkeypatch.setattr(verify, "BATCH_ANNOTATIONS", 4)
    monkeypatch.setattr("pipeline.storage.files.BATCH_ROWS", 2)
    parts, sent_in_parts, distinct_in_parts = checked(tmp_path / "parts")
    assert len(held) > 5 and max(held) <= 6 and all(rows % 3 == 0 for rows in held)  # with all rows of their samples
    for one, other in zip(parts, whole, strict=True):  # CLIP rounds with the images that it sees at once
        assert one.pop("alignment") == pytest.approx(other.pop("alignment"), abs=1e-5)
    assert parts == whole
    assert (sent_in_parts, distinct_in_parts) == (sent, distinct)


def test_a_clip_that_cannot_be_had_is_refused_before_a_model_is_asked(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        verify = {"checks": ["alignment"], "clip_model": "nobody/nothing"}
        config = resolve(source="scenes", limit=3, model="model", base_url=[chat.url], verify=verify)
        with pytest.raises(EngineError, match="no CLIP nobody/nothing"):
            generate_dataset(config, tmp_path / "d")
        assert not chat.bodies
