"""The server over real sockets: concurrent requests, the API key, and a captioner as a teacher."""

import asyncio
import base64
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pipeline.dataset.version import read_version
from pipeline.errors import TrainError
from tests.pipeline.images.test_similarity import photo
from tests.trainer.test_captioner import save_captioner
from trainer import Captioner
from trainer.model.caption_model import GenerationMemoryError
from trainer.model.decoding import DecodingConfig
from trainer.serving import server as serving
from trainer.serving.address import listen, url_of
from trainer.serving.server import CaptionServer, make_server
from trainer.tokenizer import CaptionTokenizer

NAME = "student"
CHAT = "/v1/chat/completions"


@contextmanager
def running(server: CaptionServer) -> Iterator[str]:
    """Run a server on a thread, and yield its URL."""
    http = make_server(server)
    with listen(server.host, 0) as listener:
        thread = threading.Thread(target=http.run, args=([listener],))
        thread.start()
        try:
            yield url_of(server.host, listener)
        finally:
            http.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    return Captioner.from_pretrained(save_captioner(tmp_path_factory.mktemp("models") / "c"), device="cpu")


@pytest.fixture
def url(captioner: Captioner) -> Iterator[str]:
    with running(CaptionServer(captioner, NAME)) as address:
        yield address


def png(number: int) -> bytes:
    data = io.BytesIO()
    photo(number).save(data, "PNG")
    return data.getvalue()


def chat(image: bytes, text: str = "", **values: Any) -> dict[str, Any]:
    address = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": text}]
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **values}


async def send(url: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any, Any]:
    """Return the status, the JSON or text, and the headers of an answer. Without a body: GET."""
    async with (
        aiohttp.ClientSession() as session,
        session.request("POST" if body else "GET", url + path, json=body, **options) as answer,
    ):
        is_json = answer.content_type == "application/json"
        return answer.status, await (answer.json() if is_json else answer.text()), answer.headers


def request(url: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any, Any]:
    return asyncio.run(send(url, path, body, **options))


def content_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_200_concurrent_requests_are_answered_in_shared_batches(captioner: Captioner) -> None:
    images = [png(number % 20) for number in range(200)]
    expected = captioner.caption(images[:20])
    server = CaptionServer(captioner, NAME)

    async def send_all(url: str) -> list[tuple[int, Any, Any]]:
        bodies = [chat(image, "How many?" if number % 4 == 3 else "") for number, image in enumerate(images)]
        return await asyncio.gather(*(send(url, CHAT, body) for body in bodies))

    with running(server) as url:
        answers = asyncio.run(send_all(url))
    assert {status for status, *_ in answers} == {200}
    captions = {
        number: content_of(answer) for number, (_, answer, _) in enumerate(answers) if number % 4 != 3
    }
    assert captions == {number: expected[number % 20] for number in captions}
    assert server.batcher.batches < server.texts == 200


