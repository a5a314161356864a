"""A run over shards makes the same version as a run in one process, on a disk and in an object store."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from ray import cloudpickle

from pipeline.config.files import resolve
from pipeline.executors.ray import executor
from pipeline.executors.ray.cluster import ClusterOptions, WorkerPlan
from pipeline.run import generate_dataset
from pipeline.storage.files import remove
from pipeline.storage.object_store import parse_dataset_path
from tests.chat.server import ChatServer, running_chat
from tests.hub import datasets
from tests.pipeline.images import test_similarity
from tests.whole.test_cluster import rows_of, scripted_replies


def map_here(count: int, work: Callable[[int], Any], *_: Any) -> list[Any]:
    """Pickle a function as for a worker, and apply it to every index below `count`."""
    work = cloudpickle.loads(cloudpickle.dumps(work))  # type: ignore[no-untyped-call]
    with work if isinstance(work, AbstractContextManager) else nullcontext():
        return [work(index) for index in range(count)]


@pytest.fixture(autouse=True)
def no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the work of all shards in this process."""
    monkeypatch.setattr(executor, "open_cluster", nullcontext)
    monkeypatch.setattr(executor, "plan_workers", lambda *_, **__: WorkerPlan(1, 1, 0))
    monkeypatch.setattr(executor, "map_on_workers", map_here)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder with copies, near-duplicates, a held-out photo, and broken images."""
    (tmp_path / "photos").mkdir()
    for number in range(24):
        data = b"no image" if number % 7 == 6 else datasets.photo(number - number % 5 // 4)
        (tmp_path / "photos" / f"{number:02d}.jpg").write_bytes(data)
    near = {"01-large": (1, 160), "01-small": (1, 120), "02": (2, 160), "03-test": (2, 120)}
    for name, (number, width) in near.items():
        image = test_similarity.photo(number).resize((width, width * 3 // 4))
        image.save(tmp_path / "photos" / f"{name}.jpg")
    rows = '{"file_name": "03-test.jpg", "split": "test"}'
    (tmp_path / "photos" / "metadata.jsonl").write_text(rows)
    return tmp_path / "photos"


SETTINGS: dict[str, Any] = {
    "tasks": ["caption", "qa"],
    "verify": {"checks": ["round_trip"]},
    "dedupe": {"images": "photos", "max_images_per_caption": 2},
    "balance": {"min_questions_per_type": 2, "max_answer_frac": 0.34},
}


@pytest.mark.parametrize(("shards", "is_remote"), [(1, False), (3, False), (16, False), (3, True)])
def test_version_of_shards_equals_version_of_one_process(
    shards: int, photos: Path, tmp_path: Path, *, is_remote: bool
) -> None:
    out = parse_dataset_path(f"memory://{uuid4().hex}") if is_remote else tmp_path / "many"
    options = ClusterOptions(shards=shards)
    with running_chat(ChatServer(scripted_replies())) as chat:
        config = resolve(source=f"folder:{photos}", limit=15, base_url=[chat.url], model="model", **SETTINGS)
        one = generate_dataset(config, tmp_path / "one")
        sent = sorted(chat.times.items())
        chat.times.clear()
        many = generate_dataset(config, out, cluster=options)
        assert sorted(chat.times.items()) == sent
        again = generate_dataset(config, out, cluster=options)
        changed = config.model_copy(update={"title": "Another title"})
        generate_dataset(changed, out, cluster=options)
        assert sorted(chat.times.items()) == sent and (again.is_new, many.is_new) == (False, True)
    assert many.funnel == one.funnel and one.version.is_preview
    for name in one.version.manifest.keys() - {"files", "rejections"}:
        assert many.version.manifest[name] == one.version.manifest[name], name
    rows = rows_of(many.version)
    assert rows == rows_of(one.version) and len(rows) > 5
    reasons = {reason for step in many.funnel for reason in step.rejected}
    of_images = "duplicate_image near_duplicate_image near_held_out_image"
    of_texts = "duplicate caption_of_many_images answer_not_confirmed answer_too_common"
    assert reasons >= {*of_images.split(), *of_texts.split()}
    if is_remote:
        remove(out)
