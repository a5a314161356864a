"""Tests of the dataset card: its YAML header, and escaped model text."""

from typing import Any

import pyarrow as pa
import pytest
import yaml

from pipeline.dataset.card import metadata, render_card
from pipeline.dataset.content import Content
from pipeline.tables import ROW, TABLE_VERSION, features
from pipeline.text.escape import markdown

MANIFEST: dict[str, Any] = {
    "version": "v1.0.0",
    "parent": None,
    "digest": "d" * 64,
    "table_version": TABLE_VERSION,
    "rejections": {"sha256": "e" * 64, "bytes": 9},
    "source": {"name": "scenes", "revision": "1.0"},
    "model": {"name": "tiny", "revision": "abc"},
    "prompts": {"system/v1": "Be brief.", "caption/v1@123": "Task: caption", "qa/v1@456": "Task: qa"},
    "schemas": {"qa": {"type": "object"}},
    "config": {"tasks": ["caption", "qa"]},
    "licenses": ["cc0-1.0"],
    "columns": ["sample_id", "image"],
    "features": features(pa.schema([ROW.field("sample_id"), ROW.field("image")])),
    "files": {"train-00000.parquet": {"bytes": 900}, "validation-00000.parquet": {"bytes": 100}},
    "measured": {},
    "rows": {"train": 8, "validation": 1, "test": 0},
    "funnel": [
        {"step": "dedupe", "unit": "annotations", "input": 9, "kept": 8, "rejected": {"duplicate": 1}}
    ],
}


def sample(text: str) -> dict[str, Any]:
    pair = {"question": text, "answer": text, "answer_type": "other"}
    return {"sample_id": "a" * 64, "captions": [{"style": "brief", "text": text}], "qa": [pair]}


def header(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_has_fields_of_the_hub_and_loading_example() -> None:
    values = header(render_card(MANIFEST, []))
    assert values["license"] == "cc0-1.0"
    assert "synthetic" in values["tags"]
    files = values["configs"][0]["data_files"]
    assert files == [{"split": split, "path": f"{split}-*.parquet"} for split in ("train", "validation")]
    card = render_card(MANIFEST, [])
    assert 'load_dataset("ORG/NAME", revision="v1.0.0")' in card and "Task: qa" in card
    assert "| dedupe (annotations) | 9 | 8 | duplicate: 1 |" in card


UNENFORCED = {"name": "tiny", "revision": "abc+unenforced"}
LICENSED = MANIFEST["model"] | {"license": "Qwen Research License: no commercial use"}
CONTENT = Content()
for caption in ("A red ring.", "A red ring seems to be in the image.", "A red ring and a blue star."):
    CONTENT.add(caption, "a")
MEASURED = {
    "captions": {"brief": CONTENT.result()},
    "answers": {"yes/no": {"count": 9, "most_common": "yes", "share": 0.6}},
}
LEAKAGE = {
    "compared_as": "photos", "near_bits": 70, "groups_of_images": 7, "near_held_out_annotations": 3,
    "never": [{"name": "flickr30k#test", "revision": "abc", "images": 1000, "unread": 0}], "banned_images": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "texts"),
    [
        ({"model": UNENFORCED}, ["The server was not required to enforce the JSON schema of the task"]),
        ({}, ["The server enforces the JSON schema", "checked automatically only", "| train | 8 |"]),
        ({}, ["- `trip/IMG_1.jpg`", "## Load it"]),
        ({"model": LICENSED}, ["model applies (Qwen Research License: no commercial use)"]),
        (
            {"review": {"good": 5, "bad": 2, "edited": 1}},
            ["**All but 1 texts are mach", "reviewed 8 texts: 5 were good, 2 were removed and 1 were edited"],
        ),
        ({"measured": MEASURED}, ["| brief | 3 | 6.3 (3, 7) | 33.3 % | 0.0 % | 0.0 % | 33.3 % | 100.0 % |"]),
        ({"measured": MEASURED}, ["| yes/no | 9 | yes: 60.0 % |"]),
        ({"leakage": LEAKAGE}, ["7 groups", "flickr30k\\#test, revision `abc`: 1000 images"]),
        ({"leakage": LEAKAGE}, ["2 images of the datasets below were removed", "(within 70 of 256 bits). I"]),
    ],
)
def test_card_states_facts_of_the_manifest(more: dict[str, Any], texts: list[str]) -> None:
    card = render_card(MANIFEST | more, [sample("x") | {"source_row": "trip/IMG_1.jpg"}])
    assert [text for text in texts if text not in card] == []
    assert "automatically only" not in card or "review" not in more


@pytest.mark.parametrize("cost", [{}, {"cost": 0.5}])
def test_rows_of_the_model_ladder_table_have_equal_numbers_of_cells(cost: dict[str, float]) -> None:
    counts = dict.fromkeys(("requests", "prompt_tokens", "reply_tokens", "texts", "kept"), 3)
    rungs = [{"task": "caption", "model": name} | counts | cost for name in ("small", "large")]
    card = render_card(MANIFEST | {"ladder": rungs}, [])
    table = card[card.index("| task | model |") :].split("\n\n")[0].splitlines()
    assert [line.count("|") for line in table] == [8 + len(cost)] * 4, table
    assert table[0].endswith(" cost |" if cost else " passed all checks |")


@pytest.mark.parametrize(
    "text", ["a\n---\nlicense: mit", "```\n# Big", "<script>alert(1)</script>", "\x1b[31m\u202e"]
)
def test_model_text_in_card_is_escaped_and_adds_no_lines(text: str) -> None:
    card, plain = render_card(MANIFEST, [sample(text)]), render_card(MANIFEST, [sample("x")])
    assert header(card) == header(plain)
    assert len(card.splitlines()) == len(plain.splitlines())
    for mark in ("<", "```", "\x1b", "\u202e"):
        assert mark not in str(markdown(text))


def test_license_unknown_to_the_hub_becomes_other_with_name_and_link() -> None:
    unknown = header(render_card(MANIFEST | {"licenses": ["flickr-terms", "unknown"]}, []))
    assert (unknown["license"], unknown["license_name"]) == ("other", "flickr-terms-and-unknown")
    values = metadata(MANIFEST | {"licenses": ["Shop terms"], "license_link": "https://example.org/terms"})
    assert (values["license_name"], values["license_link"]) == ("shop-terms", "https://example.org/terms")
    known = metadata(MANIFEST | {"licenses": ["cc-by-4.0"], "license_link": "https://example.org/terms"})
    assert known["license"] == "cc-by-4.0" and "license_link" not in known  # the Hub adds the link
