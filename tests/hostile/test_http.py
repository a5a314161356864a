"""HTTP: whatever a model server sends, the run ends in bounded memory, with a reply to every request or one error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.errors import EngineError
from pipeline.inference import client, endpoints, probing, retry
from pipeline.inference.client import Client
from pipeline.inference.journal import Journal
from pipeline.inference.probing import find_model
from pipeline.inference.queue import RequestStats, ask_about, read_annotations
from pipeline.types import SampleInfo
from tests.hostile import bounded_memory, part_of
from tests.hostile.http import BODIES, Send, chat_answer, response, running_raw, well_behaved
from tests.scene_data import batch_of, scene_samples

SAMPLES = scene_samples(2)
MEMORY_BYTES = 100_000_000
JOURNAL_BYTES = 2_000_000


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(retry, "LONGEST_BACKOFF_SECONDS", 0.05)
    for module in (client, endpoints):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(probing, "MODELS_SECONDS", 2.0)


def ask(folder: Path, url: str, **server: Any) -> list[str | None]:
    """Ask for a caption of two images; return the errors of their replies. The journal stays small."""
    settings = {"request_timeout_s": 2, "startup_timeout_s": 2, **server}
    config = resolve(
        source="scenes", base_url=[url], tasks=["caption"], generate={"caption_styles": ["brief"]}, server=settings
    )
    chunk = batch_of(SAMPLES)
    path = folder / "journal" / "local.sqlite"
    with Journal(path) as journal:
        with Client("model", "r", config) as engine:
            for _ in ask_about(iter([chunk]), config, "r", lambda: engine, journal, RequestStats()):
                pass
        (table,) = read_annotations([[SampleInfo(sample.id, 1) for sample in SAMPLES]], config, "r", journal)
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < JOURNAL_BYTES
    return list(table["reply_error"].to_pylist())


@pytest.mark.parametrize("name", BODIES)
def test_a_response_that_is_no_answer_costs_its_own_request_alone(name: str, tmp_path: Path) -> None:
    first: list[bytes] = []

    def script(path: str, body: bytes, send: Send) -> None:
        if path.endswith("/chat/completions") and b"synth-7f3a" not in body:
            image = body[body.index(b"base64") :][:2000]
            first.extend([] if first else [image])
            if image == first[0]:
                BODIES[name](send)
                return
        well_behaved(path, body, send)

    with running_raw(script) as server, bounded_memory(MEMORY_BYTES):
        errors = ask(tmp_path, server.url)
    assert errors in ([None, "server_error"], ["server_error", None])


@pytest.mark.parametrize("name", part_of(list(BODIES), 12))
def test_a_list_of_models_that_is_none_is_one_error(name: str) -> None:
    def script(path: str, body: bytes, send: Send) -> None:
        BODIES[name](send)

    with running_raw(script) as server, bounded_memory(MEMORY_BYTES), pytest.raises(EngineError):
        find_model(resolve(source="scenes", base_url=[server.url]))


@pytest.mark.parametrize("name", part_of(list(BODIES), 12))
def test_a_probe_that_is_answered_by_nonsense_is_one_error(name: str, tmp_path: Path) -> None:
    def script(path: str, body: bytes, send: Send) -> None:
        (BODIES[name] if b"synth-7f3a" in body else lambda send: well_behaved(path, body, send))(send)

    with running_raw(script) as server, bounded_memory(MEMORY_BYTES), pytest.raises(EngineError):
        ask(tmp_path, server.url)


@pytest.mark.parametrize("name", part_of(list(BODIES), 12))
def test_metrics_that_are_nonsense_stop_nothing(name: str, tmp_path: Path) -> None:
    def script(path: str, body: bytes, send: Send) -> None:
        (BODIES[name] if path == "/metrics" else lambda send: well_behaved(path, body, send))(send)

    with running_raw(script) as server, bounded_memory(MEMORY_BYTES):
        assert ask(tmp_path, server.url) == [None, None]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize("where", ["/v1/models", "/v1/chat/completions", "the second request"])
def test_no_redirect_is_followed_and_no_image_goes_elsewhere(status: str, where: str, tmp_path: Path) -> None:
    with running_raw(well_behaved) as stranger:
        elsewhere = response(b"", status, f"Location: {stranger.url}/chat/completions\r\n")

        def script(path: str, body: bytes, send: Send) -> None:
            is_image = b"base64" in body
            if path == where or (where == "the second request" and is_image):
                send(elsewhere)
            else:
                well_behaved(path, body, send)

        with running_raw(script) as server, pytest.raises(EngineError, match="sends requests on to"):
            find_model(resolve(source="scenes", base_url=[server.url]))
            ask(tmp_path, server.url)
        assert stranger.requests == []


@pytest.mark.parametrize("seconds", ["9" * 30, "-1", "nan", "1e999", "²", "Wed, 21 Oct 2099 07:28:00 GMT", "", "\x1b]52;"])
def test_an_odd_retry_after_is_no_long_sleep(seconds: str, tmp_path: Path) -> None:
    came: list[int] = []

    def script(path: str, body: bytes, send: Send) -> None:
        if b"base64" in body and not came:
            came.append(1)
            head = b"Retry-After: " + seconds.encode("latin-1", "replace") + b"\r\n"
            send(b"HTTP/1.1 429 Busy\r\n" + head + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            well_behaved(path, body, send)

    with running_raw(script) as server:
        assert ask(tmp_path, server.url) == [None, None]


def test_a_drip_of_bytes_ends_at_the_time_for_one_reply(tmp_path: Path) -> None:
    def script(path: str, body: bytes, send: Send) -> None:
        if b"base64" in body:
            endless_drip(send)
        else:
            well_behaved(path, body, send)

    with running_raw(script) as server:
        assert ask(tmp_path, server.url, request_timeout_s=0.3) == ["server_error", "server_error"]


def endless_drip(send: Send) -> None:
    send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        send(b" ")


@pytest.mark.parametrize(
    "text",
    [
        "x" * 700_000,
        "\u00e9" * 200_000,
        '{"caption":"' + "a" * 100_000 + '"}',
        "\ud800" * 1000,
        "\0" * 1000,
        "\x1b]52;c;AAAA\x07",
    ],
    ids=["long", "accents", "caption", "surrogates", "zeros", "escape"],
)
def test_a_text_longer_than_its_tokens_is_cut_before_it_is_kept(text: str, tmp_path: Path) -> None:
    def script(path: str, body: bytes, send: Send) -> None:
        if b"base64" in body:
            send(response(chat_answer(text)))
        else:
            well_behaved(path, body, send)

    with running_raw(script) as server:
        errors = ask(tmp_path, server.url)
    assert all(error in ("cut_short", "not_json", "server_error") for error in errors)


USAGES: list[Callable[[], Any]] = [
    lambda: 10**24, lambda: "abc", lambda: [1], lambda: {}, lambda: None, lambda: 1e308, lambda: -5, lambda: True,
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(USAGES)))
def test_an_odd_usage_costs_no_reply(number: int, tmp_path: Path) -> None:
    def script(path: str, body: bytes, send: Send) -> None:
        if b"base64" in body:
            usage = {"prompt_tokens": USAGES[number](), "completion_tokens": USAGES[number]()}
            send(response(chat_answer('{"caption":"A small red ring on a white background."}', usage=usage)))
        else:
            well_behaved(path, body, send)

    with running_raw(script) as server:
        assert ask(tmp_path, server.url) == [None, None]
