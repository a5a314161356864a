"""Mock chat endpoint that answers any request with a caption after a fixed time.

    python benchmarks/mock_chat.py PORT [SECONDS [various [ADDRESS]]]

With `various`, captions depend on the request, and requests for questions receive questions. GET /stats
returns the number of requests (also by client), answers and distinct requests. POST /reset clears the counts.
The endpoint does not enforce a schema, but answers the schema probe as expected.
"""

import asyncio
import hashlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

COLORS = ("red", "blue", "green", "yellow", "brown", "black", "white", "gray")
THINGS = ("jacket", "coat", "shirt", "dress", "hat", "scarf", "sweater", "vest")
PLACES = ("beach", "street", "field", "river", "wall", "track", "lake", "bridge")
CAPTION = json.dumps(
    {"caption": "A man in a red jacket walks a brown dog along a wet beach under a gray sky."}
)


def answer(text: str, finish_reason: str = "stop") -> bytes:
    """Return the body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 300, "completion_tokens": 24, "total_tokens": 324}
    made = {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "model",
        "choices": [choice],
        "usage": usage,
    }
    return json.dumps(made).encode()


def caption(key: bytes) -> str:
    """Choose one of half a million captions. The choice depends on the key."""
    words = [
        options[byte % 8]
        for options, byte in zip((COLORS, THINGS, COLORS, PLACES, COLORS), key, strict=False)
    ]
    number = 2 + key[5] % 16
    dogs = f"{number} {words[2]} dogs along a wet {words[3]}"
    return f"A man in a {words[0]} {words[1]} walks {dogs} under a {words[4]} sky."


def pairs(key: bytes) -> list[dict[str, str]]:
    """Choose four questions with answers. The choice depends on the key."""
    words = [
        options[byte % 8]
        for options, byte in zip((COLORS, THINGS, COLORS, PLACES, COLORS), key, strict=False)
    ]
    return [
        {
            "answer_type": "yes/no",
            "question": f"Is the {words[1]} {words[0]}?",
            "answer": ("yes", "no")[key[5] % 2],
        },
        {
            "answer_type": "number",
            "question": f"How many {words[2]} dogs are at the {words[3]}?",
            "answer": str(2 + key[6] % 16),
        },
        {
            "answer_type": "other",
            "question": f"What color is the sky over the {words[3]}?",
            "answer": words[4],
        },
        {
            "answer_type": "other",
            "question": f"Where is the man in the {words[0]} {words[1]}?",
            "answer": f"at the {words[3]}",
        },
    ]


class Mock:
    """The endpoint. Counts requests by the hash of the messages in the body."""

    def __init__(self, seconds: float, *, various: bool) -> None:
        self.seconds = seconds
        self.various = various
        self.answered: Counter[bytes] = Counter()
        self.came = 0
        self.clients: Counter[str] = Counter()
        self.body = answer(CAPTION)

    async def chat(self, request: web.Request) -> web.Response:
        """Answer after the fixed time."""
        raw = await request.read()
        if b'"probe"' in raw:
            schema = json.loads(raw)["response_format"]["json_schema"]["schema"]
            return web.Response(
                body=answer(json.dumps({"word": schema["properties"]["word"]["enum"][0]})),
                content_type="application/json",
            )
        self.came += 1
        self.clients[str(request.remote)] += 1
        # Image and text identify a request, because other fields vary by client.
        start = raw.rfind(b'"uuid":"')
        key = hashlib.sha1(
            raw[start if start >= 0 else raw.find(b'"messages"') :], usedforsecurity=False
        ).digest()
        await asyncio.sleep(self.seconds)
        self.answered[key] += 1
        body = self.body
        if self.various:
            asked_for_pairs = b"Task: qa" in raw
            body = answer(json.dumps({"qa": pairs(key)} if asked_for_pairs else {"caption": caption(key)}))
        return web.Response(body=body, content_type="application/json")

    async def stats(self, _request: web.Request) -> web.Response:
        """Return the counts."""
        total = sum(self.answered.values())
        counts = {
            "came": self.came,
            "answered": total,
            "different": len(self.answered),
            "clients": self.clients,
        }
        return web.json_response(counts)

    async def reset(self, _request: web.Request) -> web.Response:
        """Clear the counts."""
        self.answered.clear()
        self.clients.clear()
        self.came = 0
        return web.Response()


async def models(_request: web.Request) -> web.Response:
    """List the mock model."""
    return web.json_response(
        {
            "object": "list",
            "data": [
                {"id": "model", "object": "model", "created": 0, "owned_by": "vllm", "max_model_len": 8192}
            ],
        }
    )


async def health(_request: web.Request) -> web.Response:
    """Return status 200."""
    return web.Response()


@contextmanager
def running_mock(seconds: float = 0, *, various: bool = True) -> Iterator[str]:
    """Run a mock in its own process. Yields its address (without /v1) once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, __file__, str(port), str(seconds), *(["various"] if various else [])]
    mock = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # aiohttp logs errors when clients are killed
    try:
        while True:
            if mock.poll() is not None:
                raise SystemExit(f"the mock endpoint ended: {' '.join(command)}")
            try:
                urllib.request.urlopen(f"{url}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield url
    finally:
        mock.kill()


def main() -> None:
    """Serve until killed."""
    mock = Mock(float(sys.argv[2]) if len(sys.argv) > 2 else 0.2, various=sys.argv[3:4] == ["various"])
    app = web.Application(client_max_size=2**28)
    app.router.add_post("/v1/chat/completions", mock.chat)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    app.router.add_get("/stats", mock.stats)
    app.router.add_post("/reset", mock.reset)
    web.run_app(
        app, host=sys.argv[4] if len(sys.argv) > 4 else "127.0.0.1", port=int(sys.argv[1]), print=None
    )


if __name__ == "__main__":
    main()
