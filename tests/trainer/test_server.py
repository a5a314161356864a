"""The captioner server: chat requests, the API key, and a captioner as the model of `synth generate`."""

import asyncio
import base64
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from starlette.exceptions import HTTPException
from torch import Tensor

from pipeline.dataset.version import read_version
from pipeline.errors import TrainError
from pipeline.inference import protocol
from tests.pipeline.images.test_similarity import photo
from tests.trainer.test_captioner import save_captioner
from trainer import Captioner, server
from trainer.model.decoding import DecodingConfig
from trainer.server import CaptionServer, completion, listen, read_request
from trainer.tokenizer import CaptionTokenizer, EncodedText, collate

NAME = "student"
CHAT = "/v1/chat/completions"
IMAGE_URL = f"data:image/png;base64,{base64.b64encode(b'pixels').decode()}"
PROMPTS = [("human", "brief"), ("synthetic", "detailed"), ("synthetic", "")]


def image_part(url: str = IMAGE_URL) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def body_of(content: Any, **values: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], **values}).encode()


def body_with(text: str = "", **values: Any) -> bytes:
    return body_of([image_part(), {"type": "text", "text": text}], **values)


def schema_of(**properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def test_last_text_and_image_of_a_conversation_are_read() -> None:
    folded = image_part("data:image/png;charset=utf-8;base64,c2Vj\r\nb25k")
    turns = [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": [image_part(), {"type": "text", "text": "detailed"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [folded, {"type": "text", "text": "How many dogs are there?"}]},
    ]
    request = read_request(json.dumps({"messages": turns}).encode(), PROMPTS)
    assert (request.prompt, request.image) == (("synthetic", "", "How many dogs are there?"), b"second")
    first = read_request(json.dumps({"messages": turns[:3]}).encode(), PROMPTS)
    assert (first.prompt, first.image) == (("synthetic", "detailed", ""), b"pixels")


def test_caption_is_returned_in_the_property_named_by_the_schema() -> None:
    request = read_request(body_with(response_format=schema_of(caption={"type": "string"})), PROMPTS)
    answer = completion(request, NAME, 'A "dog".', (3, 2), is_cut=False)
    assert json.loads(content_of(answer)) == {"caption": 'A "dog".'}


def test_probe_from_synth_generate_is_answered_with_the_only_allowed_value() -> None:
    request = read_request(protocol.probe("m"), PROMPTS)
    body = completion(request, "m", request.only or "", (0, 0), is_cut=False)
    assert request.image is None
    answer = protocol.parse_answer(json.dumps(body).encode())
    assert answer and json.loads(answer.text) == {"word": protocol.PROBE_WORD}


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ({"temperature": 0.7, "max_completion_tokens": 5, "stream": True}, (0.7, 5, True)),
        (dict.fromkeys(("temperature", "max_completion_tokens", "n", "stream", "stop")), (0.0, 8192, False)),
        ({"max_tokens": 16.0, "temperature": 1e-40}, (0.0, 16, False)),
    ],
)
def test_sampling_and_length_settings_of_a_request_are_read(values: dict[str, Any], read: Any) -> None:
    request = read_request(body_with(**values), PROMPTS)
    assert (request.temperature, request.max_tokens, request.streams) == read


