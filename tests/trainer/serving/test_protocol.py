"""Chat requests: what they select, and why they are refused."""

import base64
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference import protocol
from trainer.serving.protocol import RefusedError, answer_text, chunks, completion, error_body, read_request

IMAGE_URL = f"data:image/png;base64,{base64.b64encode(b'pixels').decode()}"
PROMPTS = [("human", "brief"), ("synthetic", "detailed"), ("synthetic", "")]


def image_part(url: str = IMAGE_URL) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def body_of(content: Any, **values: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], **values}).encode()


def chat(text: str = "", **values: Any) -> bytes:
    return body_of([image_part(), {"type": "text", "text": text}], **{"model": "m", **values})


def schema_of(**properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def test_last_text_and_image_of_a_conversation_are_read() -> None:
    url = f"data:image/png;base64,{base64.b64encode(b'second').decode()}"
    turns = [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": [image_part(), {"type": "text", "text": "detailed"}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [image_part(url), {"type": "text", "text": "How many dogs are there?"}]},
    ]
    request = read_request(json.dumps({"messages": turns}).encode(), PROMPTS)
    assert (request.prompt, request.image) == (("synthetic", "", "How many dogs are there?"), b"second")
    first = read_request(json.dumps({"messages": turns[:3]}).encode(), PROMPTS)
    assert (first.prompt, first.image) == (("synthetic", "detailed", ""), b"pixels")


def test_caption_is_returned_in_the_property_named_by_the_schema() -> None:
    request = read_request(chat(response_format=schema_of(caption={"type": "string"})), PROMPTS)
    assert json.loads(answer_text(request, 'A "dog".')) == {"caption": 'A "dog".'}
    assert answer_text(read_request(chat(), PROMPTS), "A dog.") == "A dog."


def test_probe_from_synth_generate_is_answered_with_the_only_allowed_value() -> None:
    request = read_request(protocol.probe("m"), PROMPTS)
    body = completion("1", "m", answer_text(request, request.only or ""), (0, 0), is_cut=False)
    assert request.image is None
    answer = protocol.parse_answer(json.dumps(body).encode())
    assert answer and json.loads(answer.text) == {"word": protocol.PROBE_WORD}


def test_sampling_and_length_settings_of_a_request_are_read() -> None:
    request = read_request(chat(temperature=0.7, top_p=0.9, max_completion_tokens=5, stream=True), PROMPTS)
    assert (request.temperature, request.top_p, request.max_tokens, request.streams) == (0.7, 0.9, 5, True)
    names = ("temperature", "top_p", "max_completion_tokens", "n", "stream", "stop", "seed")
    nulls: dict[str, Any] = dict.fromkeys(names)
    assert read_request(chat(max_tokens=5, **nulls), PROMPTS).max_tokens == 5
    assert read_request(chat(top_p=0), PROMPTS).top_p < 0.01
    max_tokens = read_request(chat(max_tokens=16.0), PROMPTS).max_tokens
    assert max_tokens == 16 and isinstance(max_tokens, int)
    # transformers accepts only floats.
    assert isinstance(read_request(chat(temperature=2), PROMPTS).temperature, float)


BAD: dict[str, bytes] = {
    "not JSON": b"{",
    "deep": b'{"a":' * 100_000,
    "not UTF-8": b'{"messages": "\xff"}',
    "no messages": json.dumps({"model": "m"}).encode(),
    "content is a number": body_of(3),
    "text is a number": body_of([{"type": "text", "text": 3}]),
    "no image": body_of("Describe this."),
    "audio": body_of([image_part(), {"type": "input_audio"}]),
    "an address": body_of([image_part("http://169.254.169.254/")]),
    "file URL": body_of([image_part("file:///etc/passwd")]),
    "not base64": body_of([image_part("data:image/png;base64,%%%")]),
    "image without URL": body_of([{"type": "image_url"}]),
    "several answers": chat(n=2),
    "temperature is a text": chat(temperature="hot"),
    "temperature is NaN": chat(temperature=float("nan")),
    "no tokens": chat(max_tokens=0),
    "model is a list": chat(model=["m"]),
    "unknown style": chat("Task: caption, poem"),
    "long question": chat("why " * 1000 + "?"),
    "two properties": chat(response_format=schema_of(a={"type": "string"}, b={"type": "string"})),
    "URL is a number": body_of([{"type": "image_url", "image_url": 3}]),
    "address as a string": body_of([{"type": "image_url", "image_url": "http://169.254.169.254/"}]),
    "tokens are a text": chat(max_tokens="5"),
    "half of a surrogate": b'{"messages": [{"role": "user", "content": "\\ud800?"}]}',
    "long text": chat("Question: x" + " " * 100_000 + "y"),
    "no schema": chat(response_format={"type": "json_schema"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_request_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(RefusedError) as refused:
        read_request(BAD[name], PROMPTS)
    assert 400 <= refused.value.status < 500
    assert 5 < len(str(refused.value)) < 200
    # The message contains no names of pydantic models or types.
    assert not re.search(r"\b_[A-Z]|\[", str(refused.value))
    assert error_body(str(refused.value), 400)["error"]["type"] == "invalid_request_error"


KEYS = st.sampled_from(["role", "content", "type", "text", "image_url", "url"])
FIELDS = st.sampled_from(["n", "messages", "model", "stop", "temperature", "response_format", "max_tokens"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(FIELDS, JSON))
def test_random_request_is_read_or_refused_without_another_error(values: dict[str, Any]) -> None:
    try:
        read_request(json.dumps(json.loads(chat()) | values).encode(), PROMPTS)
    except RefusedError as refused:
        assert str(refused)


def test_stop_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"^stop is not supported$"):
        read_request(chat(stop=["dog"]), PROMPTS)


def test_image_url_may_be_a_plain_string() -> None:
    body = body_of([{"type": "image_url", "image_url": IMAGE_URL}], stop=[])
    assert read_request(body, PROMPTS).image == b"pixels"


def test_tool_turn_and_folded_base64_are_read() -> None:
    folded = image_part("data:image/png;charset=utf-8;base64,cGl4\r\nZWxz")
    messages = [{"role": "assistant", "content": None}, {"role": "user", "content": [folded]}]
    assert read_request(json.dumps({"messages": messages}).encode(), PROMPTS).image == b"pixels"


def test_stream_has_the_whole_answer_in_its_first_event() -> None:
    body = completion("7", "m", "A dog.", (3, 2), is_cut=True)
    events = chunks(body).decode().split("\n\n")
    first, second = (json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:2])
    assert first["delta"]["content"] == "A dog."
    assert (first["finish_reason"], second["finish_reason"], events[2]) == (None, "length", "data: [DONE]")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
