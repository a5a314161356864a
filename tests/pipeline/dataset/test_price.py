"""The price of the texts of a version, per kept text and per correct text."""

from typing import Any

import pytest

from pipeline.config.sections import ServerConfig, TaskConfig
from pipeline.dataset.price import describe_price, price_in_words
from pipeline.tasks import Tasks

LABELS = TaskConfig(name="kind", kind="labels", prompt="What is it?")
OWN = TaskConfig(name="kurz", kind="caption", prompt="Kurz.")
TASKS = Tasks(("caption", "qa", "kind", "kurz"), (LABELS, OWN))
MEASURED = {
    "captions": {"plain": {"count": 60}, "kurz": {"count": 40}, "human": {"count": 7}},
    "human_captions": 7,
    "answers": {"number": {"count": 50}},
    "custom_tasks": {"kind": {"images": 80, "labels": {}}},
}


def spent(model: str = "default", **tokens: tuple[int, int, int]) -> dict[str, int]:
    units = ("requests", "prompt_tokens", "reply_tokens")
    return {
        f"{name}.{model}.{unit}": n
        for name, counts in tokens.items()
        for unit, n in zip(units, counts, strict=True)
    }


def test_price_counts_tokens_of_each_kind_of_text_and_of_checks_separately() -> None:
    counts = spent(caption=(100, 1000, 100), kurz=(50, 500, 50), kind=(90, 900, 9), qa=(9, 9, 9))
    counts |= spent("judge", rate=(10, 100, 10))
    default = ServerConfig(price_in=1, price_out=10)
    servers = {"default": default, "judge": default.model_copy(update={"price_in": 3.0})}
    price = {entry.pop("texts"): entry for entry in describe_price(counts, MEASURED, TASKS, servers)}
    captions = {"kept": 100, "requests": 150, "prompt_tokens": 1500, "reply_tokens": 150}
    assert price["captions"] == captions | {"cost": pytest.approx(3000 / 1e6)}
    assert price[""] == {
        "kept": 0, "requests": 10, "prompt_tokens": 100, "reply_tokens": 10, "cost": pytest.approx(400 / 1e6)
    }  # fmt: skip
    assert price["kind"]["kept"] == 80 and price["questions"]["kept"] == 50
    free = describe_price(counts, MEASURED, TASKS, {"default": ServerConfig()})
    assert all("cost" not in entry for entry in free)


def entry(texts: str, kept: int, tokens: int, cost: float = 0.0) -> dict[str, Any]:
    counts = {"kept": kept, "requests": 1, "prompt_tokens": tokens, "reply_tokens": 0}
    return {"texts": texts, **counts, "cost": cost}


def rate(task: str, wrong: float | None, low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
    return {"task": task, "style": "", "texts": 100, "wrong": wrong, "low": low, "high": high}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "10 tokens per kept text (100 kept); per correct text: not measured"),
        (
            {"audit": {"rates": [rate("captions", 0.2, 0.1, 0.5)]}},
            "10 tokens per kept text (100 kept); 12 tokens per correct text, tokens [11, 20] (audit)",
        ),
        ({"audit": {"rates": [rate("captions", 0.2, 0.1, 1.0)]}}, "tokens [11, no upper bound] (audit)"),
        ({"audit": {"rates": [rate("captions", 0.2), rate("captions", None)]}}, "not measured"),
        ({"audit": {"rates": [rate("captions", 1.0, 0.7, 1.0)]}}, "(100 kept); no correct text"),
        (
            {"audit": {"rates": [rate("captions", 0.2)]}, "measured": {"human_captions": 3}},
            "not measured",
        ),
    ],
)
def test_number_of_right_texts_is_estimated_from_audit(more: dict[str, Any], expected: str) -> None:
    (line,) = price_in_words({"measured": {}, "price": [entry("captions", 100, 1000)], **more})
    assert line.startswith("captions: ") and expected in line


def test_total_price_per_right_text_needs_an_audit_of_each_kind_of_text() -> None:
    price = [entry("questions", 50, 500), entry("captions", 100, 1000, cost=0.5), entry("", 0, 600, cost=0.1)]
    rates = [rate("captions", 0.0, 0.0, 0.1), rate("questions", 0.5, 0.4, 0.6)]
    manifest = {"measured": {}, "price": price, "audit": {"rates": rates}}
    *_, total, time = price_in_words(manifest, asking_s=30.0)
    assert total.startswith("all texts with their checks: 14 tokens, cost 0.004 per kept text (150 kept); ")
    assert "17 tokens, cost 0.0048 per correct text, tokens [16, 19] (audit)" in total
    assert time == "all requests in this folder: 0.2 s per kept text"
    del rates[1]
    assert "per correct text: not measured" in price_in_words(manifest)[-1]


@pytest.mark.parametrize(("cost", "shown"), [(2e5, "2,000"), (6.4e-3, "0.000064"), (123.0, "1.23")])
def test_cost_has_no_exponent(cost: float, shown: str) -> None:
    (line,) = price_in_words({"measured": {}, "price": [entry("captions", 100, 1000, cost)]})
    assert f"10 tokens, cost {shown} per kept text" in line


def test_version_without_a_model_or_texts_has_no_price() -> None:
    assert price_in_words({"measured": {}}) == []
    assert price_in_words({"measured": {}, "price": [entry("captions", 0, 10)]}, 5.0) == []
