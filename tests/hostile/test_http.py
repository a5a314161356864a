"""With any response of a model server, a run ends with all replies or with one error."""

import contextlib
import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.errors import EngineError
from pipeline.inference import endpoints, probing, protocol
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats, ask_in_rounds, read_annotations
from pipeline.steps.validate import validate_annotations
from pipeline.types import SampleInfo
from tests.clients import client_of, model_of
from tests.hostile import bounded_memory, part_of
from tests.plans import request_plan
from tests.scene_data import batch_of, scene_samples

SAMPLES = scene_samples(2)
MEMORY_BYTES = 100_000_000
JOURNAL_BYTES = 2_000_000
MODELS = json.dumps({"data": [{"id": "model", "max_model_len": 4096}]}).encode()
CLOSE = b"Connection: close\r\n\r\n"
CAPTION = '{"caption":"A small red ring on a white background."}'

Send = Callable[[bytes], None]
Script = Callable[[str, bytes, Send], None]
# A tuple has the head of a response, and a part that is repeated without end.
Body = bytes | tuple[bytes, bytes] | Callable[[], bytes]


@dataclass
class RawServer:
    """A server whose `script` writes any bytes to the socket. Each connection has one request."""

    script: Script
    url: str = ""
    requests: list[str] = field(default_factory=list)  # paths

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError, IndexError):
            reader = connection.makefile("rb")
            path, size = reader.readline().split()[1].decode(), 0
            while line := reader.readline().strip().lower():
                size = int(line[15:]) if line.startswith(b"content-length:") else size
            body = reader.read(size)
            self.requests.append(path)
            self.script(path, body, connection.sendall)


