"""Requests: an id depends on everything that changes the reply, and on nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.config.sections import VerifyConfig
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import ConfigError
from pipeline.inference import protocol
from pipeline.inference.protocol import Dialect
from pipeline.inference.request_checks import check_requests
from pipeline.inference.requests import RequestPlan, build_requests
from pipeline.plan import Model, Plan
from pipeline.sources import with_source_defaults
from pipeline.tasks.checks import ANSWER, BLIND, CLAIMS, COVERS, REPAIR
from tests.plans import request_plan

SAMPLE = "a" * 64
BOXES = {"name": "find", "kind": "boxes", "prompt": "Find all cups."}


def ids(sample_id: str = SAMPLE, revision: str = "r", **settings: Any) -> list[str]:
    config = resolve(source="scenes", **settings)
    return [request.id for request in build_requests(sample_id, request_plan(config, revision))]


@pytest.mark.parametrize(
    "changed",
    [
        {"sample_id": "b" * 64},
        {"revision": "other"},
        {"generate": {"max_tokens": 9}},
        {"generate": {"caption_temperature": 0.1, "qa_temperature": 0.1}},
    ],
)
def test_id_changes_with_everything_that_changes_the_reply(changed: dict[str, Any]) -> None:
    assert not set(ids(**changed)) & set(ids())


def test_pixel_limit_changes_request_ids_of_photos_but_not_of_scenes() -> None:
    settings = [resolve(source="folder:x", generate={"max_pixels": bound}) for bound in (None, 1_003_520)]
    whole, scaled, default = (
        [request.id for request in build_requests(SAMPLE, request_plan(with_source_defaults(config)))]
        for config in (*settings, resolve(source="folder:x"))
    )
    assert default == scaled and not {*default} & {*whole}
    assert with_source_defaults(resolve(source="scenes")).generate.max_pixels is None


@pytest.mark.parametrize(
    ("settings", "pixels", "check_pixels"),
    [
        ({}, [1_003_520] * 3, 1_003_520),
        ({"generate": {"caption_styles": ["plain", "ocr"]}}, [1_003_520, 2_007_040, 1_003_520], 2_007_040),
        ({"tasks": ["find"], "custom_tasks": [BOXES]}, [2_007_040], 2_007_040),
        ({"source": "pdf-pages:x", "tasks": ["caption"]}, [2_007_040] * 2, 2_007_040),
        ({"tasks": ["qa"], "generate": {"max_pixels": 5000}}, [5000], 5000),
        ({"tasks": ["qa"], "generate": {"max_pixels": None}}, [None], None),
    ],
)
def test_pixel_limit_depends_on_the_task(
    settings: dict[str, Any], pixels: list[int | None], check_pixels: int | None
) -> None:
    plan = request_plan(with_source_defaults(resolve(**{"source": "folder:x", **settings})))
    assert [request.max_pixels for request in build_requests(SAMPLE, plan)] == pixels
    assert plan.fields(ANSWER, question="?")[0]["max_pixels"] == plan.largest_pixels == check_pixels


@pytest.mark.parametrize(
    ("settings", "is_plain"),
    [
        ({"source": "folder:x"}, [True, True, False]),
        ({"source": "scenes"}, [False] * 3),
        ({"tasks": ["own"], "custom_tasks": [{"name": "own", "kind": "text", "prompt": "Read."}]}, [True]),
        ({"tasks": ["find"], "custom_tasks": [BOXES]}, [False]),
    ],
)
def test_prompt_without_json_gets_no_schema(settings: dict[str, Any], is_plain: list[bool]) -> None:
    plan = request_plan(with_source_defaults(resolve(**{"source": "folder:x", **settings})))
    requests = list(build_requests(SAMPLE, plan))
    assert [request.schema == "" for request in requests] == is_plain
    for request in requests:
        for dialect in (protocol.VLLM, Dialect(states_schema=True)):
            sent = protocol.body(request, b"", "model", dialect).decode()
            assert ("response_format" in sent) == bool(request.schema and not dialect.states_schema)
            assert ("follows this JSON schema" in sent) == bool(request.schema and dialect.states_schema)


@pytest.mark.parametrize("generate", [{"caption_styles": ["brief", "ocr"]}, {"max_pixels": 5000}], ids=str)
def test_ids_of_checks_without_image_do_not_depend_on_styles_or_pixel_limit(generate: dict[str, Any]) -> None:
    values: dict[str, Any] = {"question": "?", "caption": "A cup.", "count": 1, "claims": ()}
    digests = [
        [request_plan(resolve(source="folder:x", **settings)).fields(task, **values)[1] for task in checks]
        for checks in ((BLIND, CLAIMS, COVERS, REPAIR), (ANSWER,))
        for settings in (dict[str, Any](), {"generate": generate})
    ]
    assert digests[0] == digests[1] and digests[2] != digests[3]


def test_several_captions_have_log_probabilities_and_their_own_request_ids() -> None:
    config = resolve(source="scenes", generate={"samples": 3})
    plan = request_plan(config)
    requests = list(build_requests(SAMPLE, plan))
    assert [(r.style, r.sampling.temperature) for r in requests] == [
        *(("brief", t) for t in (0.0, 0.5, 0.5)), *(("detailed", t) for t in (0.0, 0.5, 0.5)), ("", 0.3),
    ]  # fmt: skip
    assert len({r.id for r in requests}) == plan.count(plan.pairs) == 7
    assert [r.wants_logprobs for r in requests] == [True] * 6 + [False]
    assert ids() == ids(limit=7) and {*ids()} & {r.id for r in requests} == {requests[6].id}
    assert {*ids(generate={"samples": 2})} < {*ids(generate={"samples": 3})}
    assert ids(generate={"samples": 3}, seed=1)[1] != requests[1].id
    hot = {"samples": 2, "caption_temperature": 1.2}
    first, second, *_ = ids(generate=hot)
    assert first != second == ids(generate=hot | {"sample_temperature": 0.5})[1]


def test_seed_changes_ids_of_sampled_requests_only() -> None:
    brief, detailed, qa = ids(seed=1)
    assert [brief, detailed] == ids()[:2]
    assert qa != ids()[2]


MODELS = {"default": Model("d", "r1"), "small": Model("s", "r2"), "large": Model("l", "r3")}
NAMED = {name: {"model": name} for name in ("small", "large")}
NOTES = {"name": "notes", "kind": "text", "prompt": "Take notes.", "model": "small"}


def plan_with_models(**settings: Any) -> RequestPlan:
    asked: dict[str, Any] = {"source": "folder:x", "tasks": ["caption", "qa"], "custom_tasks": [NOTES]}
    config = resolve(**{**asked, "models": NAMED, **settings})
    return Plan.resolve(config, DatasetDir(Path("d")), MODELS).requests


def ids_by_task(plan: RequestPlan) -> dict[str, list[str]]:
    ids: dict[str, list[str]] = {}
    for request in build_requests("a" * 64, plan):
        ids.setdefault(f"{request.task} by {request.model}", []).append(request.id)
    return ids


def test_model_of_a_task_changes_only_the_request_ids_of_this_task() -> None:
    tasks = ["caption", "qa"]
    config = with_source_defaults(resolve(source="folder:x", tasks=tasks))
    without = ids_by_task(request_plan(config, "r1"))
    ladder = plan_with_models(tasks=tasks, task_models={"qa": ["small", "large"]})
    ids = ids_by_task(ladder)
    assert ids.keys() == {"caption by default", "qa by small", "notes by small"}
    assert ids["caption by default"] == without["caption by default"]
    assert ids["qa by small"] != without["qa by default"]
    second = ids_by_task(replace(ladder, rung=1))
    assert second["notes by small"] == ids["notes by small"] and second["qa by large"] != ids["qa by small"]


@pytest.mark.parametrize(
    ("settings", "models"),
    [
        ({}, ("default", "default", "default")),
        ({"model": "large"}, ("large", "large", "large")),
        ({"task_models": {"checks": "small"}}, ("default", "small", "small")),
        ({"task_models": {"checks": "small", "repair": "large"}}, ("default", "small", "large")),
        ({"task_models": {"repair": "large"}, "model": "small"}, ("small", "small", "large")),
        ({"task_models": {"caption": "default", "qa": "small"}}, ("default", "default", "default")),
        ({"task_models": {"caption": "default", "checks": "default"}, "model": "large"}, ("large",) * 3),
    ],
)
def test_checks_use_the_default_or_a_named_model(settings: dict[str, Any], models: tuple[str, ...]) -> None:
    plan = plan_with_models(**settings)
    assert tuple(map(plan.model_of, ("caption", "confirm", "repair"))) == models


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"task_models": {"caption": ["small", "larg"]}}, "unknown model: larg"),
        ({"custom_tasks": [NOTES | {"model": "smal"}]}, "the task notes names an unknown model: smal"),
        ({"task_models": {"captions": "small"}}, "not in this run: captions"),
        ({"task_models": {"qa": "small"}, "tasks": ["caption"]}, "not in this run: qa"),
        ({"generate": {"min_logprob": -1}, "task_models": {"qa": "small"}}, "min_logprob needs a ladder"),
        ({"task_models": {"checks": ["small", "large"]}}, "checks can have one model only"),
        ({"verify": {"judge": "larg"}}, "the judge larg has no server"),
        ({"models": {"default": {}}}, "choose another name"),
        ({"models": {"judge": {}}, "verify": {"judge": "j@http://h/v1"}}, "set `verify.judge: judge`"),
    ],
)
def test_unknown_or_contradictory_model_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        plan_with_models(**settings)


def test_ladder_of_equal_models_is_refused() -> None:
    ladder = {"caption": ["small", "large"]}
    config = resolve(source="folder:x", models=NAMED, tasks=["caption"], task_models=ladder)
    same = dict.fromkeys(MODELS, MODELS["small"])
    other, equal = (Plan.resolve(config, DatasetDir(Path("d")), models) for models in (MODELS, same))
    other.refuse_equal_models()
    with pytest.raises(ConfigError, match="two models of the task caption are the same: small, large"):
        equal.refuse_equal_models()


def test_task_with_a_ladder_cannot_be_needed_by_another_task() -> None:
    settings = {"tasks": ["caption"], "generate": {"caption_styles": ["brief"]}}
    ladder = {"caption": ["small", "large"]}
    plan = plan_with_models(custom_tasks=[NOTES | {"needs": ["brief"]}], task_models=ladder, **settings)
    with pytest.raises(ConfigError, match="caption has several models, but another task needs its result"):
        check_requests(plan, VerifyConfig())
