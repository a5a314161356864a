"""Text: vectors in every string that reaches a card or a terminal change nothing but the text."""

import copy
import html.parser
import json
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
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
from tests.pipeline.dataset.test_card import MANIFEST, sample

FULL = MANIFEST | {
    "title": "A title",
    "acknowledged": ["flickr-terms"],
    "review": {"good": 1, "bad": 1, "edited": 1},
    "measured": {
        "captions": {"brief": {"count": 9, "mean_words": 7.5}},
        "answers": {"yes/no": {"count": 9, "most_common": "yes", "share": 0.6}},
        "true_captions": {"brief": {"precision": 0.99, "recall": 0.98}},
        "true_answers": {"number": {"accuracy": 0.9, "majority": 0.4}},
        "words_shared_with_references": {"brief": 0.7},
    },
    "leakage": {
        "compared_as": "photos", "groups_of_images": 7, "near_held_out_annotations": 3, "banned_images": 2, "repeated_texts": 4,
        "never": [{"name": "flickr30k#test", "revision": "abc", "images": 10, "texts": 50, "unread": 1}],
    },
}  # fmt: skip
MODEL = {
    "config": {
        "prompts": [["synthetic", "brief"]], "data": {"source": {"name": "scenes"}, "version": "v1.0.0", "digest": "d" * 64},
    },
    "train": {"encoder": "vit", "decoder": "scratch"},
    "metrics": {
        "parameters": 7, "images": 3, "split": "test", "style": "brief", "against": "references", "scores": {"cider_d": 1.0},
        "shuffled_scores": {"cider_d": 0.5}, "shown": [{"caption": "a", "references": ["b"]}],
    },
    "digest": "d" * 64,
}  # fmt: skip
FIXED = {"tasks", "columns", "features", "files", "rows", "licenses"}  # that a version is not read with otherwise
ALLOWED_TAGS = {
    "h1", "h2", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "code", "pre", "strong", "em", "a", "hr", "br",
}  # fmt: skip


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every string of a JSON value."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in FIXED:
                continue
            yield from strings(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from strings(inner, (*path, index))


def put(value: Any, path: tuple[Any, ...], text: str) -> Any:
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = text
    return changed


class Tags(html.parser.HTMLParser):
    """Collects the tags and addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses |= {value or "" for name, value in attrs if name in ("href", "src")}


def rendered(card: str) -> Tags:
    """Return the tags of a card as a renderer shows it that lets HTML through: the worst that a site may do."""
    body = card.split("---\n", 2)[2]
    tags = Tags()
    tags.feed(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(body))
    return tags


def require_harmless(card: str, plain: str) -> None:
    assert yaml.safe_load(card.split("---\n")[1]).keys() == yaml.safe_load(plain.split("---\n")[1]).keys()
    tags, expected = rendered(card), rendered(plain)
    assert tags.tags <= ALLOWED_TAGS
    assert tags.attributes <= {"href", "class", "style"}
    assert tags.addresses <= expected.addresses
    assert not any(ord(mark) < 32 and mark != "\n" for mark in card.split("---\n", 2)[2])
    card.encode()


DATASET_PATHS = [*strings({name: value for name, value in FULL.items() if name not in FIXED})]


def some_of_all(path: tuple[Any, ...]) -> Sequence[str]:
    """Return the vectors to put at a place of a manifest: all in the long run, else others at each place."""
    return ALL if LONG else random.Random(str(path)).sample(ALL, 16)


@pytest.mark.parametrize("path", DATASET_PATHS, ids=lambda path: ".".join(map(str, path)))
def test_no_string_of_a_manifest_breaks_out_of_its_place_in_the_card(path: tuple[Any, ...]) -> None:
    plain = render_card(FULL, [sample("x")])
    for vector in some_of_all(path):
        require_harmless(render_card(put(FULL, path, vector), [sample("x")]), plain)


@pytest.mark.parametrize("path", [*strings(MODEL)], ids=lambda path: ".".join(map(str, path)))
def test_no_string_of_a_checkpoint_breaks_out_of_its_place_in_the_card(path: tuple[Any, ...]) -> None:
    plain = render_model_card(MODEL, "me/captioner", "me/data")
    for vector in some_of_all(path):
        require_harmless(render_model_card(put(MODEL, path, vector), "me/captioner", "me/data"), plain)


def test_no_text_and_no_key_breaks_out_of_its_place_in_the_card() -> None:
    plain = render_card(FULL, [sample("x")])
    for vector in ALL:
        texts = sample(vector)
        texts["captions"][0]["style"] = vector
        require_harmless(render_card(FULL, [texts]), plain)
        keys = FULL | {
            "prompts": {vector: vector}, "schemas": {vector: {vector: vector}},
            "funnel": [{"stage": vector, "unit": vector, "input": 9, "kept": 8, "rejected": {vector: 1}}],
            "measured": {"captions": {vector: {"count": 9, "mean_words": 7.5}}},
        }  # fmt: skip
        require_harmless(render_card(keys, [sample("x")]), plain)


def test_the_header_of_a_card_is_yaml_whatever_stands_in_it() -> None:
    for vector in ALL:
        values = MANIFEST | {"title": vector, "source": {"name": vector, "revision": vector}, "licenses": [vector]}
        assert yaml.safe_load(yaml.safe_dump(metadata(values), allow_unicode=True)) == metadata(values)


def synth(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_synth(*arguments, cwd=folder, env=os.environ | environment)


def require_printable(done: subprocess.CompletedProcess[str]) -> None:
    for text in (done.stdout, done.stderr):
        assert not [mark for mark in text if (ord(mark) < 32 and mark not in "\n\t") or 0x7F <= ord(mark) <= 0x9F], text
        assert "Traceback" not in text, text
        assert not set(text) & {"\u202e", "\u2066"}


EVIL = "\x1b]52;c;AAAA\x07\x9b31m\u202e"


def test_no_command_sends_a_terminal_what_it_would_obey(tmp_path: Path) -> None:
    name = EVIL.replace("/", "")
    photos = tmp_path / f"photos{name}"
    photos.mkdir()
    for number in range(4):
        image = Image.effect_noise((64, 64), 60 + number).convert("RGB")
        image.save(photos / f"{number}{name}.png")
        (photos / f"{number}{name}.txt").write_text(f"A caption {EVIL}.")
    (photos / f"odd{name}.mp4").write_bytes(b"x")
    (photos / f"broken{name}.png").write_bytes(b"x")
    caption = json.dumps({"caption": f"A grey wall of noise {EVIL} in a small room."})

    def script(times: int, body: dict[str, Any]) -> Act:
        return Act(text=caption)

    source = ("--source", f"folder:{photos.name}", "--tasks", "caption", "--out", f"data{name}")
    with running_chat(ChatServer(script, model=f"model{EVIL}")) as chat:
        server = ("--base-url", chat.url)
        require_printable(synth(tmp_path, "generate", *source, *server, "--language", "any"))
        require_printable(synth(tmp_path, "preview", *source, *server))
        require_printable(synth(tmp_path, "generate", *source, *server, "--dry-run"))
        require_printable(synth(tmp_path, "generate", *source, *server, "--model", "another"))
        chat.script = lambda times, body: Act(status=400, raw=b'{"error":{"message":"no: \\u001b]52;c;AAAA\\u0007"}}')
        require_printable(synth(tmp_path, "generate", *source, *server, "--seed", "7", "--title", "x"))
    for arguments in (
        ("versions", f"data{name}"), ("check", f"data{name}"), ("report", f"data{name}"), ("config", *source),
        ("diff", f"data{name}", "v1.0.0", "v1.0.0"), ("push", f"data{name}", "--repo", "me/x", "--dry-run"),
        ("push", f"data{name}", "--repo", EVIL), ("review", "apply", f"marks{name}", "--data", f"data{name}"),
        ("generate", "--source", f"folder:{EVIL}"), ("generate", "--source", EVIL), ("generate", "--config", EVIL),
        ("train", "--data", f"data{EVIL}"), ("caption", f"data{EVIL}", EVIL), ("evaluate", f"data{EVIL}"), (EVIL,),
        ("generate", f"--{EVIL}"),
    ):  # fmt: skip
        require_printable(synth(tmp_path, *arguments, HF_HUB_OFFLINE="1"))
