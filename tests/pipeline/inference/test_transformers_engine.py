"""Transformers engine with the real tiny teacher: schema, accuracy, and independence of the batch."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import DECKS
from pipeline.config.files import resolve
from pipeline.config.sections import GenerateConfig
from pipeline.digests import weights_revision
from pipeline.errors import EngineError
from pipeline.inference.engines import TINY_DECK_WEIGHTS, TINY_WEIGHTS, choose_engine
from pipeline.inference.transformers_engine import EmbeddedEngine
from pipeline.scenes.text import AnswerScore, CaptionScore
from pipeline.sources.scenes import draw_sample
from pipeline.tasks import TASKS
from pipeline.tasks.replies import parse_reply
from pipeline.types import Engine, Reply, Request, Sampling
from tests.scene_data import batch_of, requests_to_send, scene_samples, scenes_by_id, score_annotations, score_decks

SEED = 8001  # no training set holds these scenes
SCENES = 60


@pytest.fixture(scope="module")
def engine() -> Engine:
    return choose_engine(resolve(source="scenes")).make()


def requests(count: int, seed: int = SEED) -> list[Request]:
    config = resolve(source="scenes")
    revision = choose_engine(config).revision
    return requests_to_send(batch_of(scene_samples(count, seed)), config, revision)


class Once:
    """A types.RequestSource whose requests are taken once; no reply leads to a retry."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self.left = list(requests)

    def take(self) -> list[Request]:
        taken, self.left = self.left, []
        return taken

    def sending(self, requests: Sequence[Request]) -> None:
        pass

    def withdraw(self, requests: Sequence[Request]) -> None:
        pass

    def answered(self) -> bool:
        return False


def replies(engine: Engine, batch: Iterable[Request]) -> dict[str, Reply]:
    return {reply.request_id: reply for group in engine.ask(Once(batch)) for reply in group}


def scores(engine: Engine, batch: list[Request], count: int) -> tuple[dict[str, CaptionScore], dict[str, AnswerScore]]:
    reply_of = replies(engine, batch)
    rows = [row for request in batch for row in parse_reply(request, reply_of[request.id])]
    return score_annotations(rows, scenes_by_id(scene_samples(count, SEED)))


def reword(request: Request) -> Request:
    system = "A reader without eyes listens. Speak plainly, as JSON."
    words = "Kindly do what stands below, honestly and with care, since others build upon it!"
    return replace(request, system=system, text=f"{words}\n{request.text.splitlines()[-1]}")


@pytest.mark.parametrize("weights", [TINY_WEIGHTS, TINY_DECK_WEIGHTS])
def test_the_weights_are_small_enough_to_ship(weights: Path) -> None:
    assert sum(path.stat().st_size for path in weights.iterdir()) < 10_000_000


@pytest.mark.parametrize("wording", ["as released", "reworded"])
def test_the_teacher_tells_the_truth_about_unseen_scenes(engine: Engine, wording: str) -> None:
    """Catch a broken teacher, or a broken path to it; benchmarks/teacher.py measures the full figures."""
    batch = requests(SCENES)
    captions, answers = scores(engine, [reword(r) for r in batch] if wording == "reworded" else batch, SCENES)
    assert {style: min(c.precision, c.recall) > 0.93 for style, c in captions.items()} == {"brief": True, "detailed": True}
    assert {kind: a.accuracy > 0.85 for kind, a in answers.items()} == {"yes/no": True, "number": True, "other": True}
    assert all(1 - a.accuracy < (1 - a.majority) / 2 for a in answers.values())


def test_the_teacher_of_decks_finds_the_pages_and_tells_the_truth_about_them() -> None:
    """Takes about six seconds for 24 decks of four pages; benchmarks/teacher.py measures 500."""
    config = resolve(source="scenes-deck", tasks=["deck_qa"], engine="embedded")
    choice = choose_engine(config)
    assert choice.revision == weights_revision(TINY_DECK_WEIGHTS)
    decks = [draw_sample(SEED, index, DECKS) for index in range(24)]
    batch = requests_to_send(batch_of(decks), config, choice.revision)
    reply_of = replies(choice.make(), batch)
    rows = [row for request in batch for row in parse_reply(request, reply_of[request.id])]
    scores = score_decks(rows, scenes_by_id(decks, DECKS))
    assert set(scores) == {"span", "number", "arithmetic"}
    assert sum(s.right for s in scores.values()) > 0.8 * len(rows)
    assert sum(s.evidence_right for s in scores.values()) > 0.8 * len(rows)


def test_every_reply_fits_the_schema_even_when_the_model_is_confused(engine: Engine) -> None:
    hot = [replace(r, sampling=Sampling(temperature=2.0, max_tokens=400)) for r in requests(8)]
    reply_of = replies(engine, hot)
    for request in hot:
        reply = reply_of[request.id]
        if reply.finish_reason == "stop":
            names = TASKS[request.task].output.model_fields
            assert reply.text.startswith(f'{{"{next(iter(names))}":')
            assert parse_reply(request, reply)[0]["reply_error"] is None
    assert any(reply.finish_reason == "stop" for reply in reply_of.values())


def test_a_reply_does_not_depend_on_its_company(engine: Engine) -> None:
    batch = requests(6)
    together = replies(engine, batch)
    alone: dict[str, Reply] = {}
    for request in batch:
        alone |= replies(engine, [request])
    assert alone == together


def test_the_same_request_has_the_same_reply_and_another_id_samples_anew(engine: Engine) -> None:
    qa = [r for r in requests(12) if r.task == "qa"]
    assert replies(engine, qa) == replies(engine, qa)
    renamed = [replace(r, id=f"{n:064x}") for n, r in enumerate(qa)]
    texts = [reply.text for reply in replies(engine, renamed).values()]
    assert texts != [reply.text for reply in replies(engine, qa).values()]


def test_a_reply_that_runs_out_of_tokens_says_so(engine: Engine) -> None:
    short = [replace(r, sampling=Sampling(temperature=0, max_tokens=5)) for r in requests(1)]
    reply_of = replies(engine, short)
    assert {reply.finish_reason for reply in reply_of.values()} == {"length"}
    assert {row["reply_error"] for r in short for row in parse_reply(r, reply_of[r.id])} == {"cut_short"}


def test_a_style_that_the_teacher_does_not_know_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(EngineError, match="does not know the caption style plain"):
        choose_engine(resolve(source="scenes", generate={"caption_styles": ["plain"]}))


def test_another_attempt_at_the_same_request_draws_other_numbers(engine: Engine) -> None:
    qa = [replace(r, sampling=Sampling(temperature=1.0, max_tokens=256)) for r in requests(4) if r.task == "qa"]
    retries = [replace(r, attempt=1) for r in qa]
    assert [r.text for r in replies(engine, qa).values()] != [r.text for r in replies(engine, retries).values()]


def test_a_failed_reply_can_be_shown_to_the_model(engine: Engine) -> None:
    (brief, *_) = requests(1)
    shown = replace(brief, attempt=2, failed=("{]", f"That cannot be used.\n{brief.text.splitlines()[-1]}"))
    (reply,) = replies(engine, [shown]).values()
    assert reply.attempt == 2
    assert reply.prompt_tokens > replies(engine, [brief])[brief.id].prompt_tokens
    assert parse_reply(shown, reply)[0]["reply_error"] is None


def test_the_model_is_loaded_when_it_is_asked_and_not_before() -> None:
    EmbeddedEngine("none", "/does/not/exist", "r", GenerateConfig())
