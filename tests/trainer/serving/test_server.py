"""The server over real sockets: many requests at once, a key, and a captioner that teaches."""

import asyncio
import base64
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from pipeline.dataset.version import read_version
from tests.pipeline.images.test_similarity import photo
from tests.trainer.test_captioner import save_captioner
from trainer import Captioner
from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.serving import server as serving
from trainer.serving.server import Batcher, CaptionServer, GenerationRequest, listen, make_server, url_of
from trainer.tokenizer import CaptionTokenizer

NAME = "student"


@contextmanager
def running(server: CaptionServer) -> Iterator[str]:
    """Run a server on a thread; yield its address."""
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


def chat(image: bytes, text: str = "", **more: Any) -> dict[str, Any]:
    address = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": text}]
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **more}


async def ask(url: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any, Any]:
    """Return the status, the JSON or text, and the headers of an answer; a GET where there is no body."""
    async with aiohttp.ClientSession() as session:
        method = "GET" if body is None else "POST"
        given = {"json": body} if isinstance(body, dict) else {"data": body}
        async with session.request(method, url + path, **given, **options) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.content_type == "application/json" else text, answer.headers


def content_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def test_two_hundred_requests_at_once_are_all_answered_and_share_batches(captioner: Captioner) -> None:
    images = [png(number % 20) for number in range(200)]
    expected = captioner.caption(images[:20])
    server = CaptionServer(captioner, NAME)

    async def all_at_once(url: str) -> list[tuple[int, Any, Any]]:
        bodies = [chat(image, "How many?" if number % 4 == 3 else "") for number, image in enumerate(images)]
        return await asyncio.gather(*(ask(url, "/v1/chat/completions", body) for body in bodies))

    with running(server) as url:
        answers = asyncio.run(all_at_once(url))
    assert {status for status, *_ in answers} == {200}
    for number, (_, answer, _) in enumerate(answers):
        if number % 4 != 3:
            assert content_of(answer) == expected[number % 20]
    assert server.batcher.batches < 200
    assert server.texts == 200