@contextmanager
def running_raw(script: Script) -> Iterator[RawServer]:
    """Run a scripted server. Its address ends in /v1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = RawServer(script, f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        threading.Thread(target=server.serve, args=(listener,), daemon=True).start()
        yield server
        listener.shutdown(socket.SHUT_RDWR)


def response(body: bytes, status: str = "200 OK", header: str = "Content-Type: application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\n{header}\r\nContent-Length: {len(body)}\r\n".encode()
    return head + CLOSE + body


def chat_answer(text: str, **more: object) -> bytes:
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": 7}
    return response(json.dumps({"choices": [choice], "usage": usage, **more}).encode())


def is_probe(body: bytes) -> bool:
    return b"synth-7f3a" in body


def well_behaved(path: str, body: bytes, send: Send) -> None:
    """Answer every request correctly, including the probe."""
    if path.endswith("/models"):
        send(response(MODELS))
    elif path.endswith("/chat/completions"):
        send(chat_answer('{"word":"synth-7f3a"}' if is_probe(body) else CAPTION))
    else:
        send(response(b""))


def answering_images(answer: Callable[[Send], object]) -> Script:
    """Return a script that calls `answer` for requests with an image, and behaves well otherwise."""
    return lambda path, body, send: answer(send) if b"base64" in body else well_behaved(path, body, send)  # type: ignore[return-value]


@cache
def bomb(wbits: int = 31) -> bytes:
    """Return 128 MB of zeros, compressed as gzip, or as zlib if `wbits` is 15."""
    out = zlib.compressobj(9, wbits=wbits)
    return b"".join([*(out.compress(bytes(1 << 20)) for _ in range(128)), out.flush()])


def encoded(name: str, body: bytes, status: str = "200 OK") -> bytes:
    return response(body, status, f"Content-Encoding: {name}")


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED, GZIP = OK + b"Transfer-Encoding: chunked\r\n", OK + b"Content-Encoding: gzip\r\n"
ZEROS = bytes(1 << 16)
BODIES: dict[str, Body] = {
    "endless body without a length": (OK + CLOSE, ZEROS),
    "endless body with a length": (OK + b"Content-Length: 99999999999\r\n" + CLOSE, ZEROS),
    "endless chunks": (CHUNKED + CLOSE, b"10000\r\n" + ZEROS + b"\r\n"),
    "endless chunk": (CHUNKED + CLOSE + b"FFFFFFFFFF\r\n", ZEROS),
    "endless JSON": (OK + CLOSE + b'{"choices":[', b'{"message":1},' * 4096),
    "endless error": (b"HTTP/1.1 500 Oh\r\n" + CLOSE, ZEROS),
    "endless headers": (OK, b"X-Header: value\r\n" * 4096),
    "endless header": (OK + b"X: ", b"x" * 65536),
    "endless status line": (b"HTTP/1.1 200 ", b"O" * 65536),
    "endless 100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 64),
    "gzip bomb": lambda: encoded("gzip", bomb()),
    "gzip bomb in an error": lambda: encoded("gzip", bomb(), "500 Oh"),
    "deflate bomb": lambda: encoded("deflate", bomb(15)),
    "gzip with an endless tail": (GZIP + CLOSE + gzip.compress(b"{}"), ZEROS),
    "deflate of endless empty blocks": (
        OK + b"Content-Encoding: deflate\r\n" + CLOSE + b"\x78\x9c", b"\x00\x00\x00\xff\xff" * 8192,
    ),
    "plain text as gzip": encoded("gzip", b"plain"),
    "truncated gzip": encoded("gzip", gzip.compress(b"x" * 9999)[:40]),
    "unknown encoding": encoded("br, zstd, dreams", b"x"),
    "not HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "nothing": b"",
    "status of letters": b"HTTP/1.1 abc OK\r\n\r\n",
    "status 999": response(b"{}", "999 Oh"),
    "status 204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "negative length": OK + b"Content-Length: -1\r\n\r\nx",
    "length and chunks": OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "truncated chunk": CHUNKED + b"\r\nff\r\nx",
    "truncated body": OK + b"Content-Length: 100\r\n\r\n{}",
    "control bytes in headers": OK + b"X: \x00\x1b[31m\r\nContent-Length: 0\r\n\r\n",
    "JSON 100,000 deep": response(b"[" * 100_000 + b"]" * 100_000),
    "JSON number of a million digits": response(b"9" * 1_000_000),
    "null": response(b"null"),
    "HTML page": response(b"<html>please log in</html>"),
    "choices that are a text": response(b'{"choices":"none","data":"none"}'),
    "message that is a list": response(b'{"choices":[{"message":[],"finish_reason":"stop"}],"data":[[]]}'),
    "bytes that are not UTF-8": response(bytes(range(128, 256)) * 10),
}  # fmt: skip


def send_body(name: str, send: Send) -> None:
    body = BODIES[name]
    if isinstance(body, tuple):
        send(body[0])
        while True:  # until the client closes the connection
            send(body[1])
            time.sleep(0.005 if len(body[1]) < 5000 else 0)
    send(body() if callable(body) else body)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(protocol, "LONGEST_BACKOFF_SECONDS", 0.05)
    monkeypatch.setattr(endpoints, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(probing, "MODELS_SECONDS", 1.0)


def ask(folder: Path, script: Script, **server: Any) -> list[str | None]:
    """Request captions of two images in bounded memory, and return their rejection reasons."""
    with running_raw(script) as running, bounded_memory(MEMORY_BYTES):
        config = resolve(
            source="scenes", base_url=[running.url], tasks=["caption"],
            generate={"caption_styles": ["brief"]},
            server={"request_timeout_s": 1, "startup_timeout_s": 2, **server},
        )  # fmt: skip
        plan, path = request_plan(config), folder / "journal" / "local.sqlite"
        with Journal(path) as journal:
            with client_of(config) as engine:
                batches = lambda: iter([batch_of(SAMPLES)])  # noqa: E731
                asked = (batches, plan, config.servers, lambda _: engine, journal, RequestStats())
                for _ in ask_in_rounds(*asked):
                    pass
            images = [SampleInfo(sample.id, 1) for sample in SAMPLES]
            (table,) = read_annotations([images], plan, journal)
        assert sum(file.stat().st_size for file in path.parent.iterdir()) < JOURNAL_BYTES
        return list(validate_annotations(table)["reason"].to_pylist())


@pytest.mark.parametrize("name", BODIES)
def test_invalid_response_fails_only_its_own_request(name: str, tmp_path: Path) -> None:
    first: list[bytes] = []

    def script(path: str, body: bytes, send: Send) -> None:
        if path.endswith("/chat/completions") and not is_probe(body):
            image = body[body.index(b"base64") :][:2000]
            first.extend([] if first else [image])
            if image == first[0]:
                return send_body(name, send)
        return well_behaved(path, body, send)

    assert sorted(map(str, ask(tmp_path, script))) == ["None", "server_error"]


@pytest.mark.parametrize("name", part_of(list(BODIES), 6))
def test_invalid_response_to_a_model_list_or_probe_raises_a_single_error(name: str, tmp_path: Path) -> None:
    def script_for(is_bad: Callable[[str, bytes], bool]) -> Script:
        def script(path: str, body: bytes, send: Send) -> None:
            send_body(name, send) if is_bad(path, body) else well_behaved(path, body, send)

        return script

    listing = script_for(lambda path, body: path.endswith("/models"))
    with running_raw(listing) as server, bounded_memory(MEMORY_BYTES), pytest.raises(EngineError):
        model_of(resolve(source="scenes", base_url=[server.url]))
    with pytest.raises(EngineError):
        ask(tmp_path, script_for(lambda path, body: is_probe(body)))


@pytest.mark.parametrize("status", ["302 Found", "307 Temporary"])
@pytest.mark.parametrize("where", ["/v1/models", "/v1/chat/completions", "the second request"])
def test_redirect_is_not_followed(status: str, where: str, tmp_path: Path) -> None:
    with running_raw(well_behaved) as stranger:
        elsewhere = response(b"", status, f"Location: {stranger.url}/chat/completions")

        def script(path: str, body: bytes, send: Send) -> None:
            if path == where or (where == "the second request" and b"base64" in body):
                send(elsewhere)
            else:
                well_behaved(path, body, send)

        with pytest.raises(EngineError, match="redirects requests to"):
            if where == "/v1/models":
                with running_raw(script) as server:
                    model_of(resolve(source="scenes", base_url=[server.url]))
            ask(tmp_path, script)
        assert stranger.requests == []


@pytest.mark.parametrize("seconds", ["9" * 30, "-1", "nan", "²", "Wed, 21 Oct 2099 07:28:00 GMT", ""])
def test_invalid_retry_after_causes_no_long_sleep(seconds: str, tmp_path: Path) -> None:
    header = f"Retry-After: {seconds}\r\n".encode("latin-1")
    answers = [b"HTTP/1.1 429 Busy\r\n" + header + b"Content-Length: 0\r\n" + CLOSE]
    script = answering_images(lambda send: send(answers.pop() if answers else chat_answer(CAPTION)))
    assert ask(tmp_path, script) == [None, None]
    assert answers == []


def test_slow_response_ends_at_request_timeout(tmp_path: Path) -> None:
    def drip(send: Send) -> None:
        send(OK + CLOSE)
        while True:
            send(b" ")
            time.sleep(0.001)

    assert ask(tmp_path, answering_images(drip), request_timeout_s=0.3) == ["server_error", "server_error"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * 700_000, "cut_short"), (f'{{"caption":"{"a" * 100_000}"}}', "cut_short"),
        ("\0" * 1000, "caption_string_pattern_mismatch"),
        ("\x1b]52;c;AAAA\x07", "caption_string_pattern_mismatch"),
    ],
)  # fmt: skip
def test_long_or_unprintable_reply_is_rejected(text: str, reason: str, tmp_path: Path) -> None:
    script = answering_images(lambda send: send(chat_answer(text)))
    assert ask(tmp_path, script) == [reason] * len(SAMPLES)
