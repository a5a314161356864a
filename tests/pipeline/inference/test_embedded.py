"""Embedded engine with the real tiny teacher: schema, accuracy, and independence of the batch."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pipeline.config import DECKS
from pipeline.config.files import resolve
from pipeline.digests import weights_revision
from pipeline.inference.embedded import BATCH_IMAGES, batch_requests
from pipeline.inference.engines import TINY_DECK_WEIGHTS
from pipeline.sources.scenes import draw_sample
from pipeline.tasks import TASKS
from pipeline.tasks.replies import parse_reply
from pipeline.types import Engine, Reply, Request, Sampling
from tests.media import encoded
from tests.plans import engine_of
from tests.scene_data import (
    batch_of,
    requests_to_send,
    scene_samples,
    scenes_by_id,
    score_annotations,
    score_decks,
)

SEED = 8001  # no training set has this seed
SCENES = 40


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of(resolve(source="scenes")).make()


def requests(count: int, seed: int = SEED) -> list[Request]:
    config = resolve(source="scenes")
    revision = engine_of(config).revision
    return requests_to_send(batch_of(scene_samples(count, seed)), config, revision)


def replies(engine: Engine, batch: list[Request]) -> dict[str, Reply]:
    left = [[], batch]
    work: Any = SimpleNamespace(take=left.pop, sending=lambda requests: None)
    return {reply.request_id: reply for group in engine.ask(work) for reply in group}


def annotations(engine: Engine, batch: list[Request]) -> list[dict[str, Any]]:
    reply_of = replies(engine, batch)
    return [row for request in batch for row in parse_reply(request, reply_of[request.id])]


def test_teacher_is_accurate_on_unseen_scenes(engine: Engine) -> None:
    rows = annotations(engine, requests(SCENES))
    captions, answers = score_annotations(rows, scenes_by_id(scene_samples(SCENES, SEED)))
    assert ({*captions}, {*answers}) == ({"brief", "detailed"}, {"yes/no", "number", "other"})
    assert all(min(c.precision, c.recall) > 0.93 for c in captions.values())
    assert all(a.accuracy > 0.85 for a in answers.values())
    assert all(1 - a.accuracy < (1 - a.majority) / 2 for a in answers.values())


def test_deck_teacher_is_accurate_and_finds_the_evidence_pages() -> None:
    config = resolve(source="scenes-deck", tasks=["deck_qa"], engine="embedded")
    choice = engine_of(config)
    assert choice.revision == weights_revision(TINY_DECK_WEIGHTS)
    decks = [draw_sample(SEED, index, DECKS) for index in range(12)]
    batch = requests_to_send(batch_of(decks), config, choice.revision)
    rows = annotations(choice.make(), batch)
    scores = score_decks(rows, scenes_by_id(decks, DECKS))
    assert set(scores) == {"span", "number", "arithmetic"}
    assert sum(s.right for s in scores.values()) > 0.8 * len(rows)
    assert sum(s.evidence_right for s in scores.values()) > 0.8 * len(rows)


def test_replies_at_high_temperature_follow_the_schema(engine: Engine) -> None:
    hot = [replace(r, sampling=Sampling(temperature=2.0, max_tokens=400)) for r in requests(8)]
    reply_of = replies(engine, hot)
    for request in hot:
        reply = reply_of[request.id]
        if reply.finish_reason == "stop":
            names = TASKS[request.task].output.model_fields
            assert reply.text.startswith(f'{{"{next(iter(names))}":')
            assert parse_reply(request, reply)[0]["reply_error"] is None
    assert any(reply.finish_reason == "stop" for reply in reply_of.values())


def test_reply_does_not_depend_on_its_batch(engine: Engine) -> None:
    batch = requests(6)
    together = replies(engine, batch)
    assert {name: reply for one in batch for name, reply in replies(engine, [one]).items()} == together


def test_different_request_id_or_attempt_gives_a_different_sampled_reply(engine: Engine) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=256)
    qa = [replace(r, sampling=sampling) for r in requests(6) if r.task == "qa"]
    renamed = [replace(r, id=f"{n:064x}") for n, r in enumerate(qa)]
    retries = [replace(r, attempt=1) for r in qa]
    batches = (qa, renamed, retries)
    first, second, third = ([reply.text for reply in replies(engine, one).values()] for one in batches)
    assert first != second and first != third


def test_reply_at_the_token_limit_is_cut_short(engine: Engine) -> None:
    short = [replace(r, sampling=Sampling(temperature=0, max_tokens=5)) for r in requests(1)]
    assert {row["reply_error"] for row in annotations(engine, short)} == {"cut_short"}


def test_batch_has_one_prompt_and_is_smaller_for_large_images_and_decks() -> None:
    texts = [{request.text for request in batch} for batch in batch_requests(requests(3))]
    assert [len(batch) for batch in batch_requests(requests(3))] == [3, 3, 3] and {*map(len, texts)} == {1}
    assert max(len(batch) for batch in batch_requests(requests(70))) == BATCH_IMAGES
    asked = [replace(request, style="", task="caption") for request in requests(10)]
    cases: tuple[tuple[int | None, tuple[int, int], int, int], ...] = (
        (1_003_520, (2000, 2000), 1, 8),
        (2_007_040, (2000, 2000), 1, 4),
        (None, (2000, 2000), 1, 2),
        (None, (2000, 2000), 3, 1),
        (2_007_040, (60, 40), 1, 30),
        (None, (60, 40), 20, 3),
        (2_007_040, (60, 40), 0, 30),
    )
    for max_pixels, (width, height), images, size in cases:
        image = encoded(Image.new("RGB", (width, height)))
        shown = [replace(one, max_pixels=max_pixels, images=(image,) * images) for one in asked]
        assert {len(batch) for batch in batch_requests(shown)} <= {size, 30 % size}
