"""Stages that an earlier run has finished are left out, and only those."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import Review, format_reviews, text_name
from pipeline.executors.base import RunResult
from pipeline.inference import journal, requests
from pipeline.run import generate_dataset, stages_of
from pipeline.stages import base as stage_base
from pipeline.stages import finished, generate, version
from pipeline.stages.base import Stage
from pipeline.storage.files import read_table
from pipeline.tasks import prompts
from tests.chat.server import ChatServer, running_chat
from tests.pipeline.sources.test_read import photo

CAPTIONS = (
    "A red bus waits at a stop.",
    "Two dogs run over wet sand.",
    "A red bus waits at a stop.",
    "bad",
    "Boats lie in a harbour.",
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.jpg").write_bytes(photo(number))
        (folder / f"{number}.txt").write_text(CAPTIONS[number % len(CAPTIONS)])
    return folder


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the stages that are judged from now on, and of `version` where rows are written."""
    names: list[str] = []

    def judge(stage: Stage, *arguments: Any, **named: Any) -> None:
        names.append(stage.name)
        stage_base.judge_stage(stage, *arguments, **named)

    def publish(*arguments: Any) -> Any:
        names.append("version")
        return version.publish_shards(*arguments)

    monkeypatch.setattr("pipeline.executors.base.judge_stage", judge)
    monkeypatch.setattr("pipeline.executors.base.publish_shards", publish)
    return names


def settings(photos: Path, **more: Any) -> Config:
    return resolve(**{"source": f"folder:{photos}", "tasks": "none", "human_texts": "keep", **more})


def run(photos: Path, folder: Path, judged: list[str], **more: Any) -> RunResult:
    """Run once, and empty the list of judged stages before it."""
    judged.clear()
    return generate_dataset(settings(photos, **more), folder)


def content(result: RunResult) -> tuple[Any, ...]:
    """Return what a run says of its rows: the same for each run that makes the same version."""
    return result.version.manifest["digest"], result.version.manifest["rows"], result.funnel


def all_stages(photos: Path, **more: Any) -> list[str]:
    return [*(stage.name for stage in stages_of(settings(photos, **more))), "version"]


def test_an_equal_run_judges_nothing_and_says_the_same(photos: Path, tmp_path: Path, judged: list[str]) -> None:
    first = run(photos, tmp_path / "d", judged)
    assert judged == all_stages(photos) and first.is_new
    second = run(photos, tmp_path / "d", judged)
    assert judged == [] and not second.is_new
    assert content(second) == content(first)
    assert {reason for summary in first.funnel for reason in summary.rejected} >= {"too_short"}


