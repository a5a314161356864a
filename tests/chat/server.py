"""A scripted chat server on loopback. It records every request."""

import asyncio
import hashlib
import json
import re
import threading
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.chat.kinds import SCHEMA_IN_WORDS, VLLM, ServerKind

REPLIES = {
    "answer": '{"answer":"1"}',
    "caption": "A small red ring on a white background.",
    "claims": '{"claims":["There is a ring."]}',
    "confirm": '{"answer":"yes"}',
    "deck_qa": '{"qa":[{"answer_type":"arithmetic","evidence_pages":[1,2],"question":"How many together?",'
    '"expression":"1 + 2","answer":"3"}]}',
    "qa": '{"qa":[{"answer_type":"number","question":"How many rings are there?","answer":"1"}]}',
}


@dataclass(frozen=True)
class Act:
    """The scripted response to one request."""

    text: str | None = None
    finish_reason: str = "stop"
    status: int = 200
    seconds: float = 0.0
    raw: bytes | None = None
    cut: bool = False  # close the connection in the middle of the body
    close: bool = False  # close the connection after the body without notice
    headers: dict[str, str] = field(default_factory=dict)


# Called with the number of earlier identical requests and the body. None stands for a valid reply.
Script = Callable[[int, dict[str, Any]], Act | None]


class ChatServer:
    """The state of a running server. Tests may change `script` while it runs."""

    def __init__(self, script: Script | None = None, model: str = "model", kind: ServerKind = VLLM) -> None:
        self.kind = kind
        self.script: Script = script or (lambda times, body: None)
        self.model = model
        self.key: str | None = None
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        self.times: Counter[str] = Counter()
        self.in_flight = self.max_in_flight = 0
        self.probe_answer: bytes | None = None
        self.dead = False
        self.model_root = ""
        self.other_models: list[str] = []
        self.headers: list[dict[str, str]] = []

    @property
    def authorizations(self) -> set[str | None]:
        """Return the Authorization headers of all requests."""
        return {headers.get("Authorization") for headers in self.headers}

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_post(f"{self.kind.path}/chat/completions", self._chat)
        if self.kind.lists_models:
            app.router.add_get(f"{self.kind.path}/models", self._models)
        app.router.add_get("/health", self._health)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        self.headers.append({**request.headers})
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        name = f"{self.kind.model_prefix}{self.model}"
        own = {"id": name, "owned_by": "somebody", **self.kind.model_fields}
        others = [own | {"id": name} for name in self.other_models]
        root = {"root": self.model_root} if self.kind is VLLM else {}
        return web.json_response({"data": [own | root, *others]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.dead else 200)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.headers.append({**request.headers})
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        body = await request.json()
        if body["model"] != f"{self.kind.model_prefix}{self.model}":
            error = {"message": f"The model `{body['model']}` does not exist."}
            return web.json_response({"error": error}, status=404)
        if refusal := self.kind.refusal_of(body):
            self.refused.append(body)
            return web.json_response(refusal[1], status=refusal[0])
        schema = body.get("response_format", {}).get("json_schema", {})
        task = task_name(body)
        if task == "probe":
            if self.probe_answer is not None:
                return web.Response(body=self.probe_answer, content_type="application/json")
            is_enforced = schema and self.kind.enforces_schemas
            proof = schema["schema"]["properties"]["word"]["enum"][0] if is_enforced else "hello"
            return web.json_response(self._answer(json.dumps({"word": proof})))
        self.bodies.append(body)
        name = _name(body)
        times = self.times[name]
        self.times[name] += 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            act = self.script(times, body) or Act()
            return await self._act(request, act, REPLIES.get(task, ""))
        finally:
            self.in_flight -= 1

    def _answer(self, text: str, finish_reason: str = "stop") -> dict[str, Any]:
        value = answer(text, finish_reason)
        if self.kind.in_parts:
            thought = {"type": "thinking", "thinking": [{"type": "text", "text": "A ring?"}]}
            value["choices"][0]["message"]["content"] = [thought, {"type": "text", "text": text}]
        return value

    async def _act(self, request: web.Request, act: Act, valid_text: str) -> web.StreamResponse:
        await asyncio.sleep(act.seconds)
        transport = request.transport
        body = json.dumps(
            self._answer(self.kind.wrap(valid_text if act.text is None else act.text), act.finish_reason)
        ).encode()
        if act.status != 200:
            body = json.dumps({"error": {"message": f"scripted {act.status}"}}).encode()
        body = body if act.raw is None else act.raw
        headers = {"Content-Type": "application/json", **act.headers}
        response = web.StreamResponse(status=act.status, headers=headers)
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[: len(body) // 2] if act.cut else body)
        if not act.cut:
            await response.write_eof()
        if (act.cut or act.close) and transport:
            transport.abort() if act.cut else transport.close()
        return response


def answer(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"choices": [choice], "usage": {"prompt_tokens": 40, "completion_tokens": 12}}


def task_of(body: dict[str, Any]) -> str:
    """Return the last line of the first user message."""
    first = next(message for message in body["messages"] if message["role"] == "user")
    lines = first["content"][-1]["text"].splitlines()
    return str(next(line for line in reversed(lines) if not line.startswith(SCHEMA_IN_WORDS)))


def task_name(body: dict[str, Any]) -> str:
    """Return the name of the task that a request is for."""
    if schema := body.get("response_format", {}).get("json_schema"):
        return str(schema["name"])
    if isinstance(body["messages"][0]["content"], str) and len(body["messages"]) == 1:
        return "probe"
    found = re.search(r"Task: (\w+)", json.dumps(body["messages"]))
    return found[1] if found else "caption"


def uuid_of(body: dict[str, Any]) -> str:
    """Return the sha256 of the first image of a request, or "" without an image."""
    first = next(message for message in body["messages"] if message["role"] == "user")
    image: Any = next((part for part in first["content"] if part["type"] == "image_url"), None)
    if image is None or "uuid" in image:
        return str(image["uuid"]) if image else ""
    data = b64decode(image["image_url"]["url"].partition(",")[2])
    return hashlib.sha256(data).hexdigest()


def _name(body: dict[str, Any]) -> str:
    """Return a name that a request shares with its retries."""
    return f"{uuid_of(body)} {task_of(body)}"


@contextmanager
def running_chat(chat: ChatServer, port: int = 0) -> Iterator[ChatServer]:
    """Run the server in a thread."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    runner = web.AppRunner(chat.app(), shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        chat.url = f"http://127.0.0.1:{runner.addresses[0][1]}{chat.kind.path}"
        started.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert started.wait(10), "the scripted server did not start"
    try:
        yield chat
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
