"""The card: its YAML is a dumper's, and no text of a model can break out of its line."""

from typing import Any

import pytest
import yaml

from pipeline.card import one_line, render_card

MANIFEST: dict[str, Any] = {
    "version": "v1.0.0",
    "parent": None,
    "digest": "d" * 64,
    "source": {"name": "scenes", "revision": "1.0"},
    "model": {"name": "tiny", "revision": "abc"},
    "prompts": ["caption/v1@123", "qa/v1@456"],
    "config": {"tasks": ["caption", "qa"]},
    "licences": ["cc0-1.0"],
    "columns": ["sample_id", "image"],
    "rows": {"train": 8, "validation": 1, "test": 0},
    "funnel": [{"stage": "dedupe", "unit": "annotations", "input": 9, "kept": 8, "rejected": {"duplicate": 1}}],
}


def sample(text: str) -> dict[str, Any]:
    pair = {"question": text, "answer": text, "answer_type": "other"}
    return {"sample_id": "a" * 64, "captions": [{"style": "brief", "text": text}], "qa": [pair]}


def header(card: str) -> dict[str, Any]:
    loaded = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(loaded, dict)
    return loaded


def test_the_header_says_what_the_hub_asks_for() -> None:
    found = header(render_card(MANIFEST, []))
    assert found["license"] == "cc0-1.0"
    assert found["annotations_creators"] == ["machine-generated"]
    assert "synthetic" in found["tags"]
    assert found["size_categories"] == ["n<1K"]
    files = found["configs"][0]["data_files"]
    assert files == [{"split": split, "path": f"{split}-*.parquet"} for split in ("train", "validation")]


def test_counts_prompts_and_the_way_to_load_it_are_there() -> None:
    card = render_card(MANIFEST, [])
    assert 'load_dataset("ORG/NAME", revision="v1.0.0")' in card
    assert "| dedupe (annotations) | 9 | 8 | duplicate: 1 |" in card
    assert "Task: qa" in card


@pytest.mark.parametrize(
    "text", ["a\n---\nlicense: mit", "```\n# Big", "<script>alert(1)</script>", "| a | b |", "\x1b[31m\u202e"]
)
def test_model_text_stays_within_its_line(text: str) -> None:
    card, plain = render_card(MANIFEST, [sample(text)]), render_card(MANIFEST, [sample("x")])
    assert header(card) == header(plain)
    assert len(card.splitlines()) == len(plain.splitlines())
    for mark in ("<", "```", "\x1b", "\u202e"):
        assert mark not in one_line(text)


def test_an_unknown_licence_is_called_other() -> None:
    assert header(render_card(MANIFEST | {"licences": ["unknown"]}, []))["license"] == "other"
