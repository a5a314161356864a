"""The pass: it asks what is missing, in the same company every time, and keeps each reply before it goes on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import Config, resolve
from pipeline.generate.ask import Counts, ask_about, groups
from pipeline.generate.journal import Journal
from pipeline.types import Engine, Reply, Request

IMAGES = [(f"{n:064x}", b"image") for n in range(6)]
REPLIES = {
    "caption": '{"caption":"A ring."}',
    "qa": '{"qa":[{"answer_type":"number","question":"How many?","answer":"1"}]}',
}


class Scripted:
    """An engine that answers from a table, notes its company, and can die after some groups."""

    model, revision = "scripted", "1"

    def __init__(self, die_after: int | None = None) -> None:
        self.company: list[list[str]] = []
        self.die_after = die_after

    def ask(self, requests: list[Request]) -> Iterator[list[Reply]]:
        if len(self.company) == self.die_after:
            raise KeyboardInterrupt
        self.company.append([request.id for request in requests])
        yield [
            Reply(request_id=r.id, text=REPLIES[r.task], finish_reason="stop", prompt_tokens=1, reply_tokens=2)
            for r in requests
        ]


def run(path: Path, engine: Scripted, config: Config | None = None) -> tuple[Counts, list[str]]:
    """Ask about two chunks of three images."""
    counts = Counts()
    with Journal(path) as journal:
        chunks = iter([IMAGES[:3], IMAGES[3:]])

        def made() -> Engine:
            return engine

        settings = config or resolve(source="scenes")
        tables = list(ask_about(chunks, settings, "1", made, journal, counts))
    return counts, [row for table in tables for row in table["annotation_id"].to_pylist()]


def test_everything_is_asked_once_and_nothing_the_second_time(tmp_path: Path) -> None:
    counts, rows = run(tmp_path / "j", Scripted())
    assert (counts.total, counts.asked, len(rows)) == (18, 18, 18)
    engine = Scripted()
    again, same_rows = run(tmp_path / "j", engine)
    assert (again.total, again.asked, same_rows) == (18, 0, rows)
    assert engine.company == []


def test_no_engine_is_made_when_there_is_nothing_to_ask(tmp_path: Path) -> None:
    run(tmp_path / "j", Scripted())

    def refuse() -> Engine:
        raise AssertionError("an engine was made")

    with Journal(tmp_path / "j") as journal:
        list(ask_about(iter([IMAGES]), resolve(source="scenes"), "1", refuse, journal, Counts()))


@pytest.mark.parametrize("groups_done", range(6))
def test_after_a_crash_the_rest_is_asked_in_the_company_it_would_have_had(tmp_path: Path, groups_done: int) -> None:
    whole = Scripted()
    run(tmp_path / "whole", whole)
    first, second = Scripted(die_after=groups_done), Scripted()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", first)
    run(tmp_path / "cut", second)
    assert first.company + second.company == whole.company
    with Journal(tmp_path / "cut") as journal:
        totals = journal.totals()
    assert totals["asked"] - totals["replies"] == 3  # the one group that was in flight


def test_another_prompt_or_task_is_asked_and_the_rest_is_not(tmp_path: Path) -> None:
    run(tmp_path / "j", Scripted(), resolve(source="scenes", tasks=["caption"]))
    counts, _ = run(tmp_path / "j", Scripted())
    assert (counts.total, counts.asked) == (18, 6)


def test_a_group_holds_one_prompt_and_no_more_than_asked(tmp_path: Path) -> None:
    from pipeline.generate.requests import build_requests

    config = resolve(source="scenes")
    requests = [r for sample_id, image in IMAGES for r in build_requests(sample_id, image, config, "r")]
    made = list(groups(requests, 4))
    assert [len(group) for group in made] == [4, 2] * 3
    assert all(len({request.text for request in group}) == 1 for group in made)
    assert sorted(r.id for group in made for r in group) == sorted(r.id for r in requests)