def test_an_answer_counts_its_tokens_and_says_whether_it_was_cut(
    url: str, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole, headers = asyncio.run(ask(url, "/v1/chat/completions", chat(png(1), "detailed")))
    assert content_of(whole) == captioner.caption(png(1), style="detailed")[0]
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    _, cut, _ = asyncio.run(ask(url, "/v1/chat/completions", chat(png(1), "detailed", max_tokens=1)))
    assert (cut["usage"]["completion_tokens"], cut["choices"][0]["finish_reason"]) == (1, "length")
    assert headers["X-Content-Type-Options"] == "nosniff"
    model = captioner.checkpoint.captioner
    room = model.encoder.count_states() + whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    with monkeypatch.context() as few:
        few.setattr(model.decoder, "max_positions", room, raising=False)  # it ends where the model has no more positions
        _, ended, _ = asyncio.run(ask(url, "/v1/chat/completions", chat(png(1), "detailed")))
    assert (content_of(ended), ended["choices"][0]["finish_reason"]) == (content_of(whole), "length")
    status, events, _ = asyncio.run(ask(url, "/v1/chat/completions", chat(png(1), "detailed", stream=True)))
    assert status == 200 and events.endswith("data: [DONE]\n\n")
    assert json.loads(events.split("\n\n")[0].removeprefix("data: "))["choices"][0]["delta"]["content"] == content_of(whole)


def test_the_model_is_listed_and_another_is_not_there(url: str) -> None:
    _, listed, _ = asyncio.run(ask(url, "/v1/models"))
    assert [model["id"] for model in listed["data"]] == [NAME]
    assert "max_model_len" not in listed["data"][0]  # a captioner has no context of tokens that images take a part of
    assert asyncio.run(ask(url, "/health"))[1]["status"] == "ok"
    status, answer, _ = asyncio.run(ask(url, "/v1/chat/completions", chat(png(1)) | {"model": "gpt"}))
    assert status == 404 and f"but {NAME}" in answer["error"]["message"]


def test_a_failure_is_answered_without_its_details(captioner: Captioner, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    server = CaptionServer(captioner, NAME)

    def fail(*_: Any) -> Any:
        raise RuntimeError("a secret of this machine")

    monkeypatch.setattr(Captioner, "write", fail)
    with running(server) as url:
        status, answer, _ = asyncio.run(ask(url, "/v1/chat/completions", chat(png(1))))
    assert status == 500
    assert "secret" not in json.dumps(answer)
    assert "a secret of this machine" in caplog.text


def test_key_is_required_of_all_requests_but_health(captioner: Captioner) -> None:
    with running(CaptionServer(captioner, NAME, key="s3cret")) as url:
        assert asyncio.run(ask(url, "/v1/chat/completions", chat(png(1))))[0] == 401
        *wrong, right = ({"Authorization": f"Bearer {key}"} for key in ("s3cre", "\u00fc", "s3cret"))
        for headers in wrong:
            assert asyncio.run(ask(url, "/v1/models", headers=headers))[0] == 401
        assert asyncio.run(ask(url, "/v1/chat/completions", chat(png(1)), headers=right))[0] == 200
        assert asyncio.run(ask(url, "/health"))[0] == 200


@pytest.mark.parametrize("bound", ["MAX_HELD_REQUESTS", "MAX_HELD_BYTES"])
def test_too_many_requests_are_asked_to_come_again(captioner: Captioner, monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    server = CaptionServer(captioner, NAME)
    with running(server) as url:
        assert asyncio.run(ask(url, "/v1/chat/completions", chat(png(1))))[0] == 200
        assert (server.held_requests, server.held_bytes) == (0, 0)
        monkeypatch.setattr(serving, bound, 0)
        status, _, headers = asyncio.run(ask(url, "/v1/chat/completions", chat(png(1))))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert asyncio.run(ask(url, "/health"))[0] == 200


def test_who_has_gone_is_not_written_for(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first text is held back until the others have left."""
    begun, go_on, written = threading.Event(), threading.Event(), list[int]()
    write = Captioner.write

    def hold(self: Captioner, pixels_BCHW: Any, *more: Any) -> list[list[int]]:
        begun.set()
        assert go_on.wait(30)
        written.append(len(pixels_BCHW))
        return write(self, pixels_BCHW, *more)

    monkeypatch.setattr(Captioner, "write", hold)
    server = CaptionServer(captioner, NAME, batch_size=1)

    async def leave(url: str) -> None:
        first = asyncio.create_task(ask(url, "/v1/chat/completions", chat(png(1))))
        await asyncio.to_thread(begun.wait, 30)
        others = [asyncio.create_task(ask(url, "/v1/chat/completions", chat(png(number)))) for number in range(4)]
        while server.held_requests < 5 or server.batcher.waiting < 4:
            await asyncio.sleep(0.01)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        while server.held_requests > 1:
            await asyncio.sleep(0.01)
        go_on.set()
        assert (await first)[0] == 200

    with running(server) as url:
        asyncio.run(leave(url))
        assert asyncio.run(ask(url, "/v1/chat/completions", chat(png(1))))[0] == 200
    assert written == [1, 1]


@pytest.mark.parametrize(
    ("asked", "decoding"),
    [
        ({}, DecodingConfig(num_beams=3)),
        ({"temperature": 0.7, "top_p": 0.5}, DecodingConfig(temperature=0.7, top_p=0.5)),
        ({"temperature": 1e-40}, DecodingConfig(num_beams=3)),
    ],
)
def test_texts_are_written_as_asked(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], decoding: DecodingConfig
) -> None:
    seen: list[DecodingConfig] = []

    def note(_: Captioner, pixels_BCHW: Any, prompts: Any, decoding: DecodingConfig) -> list[list[int]]:
        seen.append(decoding)
        return [[5] for _ in prompts]

    monkeypatch.setattr(Captioner, "write", note)
    with running(CaptionServer(captioner, NAME, num_beams=3)) as url:
        assert asyncio.run(ask(url, "/v1/chat/completions", chat(png(1), **asked)))[0] == 200
    assert seen == [decoding]


def test_a_schema_with_one_answer_gets_it_also_about_an_image(url: str) -> None:
    schema = {"type": "object", "properties": {"a": {"const": "x"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    _, answer, _ = asyncio.run(ask(url, "/v1/chat/completions", chat(png(1), response_format=form)))
    assert json.loads(content_of(answer)) == {"a": "x"}


def test_a_captioner_teaches_synth_generate(captioner: Captioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student as a teacher: every image is asked about once, and the server keeps to the protocol and to schemas."""
    spoken = "A dog runs over the wet grass behind a white house."  # random weights write no sentences, and do not end
    monkeypatch.setattr(Captioner, "write", lambda _, pixels_BCHW, *__: [[5, 6] for _ in pixels_BCHW])
    monkeypatch.setattr(CaptionTokenizer, "decode", lambda *_: spoken)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / f"photos/{number}.png").write_bytes(png(number))
    command = [sys.executable, "-m", "pipeline.cli", "generate", "--source", "folder:photos", "--tasks", "caption"]
    server = CaptionServer(captioner, NAME)
    with running(server) as url:
        options = ["--styles", "brief", "--base-url", url, "--model", NAME, "--out", "ds"]
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "does not enforce" not in done.stderr and "does not take" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert server.texts == 6
    version = read_version(tmp_path / "ds/versions/v1.0.0")
    splits = [split for split, rows in version.manifest["rows"].items() if rows]
    captions = [row["captions"][0]["text"] for split in splits for row in version.read(split).to_pylist()]
    assert captions and set(captions) == {spoken}


def job(number: int, length: int = 2, decoding: DecodingConfig = GREEDY) -> GenerationRequest:
    return GenerationRequest(torch.full((3, 2, 2), float(number)), [number] * length, decoding)


def test_what_waits_and_fits_together_is_written_at_once() -> None:
    batches: list[list[int]] = []

    def write(jobs: list[GenerationRequest]) -> list[list[int]]:
        batches.append([one.prompt[0] for one in jobs])
        return [[one.prompt[0]] for one in jobs]

    async def steps() -> None:
        batcher = Batcher(write, batch_size=3, thread=ThreadPoolExecutor(1))
        beams = DecodingConfig(num_beams=2)
        kinds = [job(0), job(1, 3), job(2), job(3), job(4, decoding=beams), job(5), job(6, 3)]
        waiting = [asyncio.create_task(batcher.submit(one)) for one in kinds]
        await asyncio.sleep(0)
        assert batcher.waiting == 7
        task = asyncio.create_task(batcher.run())
        assert await asyncio.gather(*waiting) == [[number] for number in range(7)]
        task.cancel()

    asyncio.run(steps())
    assert batches == [[0, 2, 3], [1, 6], [4], [5]]
