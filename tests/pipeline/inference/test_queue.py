"""Request queue: requests without a reply are sent in the same batches every time, and replies are stored."""

import signal
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.inference import journal as journal_module
from pipeline.inference import queue
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats, read_annotations, read_results
from pipeline.inference.requests import build_requests
from pipeline.types import Engine, Reply, Request, RequestSource, SampleBatch, SampleInfo
from tests.plans import ask, request_plan, stored_annotations

PNG = b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
IDS = [f"{n:064x}" for n in range(6)]
REPLIES = {
    "caption": '{"caption":"A ring."}',
    "qa": '{"qa":[{"answer_type":"number","question":"How many?","answer":"1"}]}',
}


def batch(ids: list[str]) -> SampleBatch:
    return SampleBatch.of((name, (PNG,)) for name in ids)


class Scripted:
    """An engine that answers in groups of three; it fails on `bad` samples, and dies after some groups."""

    def __init__(self, die_after: int | None = None, bad: tuple[str, ...] = ()) -> None:
        self.batches: list[list[tuple[str, int]]] = []
        self.images: dict[str, tuple[bytes, ...]] = {}  # by sample
        self.die_after = die_after
        self.bad = bad

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def metrics(self) -> dict[str, str]:
        return {}

    def ask(self, work: RequestSource) -> Iterator[list[Reply]]:
        while taken := work.take():
            for requests in (taken[start : start + 3] for start in range(0, len(taken), 3)):
                work.sending(requests)
                if len(self.batches) == self.die_after:
                    raise KeyboardInterrupt
                self.images |= {request.sample_id: request.images for request in requests}
                self.batches.append([(request.id, request.attempt) for request in requests])
                yield list(map(self._reply, requests))

    def _reply(self, request: Request) -> Reply:
        is_bad = request.sample_id in self.bad and request.attempt < 2
        return request.reply("{]" if is_bad else REPLIES[request.task], "stop", 1, 2)


CONFIG = resolve(source="scenes")


def run(path: Path, engine: Scripted, config: Config = CONFIG) -> tuple[RequestStats, list[str]]:
    """Run the queue over two chunks of three images; return statistics and annotation ids."""
    with Journal(path) as journal:
        counts = ask(config, map(batch, (IDS[:3], IDS[3:])), lambda: engine, journal, revision="1")
        annotations = stored_annotations(config, IDS, journal, "1")
    return counts, annotations["annotation_id"].to_pylist()


def test_second_run_sends_nothing(tmp_path: Path) -> None:
    captions, _ = run(tmp_path / "j", Scripted(), resolve(source="scenes", tasks=["caption"]))
    counts, rows = run(tmp_path / "j", Scripted())
    assert (captions.asked, counts.total, counts.asked, counts.done, len(rows)) == (12, 18, 6, 18, 18)
    engine = Scripted()
    rerun, same_rows = run(tmp_path / "j", engine)
    assert (rerun.total, rerun.asked, rerun.done, same_rows) == (18, 0, 18, rows)
    assert engine.batches == []

    def refuse() -> Engine:
        raise AssertionError("an engine was made")

    with Journal(tmp_path / "j") as journal:
        ask(CONFIG, [batch(IDS)], refuse, journal, revision="1")


def test_images_are_read_only_for_requests_to_send(tmp_path: Path) -> None:
    read: list[str] = []

    def noted(ids: list[str]) -> SampleBatch:
        def images() -> list[tuple[bytes, ...]]:
            read.extend(ids)
            return [(PNG + name.encode(),) for name in ids]

        return SampleBatch(ids, images)

    def send(engine: Scripted, *batches: SampleBatch) -> None:
        read.clear()
        with Journal(tmp_path / "j") as journal:
            ask(CONFIG, batches, lambda: engine, journal, revision="1")

    send(Scripted(), noted(IDS[:2]))
    assert read == IDS[:2]
    sees = Scripted()
    send(sees, noted(IDS[:2]), noted(IDS[2:4]), noted(IDS[:1]))
    assert read == IDS[2:4]
    assert sees.images == {name: (PNG + name.encode(),) for name in IDS[2:4]}


def test_interrupted_run_resumes_with_the_same_batches(tmp_path: Path) -> None:
    bad = (IDS[1], IDS[5])
    whole = Scripted(bad=bad)
    run(tmp_path / "whole", whole)
    for groups_done in range(0, len(whole.batches), 2):
        first, second = Scripted(groups_done, bad), Scripted(bad=bad)
        path = tmp_path / f"cut{groups_done}"
        with pytest.raises(KeyboardInterrupt):
            run(path, first)
        run(path, second)
        assert first.batches + second.batches == whole.batches
        with Journal(path) as journal:
            totals = journal.totals()
        assert 1 <= totals["asked"] - totals["replies"] <= 3  # only the group in flight is asked again


@pytest.mark.usefixtures("heard_sigint")
@pytest.mark.parametrize("where", ["find_flaw", "_checksum"])
def test_interrupt_loses_no_reply(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = queue if where == "find_flaw" else journal_module
    work, calls = getattr(module, where), list[int]()

    def interrupted(*given: Any) -> Any:
        calls.append(1)
        if len(calls) in (5, 6):  # interrupt twice within the second group of three
            signal.raise_signal(signal.SIGINT)
        return work(*given)

    monkeypatch.setattr(module, where, interrupted)
    engine = Scripted()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "j", engine)
    monkeypatch.undo()
    assert len(engine.batches) == 2
    with Journal(tmp_path / "j") as journal:
        assert journal.totals()["replies"] == 6


def test_image_rejected_by_keep_if_loses_model_and_human_texts(tmp_path: Path) -> None:
    task = {"name": "kind", "kind": "labels", "prompt": "Look.", "keep_if": "'blank' not in results.kind"}
    styles = {"caption_styles": ["plain", "brief"]}
    config = resolve(source="folder:x", tasks=["caption"], custom_tasks=[task], generate=styles)
    plan = request_plan(config)
    replies = dict(zip(IDS, ('{"labels":["dog"]}', '{"labels":["blank"]}', "A dog."), strict=False))
    with Journal(tmp_path / "journal.sqlite") as journal:
        for sample_id, text in replies.items():
            (kind,) = build_requests(sample_id, plan, pairs=plan.rounds[0])
            journal.keep([(kind, kind.reply(text, "stop"), None)])
            results = read_results(sample_id, plan, journal)
            for caption in build_requests(sample_id, plan, results=results, pairs=plan.rounds[1]):
                journal.keep([(caption, caption.reply("A red ring.", "stop"), None)])
        ids = {"annotation_id": "h", "request_id": "h", "prompt_id": "human"}
        human = ids | {"task": "qa", "style": "", "position": 0}
        samples = [SampleInfo(name, 1, human=(human | {"sample_id": name},)) for name in replies]
        (table,) = read_annotations([samples], plan, journal)
        assert journal.totals()["replies"] == 5
        assert journal.spent["kind.default.requests"] == 3 and journal.spent["caption.default.requests"] == 2
    assert len({(row["sample_id"], row["annotation_id"]) for row in table.to_pylist()}) == table.num_rows
    errors: dict[str, dict[str, str | None]] = {name: {} for name in replies}
    for row in table.to_pylist():
        errors[row["sample_id"]][row["task"]] = row["reply_error"]
    assert [*errors.values()] == [
        {"qa": None, "caption": None, "kind": None},
        dict.fromkeys(("qa", "kind", "caption"), "dropped_by_kind"),
        {"qa": "dropped_without_kind", "kind": "not_json", "caption": "dropped_without_kind"},
    ]
