"""Chat requests: what they ask of a captioner, and what is refused, by its reason."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference import protocol
from trainer.serving.protocol import RefusedError, answer_text, chunks, completion, error_body, read_request

IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(b'pixels').decode()}"}}
STYLES = ["brief", "detailed"]


def asks(text: str = "", **more: Any) -> bytes:
    content = [IMAGE, {"type": "text", "text": text}]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}], **more}).encode()


def schema_of(**properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    ("text", "style", "question"),
    [
        ("", None, ""),
        ("Describe this.", None, ""),
        ("detailed", "detailed", ""),
        ("Write one sentence.\nTask: caption, brief", "brief", ""),
        ("How many dogs are there?", None, "How many dogs are there?"),
        ("Answer in one to three words.\nQuestion: Is it day", None, "Is it day"),
    ],
)
def test_the_text_says_what_is_asked(text: str, style: str | None, question: str) -> None:
    asked = read_request(asks(text), STYLES)
    assert (asked.style, asked.question, asked.image) == (style, question, b"pixels")


def test_the_text_stands_in_the_only_field_of_a_schema() -> None:
    asked = read_request(asks(response_format=schema_of(caption={"type": "string"})), STYLES)
    assert json.loads(answer_text(asked, 'A "dog".')) == {"caption": 'A "dog".'}
    assert answer_text(read_request(asks(), STYLES), "A dog.") == "A dog."


def test_the_probe_of_synth_generate_gets_the_answer_that_proves_schemas() -> None:
    asked = read_request(protocol.probe("m"), STYLES)
    body = completion("1", "m", answer_text(asked, asked.only or ""), (0, 0), is_cut=False)
    assert asked.image is None
    answer = protocol.parse_answer(json.dumps(body).encode())
    assert answer and protocol.is_probe_word(answer.text)


def test_sampling_and_lengths_are_read() -> None:
    asked = read_request(asks(temperature=0.7, top_p=0.9, max_completion_tokens=5, stream=True), STYLES)
    assert (asked.temperature, asked.top_p, asked.max_tokens, asked.streams) == (0.7, 0.9, 5, True)
    nothing: dict[str, Any] = dict.fromkeys(["temperature", "top_p", "max_completion_tokens", "n", "stream", "stop", "seed"])
    assert read_request(asks(max_tokens=5, **nothing), STYLES).max_tokens == 5
    assert read_request(asks(top_p=0), STYLES).top_p < 0.01  # the likeliest token alone
    whole = read_request(asks(temperature=2), STYLES).temperature
    assert isinstance(whole, float)  # transformers takes no other


MESSAGE = {"role": "user", "content": "Describe this."}
BAD: dict[str, bytes] = {
    "no JSON": b"{",
    "deep": b'{"a":' * 100_000,
    "not UTF-8": b'{"messages": "\xff"}',
    "no messages": json.dumps({"model": "m"}).encode(),
    "content that is a number": json.dumps({"messages": [{"role": "user", "content": 3}]}).encode(),
    "a text that is none": json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}).encode(),
    "no image": json.dumps({"messages": [MESSAGE]}).encode(),
    "two images": json.dumps({"messages": [{"role": "user", "content": [IMAGE, IMAGE]}]}).encode(),
    "audio": json.dumps({"messages": [{"role": "user", "content": [IMAGE, {"type": "input_audio"}]}]}).encode(),
    "an address": json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]}
    ).encode(),
    "a file": json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}
    ).encode(),
    "no base64": json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}]}]}
    ).encode(),
    "an image without an address": json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).encode(),
    "several answers": asks(n=2),
    "a temperature that is none": asks(temperature="hot"),
    "a temperature that is not a number": asks(temperature=float("nan")),
    "no tokens": asks(max_tokens=0),
    "a model that is a list": asks(model=["m"]),
    "a style that it has not learned": asks("Task: caption, poem"),
    "a question without end": asks("why " * 1000 + "?"),
    "a schema of two fields": asks(response_format=schema_of(a={"type": "string"}, b={"type": "string"})),
    "a stop": asks(stop="dog"),
    "half of a surrogate": b'{"messages": [{"role": "user", "content": "\\ud800?"}]}',
    "a text without end": asks("Question: x" + " " * 100_000 + "y"),
    "a schema that is none": asks(response_format={"type": "json_schema"}),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_is_refused_with_its_reason(kind: str) -> None:
    with pytest.raises(RefusedError) as refused:
        read_request(BAD[kind], STYLES)
    assert 400 <= refused.value.status < 500
    assert 5 < len(str(refused.value)) < 200
    assert error_body(str(refused.value), 400)["error"]["type"] == "invalid_request_error"


KEYS = st.sampled_from(["role", "content", "type", "text", "image_url", "url"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(["messages", "model", "n", "temperature", "response_format", "stream", "max_tokens"])


@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["messages", "model", "n", "temperature", "response_format", "stream", "max_tokens"]), JSON)
)
def test_no_request_is_more_than_refused(values: dict[str, Any]) -> None:
    try:
        read_request(json.dumps(values).encode(), STYLES)
    except RefusedError as refused:
        assert str(refused)


def test_turns_that_called_tools_and_folded_base64_are_read() -> None:
    folded = {"type": "image_url", "image_url": {"url": "data:image/png;charset=utf-8;base64,cGl4\r\nZWxz"}}
    messages = [{"role": "assistant", "content": None}, {"role": "user", "content": [folded]}]
    assert read_request(json.dumps({"messages": messages}).encode(), STYLES).image == b"pixels"


def test_a_stream_holds_the_answer_at_once() -> None:
    body = completion("7", "m", "A dog.", (3, 2), is_cut=True)
    lines = chunks(body).decode().split("\n\n")
    first, second = (json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:2])
    assert first["delta"]["content"] == "A dog."
    assert (first["finish_reason"], second["finish_reason"], lines[2]) == (None, "length", "data: [DONE]")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