def test_answer_counts_tokens_and_states_whether_it_was_cut(
    url: str, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, headers = request(url, CHAT, chat(png(1), "detailed"))
    usage = whole["usage"]
    assert content_of(whole) == captioner.caption(png(1), style="detailed")[0]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    _, cut, _ = request(url, CHAT, chat(png(1), "detailed", max_tokens=1))
    assert (cut["usage"]["completion_tokens"], cut["choices"][0]["finish_reason"]) == (1, "length")
    status, events, _ = request(url, CHAT, chat(png(1), "detailed", stream=True))
    assert status == 200 and events.endswith("data: [DONE]\n\n")
    delta = json.loads(events.split("\n\n")[0].removeprefix("data: "))["choices"][0]["delta"]
    assert delta["content"] == content_of(whole)
    # A text also counts as cut at the last position of the model.
    model = captioner.checkpoint.captioner
    positions = model.encoder.count_states() + usage["total_tokens"]
    monkeypatch.setattr(model.decoder, "max_positions", positions, raising=False)
    _, ended, _ = request(url, CHAT, chat(png(1), "detailed"))
    assert (content_of(ended), ended["choices"][0]["finish_reason"]) == (content_of(whole), "length")


def test_model_is_listed_and_unknown_model_is_refused(url: str) -> None:
    _, listed, _ = request(url, "/v1/models")
    assert [model["id"] for model in listed["data"]] == [NAME]
    # Clients would subtract image tokens from it.
    assert "max_model_len" not in listed["data"][0]
    assert request(url, f"/v1/models/{NAME}")[1] == listed["data"][0]
    assert request(url, "/v1/models/gpt")[0] == 404
    assert request(url, "/health")[1]["status"] == "ok"
    status, answer, _ = request(url, CHAT, chat(png(1)) | {"model": "gpt"})
    assert status == 404 and f"this server has {NAME}" in answer["error"]["message"]


def test_internal_error_is_logged_and_answered_without_details(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a secret of this machine")

    monkeypatch.setattr(Captioner, "write", fail)
    with running(CaptionServer(captioner, NAME)) as url:
        status, answer, _ = request(url, CHAT, chat(png(1)))
    assert status == 500
    assert "secret" not in json.dumps(answer)
    assert "a secret of this machine" in caplog.text


def test_key_is_required_of_all_requests_but_health(captioner: Captioner) -> None:
    with running(CaptionServer(captioner, NAME, key="s3cret")) as url:
        assert request(url, CHAT, chat(png(1)))[0] == 401
        *wrong, right = ({"Authorization": f"Bearer {key}"} for key in ("s3cre", "\u00fc", "s3cret"))
        for headers in wrong:
            assert request(url, "/v1/models", headers=headers)[0] == 401
        assert request(url, CHAT, chat(png(1)), headers=right)[0] == 200
        assert request(url, "/health")[0] == 200


def test_request_over_the_limit_is_told_to_retry_later(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = CaptionServer(captioner, NAME)
    with running(server) as url:
        assert request(url, CHAT, chat(png(1)))[0] == 200
        assert server.held_bytes == 0
        assert serving.MAX_HELD_BYTES // serving.MIN_HELD_BYTES < serving.MAX_CONNECTIONS
        monkeypatch.setattr(serving, "MAX_HELD_BYTES", serving.MIN_HELD_BYTES - 1)
        status, _, headers = request(url, CHAT, chat(png(1)))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert request(url, "/health")[0] == 200


def test_request_of_disconnected_client_is_not_generated(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first text is held back until the other clients have disconnected."""
    begun, released, batch_sizes = threading.Event(), threading.Event(), list[int]()
    write = Captioner.write

    def hold(self: Captioner, pixels_BCHW: Any, *arguments: Any) -> list[list[int]]:
        begun.set()
        assert released.wait(30)
        batch_sizes.append(len(pixels_BCHW))
        return write(self, pixels_BCHW, *arguments)

    monkeypatch.setattr(Captioner, "write", hold)
    server = CaptionServer(captioner, NAME)
    server.batcher.batch_size = 1

    async def disconnect(url: str) -> None:
        first = asyncio.create_task(send(url, CHAT, chat(png(1))))
        await asyncio.to_thread(begun.wait, 30)
        others = [asyncio.create_task(send(url, CHAT, chat(png(number)))) for number in range(4)]
        while len(server.batcher.pending) < 4:
            await asyncio.sleep(0.01)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        while server.held_bytes > serving.MIN_HELD_BYTES:
            await asyncio.sleep(0.01)
        released.set()
        assert (await first)[0] == 200

    with running(server) as url:
        asyncio.run(asyncio.wait_for(disconnect(url), 20))
        assert request(url, CHAT, chat(png(1)))[0] == 200
    assert batch_sizes == [1, 1]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TrainError("the text is too long", hint="ask a shorter question"), 400),
        (GenerationMemoryError("one image does not fit in GPU memory", hint="use fewer beams"), 500),
        (RuntimeError("CUDA error"), 500),
    ],
)
def test_only_errors_of_the_request_have_a_client_error_status(
    url: str, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Captioner, "write", fail)
    assert request(url, CHAT, chat(png(1)))[0] == status


@pytest.mark.parametrize(
    ("values", "decoding"),
    [
        ({}, DecodingConfig(num_beams=3)),
        ({"temperature": 0.7, "top_p": 0.5}, DecodingConfig(temperature=0.7, top_p=0.5)),
        ({"temperature": 1e-40}, DecodingConfig(num_beams=3)),
    ],
)
def test_request_parameters_set_the_decoding(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], decoding: DecodingConfig
) -> None:
    used: list[DecodingConfig] = []

    def record(_: Captioner, pixels_BCHW: Any, prompts: Any, decoding: DecodingConfig) -> list[list[int]]:
        used.append(decoding)
        return [[5] for _ in prompts]

    monkeypatch.setattr(Captioner, "write", record)
    with running(CaptionServer(captioner, NAME, num_beams=3)) as url:
        assert request(url, CHAT, chat(png(1), **values))[0] == 200
    assert used == [decoding]


def test_captioner_server_works_as_the_model_of_synth_generate(
    captioner: Captioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random weights write no sentences.
    caption = "A dog runs over the wet grass behind a white house."
    monkeypatch.setattr(Captioner, "write", lambda _, pixels_BCHW, *__: [[5, 6] for _ in pixels_BCHW])
    monkeypatch.setattr(CaptionTokenizer, "decode", lambda *_: caption)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / f"photos/{number}.png").write_bytes(png(number))
    server = CaptionServer(captioner, NAME)
    command = [sys.executable, "-m", "pipeline", "generate", "--source", "folder:photos", "--out", "ds"]
    with running(server) as url:
        command += ["--tasks", "caption", "--styles", "brief", "--base-url", url, "--model", NAME]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "does not enforce" not in done.stderr and "does not take" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert server.texts == 6
    version = read_version(tmp_path / "ds/versions/v1.0.0")
    splits = [split for split, rows in version.manifest["rows"].items() if rows]
    captions = {row["captions"][0]["text"] for split in splits for row in version.read(split).to_pylist()}
    assert captions == {caption}