def test_a_run_that_was_stopped_between_stages_goes_on_behind_them(
    photos: Path, tmp_path: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: Stage, *arguments: Any) -> None:
        if stage.name == "balance":
            raise KeyboardInterrupt
        stage_base.compare_stage(stage, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.executors.base.compare_stage", stop)
        run(photos, tmp_path / "d", judged)
    resumed = run(photos, tmp_path / "d", judged)
    assert judged == ["balance", "split", "review", "version"]
    assert content(resumed) == content(run(photos, tmp_path / "whole", judged))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


CHANGES: dict[str, tuple[Callable[[DatasetDir], object], str]] = {  # and the first stage that runs again
    "a damaged file of kept rows": (lambda dataset: damage(dataset.stage("filter")), "filter"),
    "a file that is gone": (lambda dataset: dataset.stage("split").unlink(), "split"),
    "a version that was moved away": (
        lambda dataset: (dataset.path / "versions" / "v1.0.0").rename(dataset.path / "elsewhere"), "version"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_as_it_was_is_done_again(name: str, photos: Path, tmp_path: Path, judged: list[str]) -> None:
    first = run(photos, tmp_path / "d", judged)
    change, stage = CHANGES[name]
    change(DatasetDir(tmp_path / "d"))
    again = run(photos, tmp_path / "d", judged)
    assert judged and judged[0] == stage
    assert content(again) == content(first)
    assert run(photos, tmp_path / "d", judged).version.name == "v1.0.0" and judged == []


def ask(photos: Path, folder: Path, server: ChatServer, **more: Any) -> RunResult:
    """Have a model write a caption of each photo."""
    asked: dict[str, Any] = {"tasks": ("caption",), "human_texts": "compare", "base_url": [server.url], "model": "model"}
    return generate_dataset(settings(photos, **asked | more), folder)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list of the folders whose annotations are written from now on."""
    folders: list[Path] = []

    def write(dataset: DatasetDir, plan: Any) -> None:
        folders.append(dataset.path)
        generate.write_annotations(dataset, plan)

    monkeypatch.setattr("pipeline.executors.local.write_annotations", write)
    return folders


def change_reply(dataset: DatasetDir) -> None:
    """Change the text of the first reply, with its checksum."""
    with closing(sqlite3.connect(dataset.journal)) as db, db:
        row = list(db.execute(f"SELECT {journal._COLUMNS} FROM replies ORDER BY request_id").fetchone()[:-1])
        row[6] = '{"caption": "Nobody is on the long, grey beach today."}'
        values = {"id": row[0], "text": row[6], "checksum": journal._checksum(row)}
        db.execute("UPDATE replies SET text = :text, checksum = :checksum WHERE request_id = :id", values)


CHANGES_OF_REPLIES: dict[str, Callable[[DatasetDir], object]] = {
    "another text": change_reply,
    "annotations that are gone": lambda dataset: dataset.stage("generate").unlink(),
}


@pytest.mark.parametrize("name", CHANGES_OF_REPLIES)
def test_annotations_are_written_again_only_if_a_reply_or_their_file_has_changed(
    name: str, photos: Path, tmp_path: Path, written: list[Path]
) -> None:
    with running_chat(ChatServer()) as server:
        first = ask(photos, tmp_path / "d", server)
        assert content(ask(photos, tmp_path / "d", server)) == content(first)
        assert len(written) == 1
        CHANGES_OF_REPLIES[name](DatasetDir(tmp_path / "d"))
        ask(photos, tmp_path / "d", server)
        assert len(written) == 2
        ask(photos, tmp_path / "d", server)
        assert len(written) == 2


def test_annotations_are_those_of_the_prompts_that_are_there(photos: Path, tmp_path: Path, written: list[Path]) -> None:
    prompt = tmp_path / "prompts" / "caption" / "v1.j2"
    prompt.parent.mkdir(parents=True)
    found = []
    with running_chat(ChatServer()) as server:
        for text in ("Write a caption.", "Write another caption.", "Write a caption."):
            prompt.write_text(f'{text} Reply as {{"caption": "..."}}.\nTask: caption\n')
            for remembered in (*vars(prompts).values(), *vars(requests).values()):
                if hasattr(remembered, "cache_clear"):
                    remembered.cache_clear()  # as in a new process
            ask(photos, tmp_path / "d", server, generate={"prompt_dir": str(prompt.parents[1])})
            found.append(set(read_table(DatasetDir(tmp_path / "d").stage("generate"), ["prompt_id"])["prompt_id"].to_pylist()))
    assert len(written) == 3  # all replies to the third were there, and those to the second were written
    assert found[0] == found[2] != found[1]


def test_other_settings_judge_every_row_again(photos: Path, tmp_path: Path, judged: list[str]) -> None:
    for more in ({}, {"filter": {"min_caption_words": 1}}, {}):
        result = run(photos, tmp_path / "d", judged, **more)
        assert judged == all_stages(photos)
        assert content(result) == content(run(photos, tmp_path / str(len(list(tmp_path.iterdir()))), judged, **more))


def test_other_code_judges_every_row_again(
    photos: Path, tmp_path: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(photos, tmp_path / "d", judged)
    monkeypatch.setattr(finished, "code_digest", lambda: "other")
    assert not run(photos, tmp_path / "d", judged).is_new
    assert judged == all_stages(photos)


def test_a_review_is_applied_by_the_next_run(photos: Path, tmp_path: Path, judged: list[str]) -> None:
    run(photos, tmp_path / "d", judged)
    dataset = DatasetDir(tmp_path / "d")
    row = read_table(dataset.stage("split")).to_pylist()[0]
    sample_id, digits = text_name(row)
    review = Review(sample_id=sample_id, content=digits, verdict="bad", reason="not_true")
    dataset.reviews.parent.mkdir()
    dataset.reviews.write_text(format_reviews([review]))
    marked = run(photos, dataset.path, judged)
    assert judged == ["review", "version"]
    assert marked.is_new and marked.funnel[-2].rejected == {"reviewed_not_true": 1}
    assert run(photos, dataset.path, judged).version.name == marked.version.name and judged == []


def test_a_changed_file_of_entries_balances_anew(photos: Path, tmp_path: Path, judged: list[str]) -> None:
    entries = tmp_path / "entries.txt"
    entries.write_text("bus\n")
    balance = {"entries": str(entries), "tail_frac": 0.5}
    run(photos, tmp_path / "d", judged, balance=balance)
    entries.write_text("dogs\nbus\n")
    run(photos, tmp_path / "d", judged, balance=balance)
    assert judged[0] == "balance"
