"""A server on loopback that answers with any bytes at all: what no web framework would send."""

import contextlib
import gzip
import json
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

Send = Callable[[bytes], None]
Script = Callable[[str, bytes, Send], None]  # (path, body of the request, send)


@dataclass
class RawServer:
    """A server whose `script` writes whole responses to the socket; each connection has one request."""

    script: Script
    url: str = ""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # path, headers

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
            path = reader.readline().split()[1].decode()
            headers: dict[str, str] = {}
            while line := reader.readline().strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            body = reader.read(int(headers.get("content-length", 0)))
            self.requests.append((path, headers))
            self.script(path, body, connection.sendall)


@contextmanager
def running_raw(script: Script) -> Iterator[RawServer]:
    """Run a server with a script; its address ends in /v1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = RawServer(script, f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        threading.Thread(target=server.serve, args=(listener,), daemon=True).start()
        yield server
        listener.shutdown(socket.SHUT_RDWR)


def response(body: bytes, status: str = "200 OK", headers: str = "Content-Type: application/json\r\n") -> bytes:
    """Return a proper response that closes its connection."""
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def chat_answer(text: str, **more: object) -> bytes:
    """Return the body of a good answer of the chat protocol."""
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 7}, **more}).encode()


MODELS = json.dumps({"data": [{"id": "model", "max_model_len": 4096}]}).encode()
CAPTION = '{"caption":"A small red ring on a white background."}'


def well_behaved(path: str, body: bytes, send: Send) -> None:
    """Answer as a good server does, the probe included."""
    if path.endswith("/models"):
        send(response(MODELS))
    elif b"synth-7f3a" in body:
        send(response(chat_answer('{"word":"synth-7f3a"}')))
    elif path.endswith("/chat/completions"):
        send(response(chat_answer(CAPTION)))
    else:
        send(response(b""))


@cache
def bomb(inflated_bytes: int) -> bytes:
    """Return gzip of so many zeros: about a thousandth of them."""
    out = zlib.compressobj(9, wbits=31)
    parts = [out.compress(bytes(1 << 20)) for _ in range(inflated_bytes >> 20)]
    return b"".join([*parts, out.flush()])


def endless(send: Send, head: bytes, chunk: bytes = bytes(1 << 16)) -> None:
    """Send without end, until the client closes."""
    send(head)
    while True:
        send(chunk)


CLOSE = "Connection: close\r\n\r\n"
BODIES: dict[str, Callable[[Send], None]] = {  # responses that are no answer
    "endless, without a length": lambda send: endless(send, f"HTTP/1.1 200 OK\r\n{CLOSE}".encode()),
    "endless, with a length": lambda send: endless(send, f"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n{CLOSE}".encode()),
    "endless chunks": lambda send: endless(
        send, f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{CLOSE}".encode(), b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    ),
    "one endless chunk": lambda send: endless(
        send, f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{CLOSE}FFFFFFFFFF\r\n".encode()
    ),
    "endless JSON": lambda send: endless(
        send, f"HTTP/1.1 200 OK\r\n{CLOSE}".encode() + b'{"choices":[', b'{"message":1},' * 4096
    ),
    "endless error": lambda send: endless(send, f"HTTP/1.1 500 Oh\r\n{CLOSE}".encode(), b"x" * 65536),
    "gzip bomb": lambda send: send(response(bomb(1 << 28), headers="Content-Encoding: gzip\r\n")),
    "gzip bomb as an error": lambda send: send(response(bomb(1 << 28), "500 Oh", "Content-Encoding: gzip\r\n")),
    "deflate bomb": lambda send: send(response(zlib.compress(bytes(1 << 28), 9), headers="Content-Encoding: deflate\r\n")),
    "bomb within a bomb": lambda send: send(response(gzip.compress(bomb(1 << 28)), headers="Content-Encoding: gzip\r\n")),
    "gzip with an endless tail": lambda send: endless(
        send, f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n{CLOSE}".encode() + gzip.compress(b"{}")
    ),
    "gzip of empty blocks without end": lambda send: endless(
        send, f"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\n{CLOSE}".encode() + b"\x78\x9c", b"\x00\x00\x00\xff\xff" * 8192
    ),
    "gzip that is none": lambda send: send(response(b"plain", headers="Content-Encoding: gzip\r\n")),
    "gzip cut off": lambda send: send(response(gzip.compress(b"x" * 9999)[:40], headers="Content-Encoding: gzip\r\n")),
    "an encoding of our dreams": lambda send: send(response(b"x", headers="Content-Encoding: br, zstd, dreams\r\n")),
    "an encoding of a megabyte": lambda send: send(response(b"x", headers="Content-Encoding: " + "x" * 1_000_000 + "\r\n")),
    "endless headers": lambda send: endless(send, b"HTTP/1.1 200 OK\r\n", b"X-Header: value\r\n" * 4096),
    "one endless header": lambda send: endless(send, b"HTTP/1.1 200 OK\r\nX: ", b"x" * 65536),
    "an endless status line": lambda send: endless(send, b"HTTP/1.1 200 ", b"O" * 65536),
    "endless 100 Continue": lambda send: endless(send, b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2048),
    "no HTTP": lambda send: send(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "nothing": lambda send: None,
    "half a status line": lambda send: send(b"HTTP/1."),
    "a status that is none": lambda send: send(b"HTTP/1.1 abc OK\r\n\r\n"),
    "status 999": lambda send: send(response(b"{}", "999 Oh")),
    "status 0": lambda send: send(response(b"{}", "000 Oh")),
    "status 204": lambda send: send(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "a negative length": lambda send: send(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nx"),
    "a length of words": lambda send: send(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nx"),
    "a length of a thousand digits": lambda send: send(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 1000 + b"\r\n\r\nx"),
    "two lengths": lambda send: send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx"),
    "length and chunks": lambda send: send(
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "a chunk size that is none": lambda send: send(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nx\r\n0\r\n\r\n"
    ),
    "a chunk cut off": lambda send: send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nx"),
    "a length that is too long": lambda send: send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}"),
    "control bytes in headers": lambda send: send(b"HTTP/1.1 200 OK\r\nX: \x00\x1b[31m\r\nContent-Length: 0\r\n\r\n"),
    "a header without a colon": lambda send: send(b"HTTP/1.1 200 OK\r\nnothing\r\n\r\n"),
    "JSON 100,000 deep": lambda send: send(response(b"[" * 100_000 + b"]" * 100_000)),
    "JSON of a number of a million digits": lambda send: send(response(b"9" * 1_000_000)),
    "null": lambda send: send(response(b"null")),
    "a list": lambda send: send(response(b"[]")),
    "a text": lambda send: send(response(b'"choices"')),
    "an HTML page": lambda send: send(response(b"<html>please log in</html>")),
    "choices that are a text": lambda send: send(response(b'{"choices":"none","data":"none"}')),
    "choices of a number": lambda send: send(response(b'{"choices":7,"data":7}')),
    "a choice that is null": lambda send: send(response(b'{"choices":[null],"data":[null]}')),
    "a message that is a list": lambda send: send(response(b'{"choices":[{"message":[],"finish_reason":"stop"}],"data":[[]]}')),
    "UTF-16": lambda send: send(response('{"choices":[]}'.encode("utf-16"))),
    "bytes that are no text": lambda send: send(response(bytes(range(128, 256)) * 10)),
}
