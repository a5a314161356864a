"""Hostile requests to the caption server get an error status, and do not stop the server."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.trainer.test_captioner import save_captioner
from tests.trainer.test_server import BAD, NAME, chat, png, running
from trainer import Captioner, server
from trainer.server import CaptionServer

Address = tuple[str, int]
CHAT, MODELS = "POST /v1/chat/completions", "GET /v1/models"
JSON = {"Content-Type": "application/json"}
BOMB = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xff\xff\x00\xff\xff\xff\x00\x08\x02\x00\x00\x00"
IMAGES = {"empty": b"", "bomb": BOMB, "cut off": png(1)[:60]}
REQUESTS = {  # name: (request line, headers, body, status)
    "another host": (MODELS, {"Host": "evil.example"}, b"", 403),
    "name that contains localhost": (MODELS, {"Host": "localhost.evil.example"}, b"", 403),
    "no host": (MODELS, {"Host": ""}, b"", 403),
    "post of another page": (CHAT, JSON | {"Origin": "https://evil.example"}, b"{}", 403),
    "read of another port": (MODELS, {"Origin": "http://localhost:1"}, b"", 403),
    "form": (CHAT, {"Content-Type": "application/x-www-form-urlencoded"}, b"{}", 415),
    "gzip": (CHAT, JSON | {"Content-Encoding": "gzip"}, b"{}", 400),
    "millions of values": (CHAT, JSON, b"[" + b"[]," * 2_000_000 + b"[]]", 400),
    "unknown path": ("GET /v1/nothing", {}, b"", 404),
    "path of a file": ("GET /../../etc/passwd", {}, b"", 404),
    "other method": ("GET /v1/chat/completions", {}, b"", 405),
    "headers without end": (MODELS, {"X": "x" * 1_000_000}, b"", 400),
    "negative length": (CHAT, JSON | {"Content-Length": "-1"}, b"", 400),
    "no HTTP": ("SSH-2.0-OpenSSH_9.6\r\n", {}, b"", 400),
    **{
        f"image: {name}": (CHAT, JSON, json.dumps(chat(image)).encode(), 400)
        for name, image in IMAGES.items()
    },
    # Only these bad bodies could crash a server.
    **{
        f"body: {name}": (CHAT, JSON, BAD[name], 400)
        for name in ("deep", "not UTF-8", "half of a surrogate", "an address")
    },
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    folder: Path = save_captioner(tmp_path_factory.mktemp("models") / "c")
    with running(CaptionServer(Captioner.from_pretrained(folder, device="cpu"), NAME)) as url:
        yield "127.0.0.1", int(url.rpartition(":")[2])


def send(address: Address, line: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, bytes]:
    """Return status and body of a response. The status is 0 if the connection ends without a response."""
    given = {"Host": "localhost", "Content-Length": str(len(body)), "Connection": "close"} | headers
    head = f"{line} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in given.items()) + "\r\n"
    with socket.create_connection(address, timeout=60) as client:
        sending = threading.Thread(target=_send_all, args=(client, head.encode() + body))
        sending.start()
        answer = bytearray()
        with suppress(ConnectionError):
            while part := client.recv(65536):
                answer += part
        sending.join()
    status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1") else 0
    return status, bytes(answer).partition(b"\r\n\r\n")[2]


def _send_all(client: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # the server has closed the connection
        client.sendall(data)


@pytest.mark.parametrize("name", REQUESTS)
def test_hostile_request_is_refused_and_the_next_request_is_answered(name: str, address: Address) -> None:
    line, headers, body, expected = REQUESTS[name]
    status, answer = send(address, line, headers, body)
    assert status == expected
    if body:
        assert json.loads(answer)["error"]["message"]
    assert send(address, MODELS, {})[0] == 200


def test_request_from_the_page_of_the_server_is_accepted(address: Address) -> None:
    own = f"localhost:{address[1]}"
    assert send(address, MODELS, {"Host": own, "Origin": f"http://{own}"})[0] == 200


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_large_body_is_refused(address: Address, monkeypatch: pytest.MonkeyPatch, *, declared: bool) -> None:
    monkeypatch.setattr(server, "MAX_BODY_BYTES", 100_000)
    body = b"[" * 200_000
    if declared:
        assert send(address, CHAT, JSON, body)[0] == 413
    else:
        chunked = JSON | {"Transfer-Encoding": "chunked"}
        head = "".join(f"{key}: {value}\r\n" for key, value in (chunked | {"Host": "localhost"}).items())
        with socket.create_connection(address, timeout=60) as client:
            _send_all(client, f"{CHAT} HTTP/1.1\r\n{head}\r\n{len(body):x}\r\n".encode() + body)
            assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_slow_body_is_refused(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_TIMEOUT_S", 0.2)
    status, answer = send(address, CHAT, JSON | {"Content-Length": "200"}, b'{"model": ')
    assert status == 408 and b"did not arrive" in answer


def test_half_sent_headers_do_not_block_the_server(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)
    whole = f"{MODELS} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    clients = [socket.create_connection(address, timeout=20) for _ in range(20)]
    for number, client in enumerate(clients):
        _send_all(client, (whole if number == 0 else b"") + whole[:-9])
    for client in clients:  # wait until all are closed
        with suppress(ConnectionError):
            while client.recv(65536):
                pass
        client.close()
    assert send(address, MODELS, {})[0] == 200
