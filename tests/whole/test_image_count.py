"""`--images N`: the source is read until N images are kept, and no request is paid twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import text_name
from pipeline.dataset.version import Version
from pipeline.estimate import estimate_run
from pipeline.plan import Plan
from pipeline.progress import NullProgress
from pipeline.reviewing import apply_reviews
from pipeline.run import RunResult, generate_dataset, next_limit
from tests.chat.server import Act, ChatServer, running_chat, uuid_of
from tests.notes import Notes

REFUSED = '{"caption":"I cannot see the image."}'


def caption_of(body: dict[str, Any]) -> str:
    """Return a caption that is unique to the image."""
    words = " ".join(f"word{place}{digit}" for place, digit in enumerate(uuid_of(body)[:6]))
    return f'{{"caption":"A small ring beside {words} on a white background."}}'


def refuse_some(share: float) -> ChatServer:
    """Return a server that declines to caption a share of the images at any attempt."""

    def script(times: int, body: dict[str, Any]) -> Act:
        return Act(REFUSED if int(uuid_of(body)[:4], 16) < share * 0x10000 else caption_of(body))

    return ChatServer(script)


def settings(chat: ChatServer, **more: Any) -> Config:
    values: dict[str, Any] = {
        "source": "scenes", "tasks": ["caption"], "base_url": [chat.url], "model": "model",
        "generate": {"caption_styles": ["brief"], "max_attempts": 1}, "filter": {"language": None},
        "server": {"max_failure_frac": 1},
    }  # fmt: skip
    return resolve(**values | more)


def run(folder: Path, chat: ChatServer, **more: Any) -> tuple[RunResult, list[str]]:
    notes = Notes()
    return generate_dataset(settings(chat, **more), folder, progress=notes), notes.texts


def step(version: Version, name: str) -> dict[str, Any]:
    return next(step for step in version.manifest["funnel"] if step["step"] == name)


def ids_of(version: Version) -> set[str]:
    batches = [batch for _, batch in version.batches(["sample_id"])]
    return {sample_id for batch in batches for sample_id in batch["sample_id"].to_pylist()}


def test_source_is_read_until_enough_images_are_kept(tmp_path: Path) -> None:
    with running_chat(refuse_some(0.3)) as chat:
        result, notes = run(tmp_path, chat, images=50)
        version = result.version
        assert version.num_rows == 50
        read = step(version, "read")["kept"]
        assert 60 < read < 100 and len(chat.bodies) == result.stats.asked == result.stats.total == read
        assert max(chat.times.values()) == 1
        reading = "of 50 images were kept from 50 images read: reading more, up to image"
        assert any(reading in text for text in notes)
        trimmed = step(version, "trim")
        assert trimmed["input"] - trimmed["kept"] == trimmed["rejected"].get("beyond_images", 0) < 20
        assert not version.is_preview and version.manifest["config"]["images"] == 50
        again, _ = run(tmp_path, chat, images=50)
        assert (again.is_new, again.stats.asked) == (False, 0)
        more, _ = run(tmp_path, chat, images=60)
        assert more.version.num_rows == 60 and max(chat.times.values()) == 1
        assert len(ids_of(version)) == 50 and ids_of(version) < ids_of(more.version)
        num_requests = len(chat.bodies)
        fewer = generate_dataset(settings(chat, images=12), tmp_path)
        assert (fewer.version.num_rows, len(chat.bodies)) == (12, num_requests)


def test_killed_run_with_image_count_resumes(tmp_path: Path) -> None:
    class Stop(NullProgress):
        def message(self, text: str, *, transient: bool = False) -> None:
            if "reading more" in text:
                raise KeyboardInterrupt

    with running_chat(refuse_some(0.3)) as chat:
        with pytest.raises(KeyboardInterrupt):
            generate_dataset(settings(chat, images=50), tmp_path, progress=Stop())
        num_requests = len(chat.bodies)
        result, _ = run(tmp_path, chat, images=50)
        assert result.version.num_rows == 50 and num_requests == 50
        assert len(chat.bodies) == num_requests + result.stats.asked and max(chat.times.values()) == 1


def test_next_limit_follows_share_of_kept_images() -> None:
    notes = Notes()
    config = resolve(source="scenes", images=10)
    assert next_limit(config, 10, 7, notes, has_more=False) is None
    assert notes.texts == ["warning: 7 of 10 images were kept: scenes has no more images"]
    # half were kept: as many again, and ten percent more
    assert next_limit(config, 10, 5, notes, has_more=True) == 10 + 11
    assert next_limit(resolve(source="scenes", images=10, limit=12), 10, 5, notes, has_more=True) == 12
    assert next_limit(config, 10, 0, notes, has_more=True) is None
    assert "too few to read more" in notes.texts[-1]
    assert next_limit(config, 10, 10, notes, has_more=True) is None
    assert next_limit(resolve(source="scenes", images=10, limit=12), 12, 5, notes, has_more=True) is None
    assert "--limit allows no more" in notes.texts[-1]


def test_bad_review_does_not_continue_reading(tmp_path: Path) -> None:
    with running_chat(refuse_some(0.0)) as chat:
        first, _ = run(tmp_path, chat, images=20)
        batch = next(batch for _, batch in first.version.batches(["sample_id", "captions"]))
        row = batch.to_pylist()[0]
        sample_id, caption = row["sample_id"], row["captions"][0]["text"]
        _, content = text_name({"sample_id": sample_id, "task": "caption", "text": caption})
        reviews = tmp_path / "reviews.jsonl"
        review = {"sample_id": sample_id, "content": content, "verdict": "bad", "reason": "not_true"}
        reviews.write_text(f"{json.dumps(review)}\n")
        notes = Notes()
        reviewed = apply_reviews(DatasetDir(tmp_path), [reviews], notes)
        assert reviewed.version.num_rows == 19
        assert not any("images were kept" in text for text in notes.texts)
        again, texts = run(tmp_path, chat, images=20)
    assert (again.is_new, again.stats.asked, len(chat.bodies)) == (False, 0, 20)
    assert not any("images were kept" in text for text in texts)


def test_dry_run_predicts_images_to_read(tmp_path: Path) -> None:
    with running_chat(refuse_some(0.5)) as chat:
        plans = [Plan.open(settings(chat, images=n), tmp_path, NullProgress()) for n in (500, 3000)]
        predicted, many = [estimate_run(plan, NullProgress()) for plan in plans]
    assert predicted["kept_images"] == pytest.approx(500, abs=2)
    assert 700 < predicted["images"] < 1600
    # drawn scenes are unlimited
    assert many["kept_images"] == pytest.approx(3000, abs=2) and many["images"] > 3600