BAD: dict[str, bytes] = {
    "not JSON": b"{",
    "deep": b'{"a":' * 100_000,
    "not UTF-8": b'{"messages": "\xff"}',
    "no messages": json.dumps({"model": "m"}).encode(),
    "content is a number": body_of(3),
    "no image": body_of("Describe this."),
    "audio": body_of([image_part(), {"type": "input_audio"}]),
    "an address": body_of([image_part("http://169.254.169.254/")]),
    "file URL": body_of([image_part("file:///etc/passwd")]),
    "not base64": body_of([image_part("data:image/png;base64,%%%")]),
    "several answers": body_with(n=2),
    "temperature is NaN": body_with(temperature=float("nan")),
    "no tokens": body_with(max_tokens=0),
    "unknown style": body_with("Task: caption, poem"),
    "two properties": body_with(response_format=schema_of(a={"type": "string"}, b={"type": "string"})),
    "URL is a number": body_of([image_part() | {"image_url": {"url": 3}}]),
    "half of a surrogate": b'{"messages": [{"role": "user", "content": "\\ud800?"}]}',
    "long text": body_with("Question: x" + " " * 100_000 + "y"),
    "long question": body_with("Question: " + "x" * 501),
    "no schema": body_with(response_format={"type": "json_schema"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_request_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(HTTPException) as refused:
        read_request(BAD[name], PROMPTS)
    assert refused.value.status_code == 400
    assert 5 < len(refused.value.detail) < 200
    # The message contains no names of pydantic models or types.
    assert not re.search(r"\b_[A-Z]|\[|constrained", refused.value.detail)


@contextmanager
def running(server: CaptionServer) -> Iterator[str]:
    """Run a server on a thread, and yield its URL."""
    http = server.make_server()
    with listen(server.host, 0) as listener:
        thread = threading.Thread(target=http.run, args=([listener],))
        thread.start()
        try:
            yield f"http://{server.host}:{listener.getsockname()[1]}"
        finally:
            http.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    return Captioner.from_pretrained(save_captioner(tmp_path_factory.mktemp("models") / "c"), device="cpu")


@pytest.fixture
def url(captioner: Captioner) -> Iterator[str]:
    with running(CaptionServer(captioner, NAME, num_beams=3)) as address:
        yield address


def png(number: int) -> bytes:
    data = io.BytesIO()
    photo(number).save(data, "PNG")
    return data.getvalue()


def chat(image: bytes, text: str = "", **values: Any) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [image_part(url), {"type": "text", "text": text}]
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


def test_concurrent_requests_get_the_captions_of_their_images(url: str, captioner: Captioner) -> None:
    images = [png(number) for number in range(20)]

    async def send_all() -> list[tuple[int, Any, Any]]:
        return await asyncio.gather(*(send(url, CHAT, chat(image)) for image in images))

    captions = [content_of(answer) for _, answer, _ in asyncio.run(send_all())]
    assert captions == captioner.caption(images, num_beams=3)


def test_request_over_the_limit_gets_status_503_and_retry_after(captioner: Captioner) -> None:
    assert server.MAX_WAITING < server.MAX_CONNECTIONS
    with running(CaptionServer(captioner, NAME, unanswered=asyncio.Semaphore(0))) as url:
        status, _, headers = request(url, CHAT, chat(png(1)))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert request(url, "/v1/models")[0] == 200


def test_answer_has_token_counts_and_finish_reason(url: str, captioner: Captioner) -> None:
    _, whole, headers = request(url, CHAT, chat(png(1), "detailed"))
    usage = whole["usage"]
    assert content_of(whole) == captioner.caption(png(1), style="detailed", num_beams=3)[0]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    is_longest = usage["completion_tokens"] == captioner.checkpoint.captioner.config.max_caption_tokens
    assert whole["choices"][0]["finish_reason"] == ("length" if is_longest else "stop")
    _, cut, _ = request(url, CHAT, chat(png(1), "detailed", max_tokens=1))
    assert (cut["usage"]["completion_tokens"], cut["choices"][0]["finish_reason"]) == (1, "length")


def test_answer_has_the_log_probabilities_of_its_tokens_on_request(url: str, captioner: Captioner) -> None:
    _, plain, _ = request(url, CHAT, chat(png(1)))
    _, body, _ = request(url, CHAT, chat(png(1), logprobs=True))
    assert "logprobs" not in plain["choices"][0] and content_of(body) == content_of(plain)
    tokens = body["choices"][0]["logprobs"]["content"]
    is_cut = body["choices"][0]["finish_reason"] == "length"
    assert len(tokens) == body["usage"]["completion_tokens"] + (not is_cut)
    # Their sum is the negative loss of the text.
    model, pixels_CHW = captioner.checkpoint.captioner, captioner.prepare(png(1))
    assert isinstance(pixels_CHW, Tensor)
    asked = read_request(json.dumps(chat(png(1))).encode(), model.config.prompts)
    prompt = captioner.prompt_ids(*asked.prompt)
    (ids,) = captioner.write(pixels_CHW[None], [prompt], captioner.decoding(3))
    target = ids if is_cut else [*ids, model.config.eos_id]
    loss = model.loss(model.encoder(pixels_CHW[None]), collate([[EncodedText.of(prompt, target)]]))
    assert sum(token["logprob"] for token in tokens) == pytest.approx(-loss.item(), abs=1e-3)
    (first, *_), cut = tokens, request(url, CHAT, chat(png(1), max_tokens=1, logprobs=True))[1]
    (only,) = cut["choices"][0]["logprobs"]["content"]
    assert only == first | {"logprob": pytest.approx(first["logprob"], abs=1e-4)}


def test_stream_has_the_whole_answer_in_its_first_event(url: str, captioner: Captioner) -> None:
    status, text, _ = request(url, CHAT, chat(png(1), max_tokens=2, stream=True))
    *events, end, _ = text.split("\n\n")
    first, second = (json.loads(event.removeprefix("data: "))["choices"][0] for event in events)
    assert first["delta"]["content"] == content_of(request(url, CHAT, chat(png(1), max_tokens=2))[1])
    assert (status, end) == (200, "data: [DONE]")
    assert (first["finish_reason"], second["finish_reason"]) == (None, "length")


def test_model_is_listed_and_unknown_model_is_refused(url: str) -> None:
    _, listed, _ = request(url, "/v1/models")
    assert [model["id"] for model in listed["data"]] == [NAME]
    # If `max_model_len` were listed, clients would count image tokens against it.
    assert "max_model_len" not in listed["data"][0]
    status, answer, _ = request(url, CHAT, chat(png(1)) | {"model": "gpt"})
    assert status == 404 and f"this server has {NAME}" in answer["error"]["message"]


def test_request_without_the_api_key_is_refused(captioner: Captioner) -> None:
    with running(CaptionServer(captioner, NAME, key="s3cret")) as url:
        assert request(url, CHAT, chat(png(1)))[0] == 401
        *wrong, right = ({"Authorization": f"Bearer {key}"} for key in ("s3cre", "\u00fc", "s3cret"))
        for headers in wrong:
            assert request(url, "/v1/models", headers=headers)[0] == 401
        assert request(url, CHAT, chat(png(1)), headers=right)[0] == 200


def test_request_of_lost_client_is_dropped(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first text is held back until the other clients have disconnected."""
    begun, released, written = threading.Event(), threading.Event(), list[str]()
    write = Captioner.write

    def hold(self: Captioner, *arguments: Any) -> list[list[int]]:
        begun.set()
        assert released.wait(30)
        written.append("text")
        return write(self, *arguments)

    monkeypatch.setattr(Captioner, "write", hold)

    async def disconnect(url: str) -> None:
        first = asyncio.create_task(send(url, CHAT, chat(png(1))))
        await asyncio.to_thread(begun.wait, 30)
        others = [asyncio.create_task(send(url, CHAT, chat(png(number)))) for number in range(4)]
        await asyncio.wait(others, timeout=1)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.5)
        released.set()
        assert (await first)[0] == 200

    with running(CaptionServer(captioner, NAME)) as url:
        asyncio.run(asyncio.wait_for(disconnect(url), 20))
        assert request(url, CHAT, chat(png(1)))[0] == 200
    assert len(written) == 2


@pytest.mark.parametrize(
    ("error", "status"), [(TrainError("ask a shorter question"), 400), (RuntimeError("a secret path"), 500)]
)
def test_only_errors_of_the_request_are_shown_to_the_client(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: Any, error: Exception, status: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Captioner, "write", fail)
    answered, answer, _ = request(url, CHAT, chat(png(1)))
    assert answered == status
    assert (str(error) in answer["error"]["message"]) == (status == 400)
    assert (str(error) in caplog.text) == (status == 500)


def test_request_with_temperature_is_sampled_without_beams(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[DecodingConfig] = []

    def record(_: Captioner, pixels_BCHW: Any, prompts: Any, decoding: DecodingConfig) -> list[list[int]]:
        used.append(decoding)
        return [[5] for _ in prompts]

    monkeypatch.setattr(Captioner, "write", record)
    assert request(url, CHAT, chat(png(1), temperature=0.7))[0] == 200
    assert used == [DecodingConfig(temperature=0.7)]


def test_synth_generate_gets_captions_from_the_captioner_server(
    captioner: Captioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random weights write no sentences.
    caption = "A dog runs over the wet grass behind a white house."
    monkeypatch.setattr(Captioner, "write", lambda *_: [[5, 6]])
    monkeypatch.setattr(CaptionTokenizer, "decode", lambda *_: caption)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / f"photos/{number}.png").write_bytes(png(number))
    command = [sys.executable, "-m", "pipeline", "generate", "--source", "folder:photos", "--out", "ds"]
    with running(CaptionServer(captioner, NAME)) as url:
        command += ["--tasks", "caption", "--styles", "brief", "--base-url", url, "--model", NAME]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "does not enforce" not in done.stderr and "does not take" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    version = read_version(tmp_path / "ds/versions/v1.0.0")
    splits = [split for split, rows in version.manifest["rows"].items() if rows]
    captions = {row["captions"][0]["text"] for split in splits for row in version.read(split).to_pylist()}
    assert captions == {caption}
