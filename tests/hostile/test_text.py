"""Text: attacks in strings of a card or a terminal stay text."""

import copy
import html.parser
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from pipeline.dataset.card import metadata, render_card, render_model_card
from tests.chat.server import Act, ChatServer, running_chat
from tests.commands import run_synth
from tests.hostile import LONG
from tests.hostile.vectors import ALL
from tests.pipeline.dataset.test_card import LEAKAGE, MANIFEST, MEASURED, sample
from tests.pipeline.hub.test_package import captioner_of

FULL = MANIFEST | {
    "title": "A title",
    "acknowledged": ["flickr-terms"],
    "review": {"good": 1, "bad": 1, "edited": 1},
    "measured": MEASURED,
    "leakage": LEAKAGE,
    "models": {"small": {"name": "m", "revision": "r", "license": "x"}},
    "ladder": [
        {"task": "caption", "model": "small"}
        | dict.fromkeys(("requests", "prompt_tokens", "reply_tokens", "texts", "kept"), 1)
    ],
    "price": [{"texts": "captions", "kept": 1, "requests": 1, "prompt_tokens": 1, "reply_tokens": 1}],
}  # fmt: skip
MODEL = captioner_of({"source": {"name": "scenes"}, "version": "v1.0.0", "digest": "d" * 64})
MODEL["digest"] = "d" * 64
# These fields are not attacked, because versions with invalid values in them are refused.
FIXED = {"tasks", "columns", "features", "files", "rows", "licenses"}
ALLOWED_TAGS = {
    "h1", "h2", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "strong", "em",
    "details", "summary", "a", "hr", "br",
}  # fmt: skip


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every string of a JSON value."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in FIXED:
                yield from strings(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], text: str) -> Any:
    """Return a copy of a JSON value with another text at a path."""
    changed = copy.deepcopy(value)
    *parents, last = path
    reduce(getitem, parents, changed)[last] = text
    return changed


@cache
def header_keys(card: str) -> set[str]:
    return set(yaml.safe_load(card.split("---\n")[1]))


class Tags(html.parser.HTMLParser):
    """Collects tags, attributes and addresses of a card that is rendered with HTML enabled."""

    def __init__(self, card: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: set[str] = set()
        self.feed(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(card.split("---\n", 2)[2]))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses |= {value or "" for name, value in attrs if name in ("href", "src")}


@cache
def addresses_in(card: str) -> set[str]:
    return Tags(card).addresses


def require_harmless(card: str, plain: str) -> None:
    assert header_keys(card) == header_keys(plain)
    tags = Tags(card)
    assert tags.tags <= ALLOWED_TAGS
    assert card.count("<details>") == plain.count("<details>")
    assert tags.attributes <= {"href", "class", "style"}
    assert tags.addresses <= addresses_in(plain)
    assert not any(ord(mark) < 32 and mark != "\n" for mark in card.split("---\n", 2)[2])
    card.encode()


CARDS: dict[str, tuple[dict[str, Any], Callable[[Any], str]]] = {
    "dataset": (FULL, lambda values: render_card(values, [sample("x")])),
    "captioner": (MODEL, lambda values: render_model_card(values, "me/captioner", "me/data")),
}
PLACES = [(kind, path) for kind, (values, _) in CARDS.items() for path in strings(values)]


@pytest.mark.parametrize(
    ("kind", "path"), PLACES, ids=lambda part: part if isinstance(part, str) else ".".join(map(str, part))
)
def test_strings_from_a_manifest_are_escaped_in_the_card(kind: str, path: tuple[Any, ...]) -> None:
    values, render = CARDS[kind]
    plain = render(values)
    for vector in ALL if LONG else random.Random(str(path)).sample(ALL, 4):
        require_harmless(render(put(values, path, vector)), plain)


def test_texts_and_keys_are_escaped_in_the_card() -> None:
    plain = render_card(FULL, [sample("x")])
    for vector in ALL:
        texts = sample(vector)
        texts["captions"][0]["style"] = vector
        keys = FULL | {
            "prompts": {vector: vector}, "schemas": {vector: {vector: vector}},
            "funnel": [{"step": vector, "unit": vector, "input": 9, "kept": 8, "rejected": {vector: 1}}],
            "measured": {"captions": {vector: MEASURED["captions"]["brief"]}},
        }  # fmt: skip
        require_harmless(render_card(keys, [texts]), plain)
        names = {"name": vector, "revision": vector}
        values = MANIFEST | {"title": vector, "source": names, "licenses": [vector]}
        assert yaml.safe_load(yaml.safe_dump(metadata(values), allow_unicode=True)) == metadata(values)


EVIL = "\x1b]52;c;AAAA\x07\x9b31m\u202e"


def test_commands_escape_control_characters_for_terminal(tmp_path: Path) -> None:
    def require_printable(*arguments: str) -> None:
        done = run_synth(*arguments, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        for text in (done.stdout, done.stderr):
            assert not re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), text
            assert "Traceback" not in text, text
            assert not set(text) & {"\u202e", "\u2066"}

    photos, data = tmp_path / f"photos{EVIL}", f"data{EVIL}"
    photos.mkdir()
    for number in range(4):
        Image.effect_noise((64, 64), 60 + number).convert("RGB").save(photos / f"{number}{EVIL}.png")
        (photos / f"{number}{EVIL}.txt").write_text(f"A caption {EVIL}.")
    (photos / f"odd{EVIL}.mp4").write_bytes(b"x")
    (photos / f"broken{EVIL}.png").write_bytes(b"x")
    caption = json.dumps({"caption": f"A grey wall of noise {EVIL} in a small room."})
    with running_chat(ChatServer(lambda times, body: Act(text=caption), model=f"model{EVIL}")) as chat:
        server = ("--tasks", "caption", "--out", data, "--base-url", chat.url)
        source = ("--source", f"folder:{photos.name}", *server)
        require_printable("generate", *source, "--language", "any")
        require_printable("preview", *source)
        require_printable("estimate", *source)
        require_printable("generate", *source, "--model", "another")
        refusal = Act(status=400, raw=b'{"error":{"message":"no: \\u001b]52;c;AAAA\\u0007"}}')
        chat.script = lambda times, body: refusal
        require_printable("generate", *source, "--seed", "7", "--title", "x")
    for arguments in (
        ("versions", "list", data), ("check", data), ("report", data),
        ("push", data, "--repo", "me/x", "--dry-run"), ("push", data, "--repo", EVIL),
        ("review", "apply", data, f"reviews{EVIL}"), ("generate", "--source", EVIL),
        ("generate", "--config", EVIL),
        ("train", f"data{EVIL}x"), ("caption", data, EVIL), ("evaluate", data), (EVIL,),
        ("generate", f"--{EVIL}"),
    ):  # fmt: skip
        require_printable(*arguments)
