"""Probing: of each kind of server it is found out what it takes, and a run on it loses nothing."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pipeline.config.files import resolve
from pipeline.errors import ConfigError, EngineError
from pipeline.inference import client, judge, retry
from pipeline.inference.client import Client
from pipeline.inference.journal import Journal
from pipeline.inference.named_endpoints import named_endpoints
from pipeline.inference.pace import Pace
from pipeline.inference.queue import RequestStats, ask_about, read_annotations
from pipeline.inference.served_models import find_model
from pipeline.types import SampleInfo
from tests.chat.kinds import DEEPSEEK, KINDS, LOOSE, PLAIN, PROXY, ServerKind
from tests.chat.server import Act, ChatServer, Script, running_chat, task_of
from tests.notes import Notes
from tests.scene_data import batch_of, scene_samples

SAMPLES = scene_samples(10)
LEFT_OUT = {
    "deepinfra": {"repetition_detection"},
    "openai": {"repetition_detection", "uuid"},
    "openai that thinks": {"repetition_detection", "uuid", "temperature", "top_p", "max_tokens"},
    "gemini": {"repetition_detection", "uuid"},
    "mistral": {"repetition_detection", "uuid"},
}
EVERYTHING = {"repetition_detection", "temperature", "top_p", "max_tokens", "response_format"}


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(client, "GROUP_SECONDS", 0.05)
    yield


def ask(path: Path, chat: ChatServer, **server: Any) -> tuple[list[str | None], list[str], str]:
    """Ask about the samples; return the errors of all annotations, what a user reads, and the revision of the model."""
    notes = Notes()
    config = resolve(source="scenes", base_url=[chat.url], model="model", server={"concurrency": 4, **server})
    name, revision = find_model(config)
    with Journal(path) as journal, ExitStack() as stack:
        chunks = iter([batch_of(SAMPLES)])
        engine = lambda: stack.enter_context(Client(name, revision, config, progress=notes))  # noqa: E731
        for _ in ask_about(chunks, config, revision, engine, journal, RequestStats()):
            pass
        (table,) = read_annotations([[SampleInfo(sample.id, 1) for sample in SAMPLES]], config, revision, journal)
    return table["reply_error"].to_pylist(), notes.texts, revision


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_server_gets_all_that_it_takes_and_nothing_else(kind: ServerKind, tmp_path: Path) -> None:
    with running_chat(ChatServer(kind=kind)) as chat:
        errors, texts, revision = ask(tmp_path / "j", chat)
    assert errors == [None] * 3 * len(SAMPLES) and "unenforced" not in revision
    left_out = LEFT_OUT.get(kind.name, set())
    for body in chat.bodies:
        image = next(part for part in body["messages"][1]["content"] if part["type"] == "image_url")
        assert ("uuid" in image) == ("uuid" not in left_out)
        assert EVERYTHING - body.keys() == left_out - {"uuid"}
        assert body["response_format"]["type"] == "json_schema"
    assert len(chat.bodies) == 3 * len(SAMPLES)
    assert len(chat.refused) <= 4 + len(left_out)  # those in flight, and one for each field
    said = " ".join(texts)
    assert all(name in said for name in left_out) and ("left out" in said) == bool(left_out)
    assert ("not greedy" in said) == ("temperature" in left_out)


@pytest.mark.parametrize("kind", LOOSE, ids=lambda kind: kind.name)
def test_a_server_that_enforces_no_schema_is_taken_only_if_that_is_said(kind: ServerKind, tmp_path: Path) -> None:
    flawed = {"count": 0}

    def script(times: int, body: dict[str, Any]) -> Act | None:
        assert "follows this JSON schema" in body["messages"][1]["content"][-1]["text"]
        if times:
            return None
        flawed["count"] += 1
        return Act('{"wrong": true}') if flawed["count"] % 2 else Act("No JSON.")

    with running_chat(ChatServer(script, kind=kind)) as chat:
        with pytest.raises(EngineError, match="does not enforce JSON schemas") as refused:
            ask(tmp_path / "strict", chat)
        assert "--no-enforced-schema" in refused.value.hint and not chat.bodies
        errors, texts, revision = ask(tmp_path / "loose", chat, enforced_schema=False)
    assert errors == [None] * 3 * len(SAMPLES)  # each first reply was bad, and asked for again
    assert flawed["count"] == 3 * len(SAMPLES)
    assert revision.endswith("+unenforced")
    assert any("does not enforce JSON schemas" in text for text in texts)
    formats = {body.get("response_format", {"type": "text"})["type"] for body in chat.bodies}
    assert formats == {"json_object" if kind is DEEPSEEK else "text"}


def test_a_server_that_ignores_schemas_is_refused_and_one_that_enforces_them_is_used_so(tmp_path: Path) -> None:
    with running_chat(ChatServer(schemas=False)) as chat:
        with pytest.raises(EngineError, match="does not enforce JSON schemas"):
            ask(tmp_path / "a", chat)
        errors, _, _ = ask(tmp_path / "b", chat, enforced_schema=False)
        assert set(errors) == {None} and {body["response_format"]["type"] for body in chat.bodies} == {"json_object"}
    with running_chat(ChatServer()) as chat:
        ask(tmp_path / "c", chat, enforced_schema=False)
        assert {body["response_format"]["type"] for body in chat.bodies} == {"json_schema"}


def test_a_server_without_a_list_of_models_needs_the_name_of_one(tmp_path: Path) -> None:
    with running_chat(ChatServer(kind=PROXY)) as chat:
        with pytest.raises(EngineError, match="does not list its models") as unnamed:
            find_model(resolve(source="scenes", base_url=[chat.url]))
        assert "--model" in unnamed.value.hint
        with pytest.raises(EngineError, match="does not exist"):
            other = resolve(source="scenes", base_url=[chat.url], model="other", server={"enforced_schema": False})
            with Client("other", "r", other):
                pass


def test_a_refusal_that_names_nothing_of_ours_is_shown(tmp_path: Path) -> None:
    def full(times: int, body: dict[str, Any]) -> Act:
        return Act(status=400, raw=b'{"error":{"message":"This model takes no images."}}')

    script: Script = full
    with running_chat(ChatServer(script)) as chat, pytest.raises(EngineError, match="This model takes no images"):
        ask(tmp_path / "j", chat)


def test_a_first_request_that_is_refused_for_another_reason_is_no_matter_of_schemas(tmp_path: Path) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, Any]:
        return 400, {"error": {"message": "Your credit balance is too low."}}

    kind = ServerKind(name="poor", model_fields={}, extra=refuse)
    for settings in ({}, {"enforced_schema": False}):
        with running_chat(ChatServer(kind=kind)) as chat, pytest.raises(EngineError, match="credit balance") as caught:
            ask(tmp_path / "j", chat, **settings)
        assert "schema" not in str(caught.value)


def test_an_address_without_a_path_is_that_of_v1(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        chat.url = chat.url.removesuffix("/v1")
        errors, _, _ = ask(tmp_path / "j", chat)
    assert set(errors) == {None}


def test_a_key_and_headers_come_from_the_environment_and_go_to_their_server_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SYNTH_API_KEY", raising=False)
    with running_chat(ChatServer()) as chat:
        monkeypatch.setenv("OPENAI_API_KEY", "of-openai")
        ask(tmp_path / "a", chat)
        assert chat.authorizations == {None}  # it is no server of OpenAI's
        monkeypatch.setenv("MY_KEY", "mine")
        ask(tmp_path / "b", chat, key_env="MY_KEY", headers={"X-Title": "synth", "api-key": "$MY_KEY"})
        assert chat.authorizations == {None, "Bearer mine"}
        assert {(headers.get("X-Title"), headers.get("api-key")) for headers in chat.headers[-5:]} == {("synth", "mine")}
        with pytest.raises(EngineError, match=r"\$NO_SUCH, which is not set"):
            ask(tmp_path / "c", chat, headers={"api-key": "$NO_SUCH"})
    config = resolve(source="scenes", base_url=["https://api.openai.com/v1", "https://evil-openai.com/v1"])
    assert [endpoint.headers.get("Authorization") for endpoint in named_endpoints(config)] == ["Bearer of-openai", None]


def test_each_of_two_servers_has_its_own_key_headers_pace_and_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTH_API_KEY", "of-all")
    monkeypatch.setenv("SECOND_KEY", "of-second")
    slow = lambda times, body: Act(seconds=0.2)  # noqa: E731  # answers take longer than all else: all places are in use
    with running_chat(ChatServer(slow)) as first, running_chat(ChatServer()) as second:
        second.script = first.script
        own = {"key_env": "SECOND_KEY", "headers": {"X-Title": "mine"}, "requests_per_minute": 9e6, "weight": 3}
        server = {
            "headers": {"X-All": "yes"},
            "tokens_per_minute": 1e9,
            "concurrency": 16,
            "endpoints": {f"{second.url}/": own},
        }
        config = resolve(source="scenes", base_url=[first.url, second.url], model="model", server=server)
        chunks = iter([batch_of(scene_samples(60))])
        with Client("model", "r", config) as engine, Journal(tmp_path / "j") as journal:
            for _ in ask_about(chunks, config, "r", lambda: engine, journal, RequestStats()):
                pass
            paces = [(endpoint.pace.requests_per_minute, endpoint.pace.tokens_per_minute) for endpoint in engine._endpoints]
    assert paces == [(None, 1e9), (9e6, 1e9)]
    assert (first.authorizations, second.authorizations) == ({"Bearer of-all"}, {"Bearer of-second"})
    assert {(headers.get("X-All"), headers.get("X-Title")) for headers in first.headers} == {("yes", None)}
    assert {(headers.get("X-All"), headers.get("X-Title")) for headers in second.headers} == {("yes", "mine")}
    assert len(first.bodies) + len(second.bodies) == 180
    assert len(second.bodies) > 1.5 * len(first.bodies)
    with pytest.raises(ConfigError, match="describes http://elsewhere/v1, and base_url names"):
        resolve(source="scenes", base_url=[first.url], server={"endpoints": {"http://elsewhere/v1": {}}})


def test_a_server_with_a_pace_gets_what_it_may_answer_and_holds_up_nobody(tmp_path: Path) -> None:
    slow = lambda times, body: Act(seconds=0.01)  # noqa: E731
    with running_chat(ChatServer(slow)) as paced, running_chat(ChatServer(slow)) as free:
        server = {"concurrency": 16, "endpoints": {paced.url: {"requests_per_minute": 60}}}
        config = resolve(source="scenes", base_url=[paced.url, free.url], model="model", server=server)
        chunks = iter([batch_of(scene_samples(60))])
        with Client("model", "r", config) as engine, Journal(tmp_path / "j") as journal:
            for _ in ask_about(chunks, config, "r", lambda: engine, journal, RequestStats()):
                pass
    assert len(paced.bodies) + len(free.bodies) == 180
    assert 1 <= len(paced.bodies) <= 6  # one a second; of sixteen at once, half would have waited there


SPELLINGS = (
    "https://models.example.com",
    "https://MODELS.example.com/v1/",
    "https://models.example.com:443/v1/chat/completions",
)


@pytest.mark.parametrize("address", SPELLINGS)
def test_the_key_of_a_server_is_its_own_however_its_address_is_spelled(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTH_API_KEY", "of-local")
    monkeypatch.setenv("EXAMPLE_KEY", "of-example")
    own = {"key_env": "EXAMPLE_KEY", "headers": {"api-key": "example"}}
    server = {"headers": {"Api-Key": "all"}, "endpoints": {"https://models.example.com/v1": own}}
    config = resolve(source="scenes", base_url=["http://localhost:8000/v1", address], model="m", server=server)
    local, example = named_endpoints(config)
    assert (local.headers["Authorization"], example.headers["Authorization"]) == ("Bearer of-local", "Bearer of-example")
    assert [(name, value) for name, value in example.headers.items() if name.lower() == "api-key"] == [("api-key", "example")]
    assert example.url == "https://models.example.com/v1"


def test_a_judge_at_the_host_of_another_server_gets_neither_its_key_nor_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTH_API_KEY", "of-all")
    monkeypatch.setenv("SYNTH_JUDGE_API_KEY", "of-judge")
    monkeypatch.setenv("WRITER_KEY", "of-writer")
    asked: list[Any] = []

    def find(config: Any, key_name: str | None) -> tuple[str, str]:
        asked.extend(named_endpoints(config, key_name))
        return "big", "revision"

    monkeypatch.setattr(judge, "find_model", find)
    writer, other = "http://127.0.0.1:1/w/v1", "http://127.0.0.1:1/j/v1"
    own = {"key_env": "WRITER_KEY", "headers": {"X-Team": "a"}}
    for address, key, team in ((other, "of-judge", None), (writer, "of-writer", "a")):
        verify = {"judge": f"big@{address}", "judge_may_be_writer": True}
        config = resolve(source="scenes", base_url=[writer], model="m", server={"endpoints": {writer: own}}, verify=verify)
        judge.choose_judge(config, "r")
        assert (asked[-1].headers["Authorization"], asked[-1].headers.get("X-Team")) == (f"Bearer {key}", team)
    monkeypatch.delenv("SYNTH_JUDGE_API_KEY")
    verify = {"judge": f"big@{other}", "judge_may_be_writer": True}
    config = resolve(source="scenes", base_url=[writer], model="m", server={"endpoints": {writer: own}}, verify=verify)
    judge.choose_judge(config, "r")
    assert "Authorization" not in asked[-1].headers  # the key for all is not for a host whose servers have their own


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"base_url": ["http://127.0.0.1:99999/v1"]}, "Port out of range"),
        ({"server": {"headers": {"X-A": "b\r\nHost: evil"}}}, "the value of a header, on one line"),
        ({"server": {"endpoints": {"http://a/v1": {}, "http://A": {}}}, "base_url": ["http://a/v1"]}, "http://a/v1 twice"),
        ({"source": "video:x", "frame_seconds": float("inf")}, "bad value for frame_seconds"),
    ],
)
def test_an_address_or_a_value_that_cannot_be_is_one_error(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(**{"source": "scenes", **settings})


def test_what_a_file_says_of_servers_that_are_not_used_now_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "source: scenes\nbase_url: [http://a:1/v1, http://b:1/v1]\n"
        "server: {endpoints: {http://a:1: {weight: 2}, http://b:1/v1: {weight: 3}}}\n"
    )
    assert resolve(file).endpoint("http://b:1/v1/").weight == 3
    config = resolve(file, base_url=["http://a:1/v1"])
    assert [*config.server.endpoints] == ["http://a:1"] and config.endpoint("http://a:1/v1").weight == 2


def test_each_request_waits_for_the_pace_of_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Pace] = []

    class Counted(Pace):
        def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
            super().__init__(requests_per_minute, tokens_per_minute)
            self.taken = self.tokens = 0
            made.append(self)

        def take(self) -> float:
            self.taken += 1
            return 0.0

        def add_tokens(self, count: int) -> None:
            self.tokens += count

    monkeypatch.setattr("pipeline.inference.named_endpoints.Pace", Counted)
    with running_chat(ChatServer()) as chat:
        ask(tmp_path / "j", chat, requests_per_minute=7, tokens_per_minute=900)
    pace = made[-1]  # that of the run; another is made when its model is looked up
    assert (pace.requests_per_minute, pace.tokens_per_minute) == (7, 900)
    assert (pace.taken, pace.tokens) == (3 * len(SAMPLES), 3 * len(SAMPLES) * 52)  # type: ignore[attr-defined]


def test_a_server_that_was_down_at_first_is_learned_when_it_comes(tmp_path: Path) -> None:
    strict = next(kind for kind in KINDS if kind.name == "openai that thinks")
    first, second = ChatServer(lambda times, body: Act(seconds=0.1)), ChatServer(kind=strict)
    with running_chat(second):
        port = int(second.url.split(":")[2].split("/")[0])
    config = resolve(source="scenes", base_url=[second.url], model="model", server={"concurrency": 4})
    with running_chat(first), ExitStack() as stack, Journal(tmp_path / "j") as journal:
        config = config.model_copy(update={"base_url": (first.url, second.url)})
        chunks = iter([batch_of(scene_samples(60))])
        started = False
        engine = lambda: stack.enter_context(Client("model", "r", config))  # noqa: E731
        for _ in ask_about(chunks, config, "r", engine, journal, RequestStats()):
            if not started:
                stack.enter_context(running_chat(second, port))
                started = True
        assert journal.totals()["replies"] == 180
    assert second.bodies and not any("temperature" in body for body in second.bodies)


def test_a_field_that_is_refused_late_is_left_out_from_then_on(tmp_path: Path) -> None:
    came: list[int] = []

    def refuse(body: dict[str, Any]) -> tuple[int, Any] | None:
        came.append(1)
        if len(came) < 4 or "temperature" not in body:
            return None
        return 400, {"error": {"message": "Unsupported value: 'temperature' does not support 0 with this model."}}

    with running_chat(ChatServer(kind=ServerKind(name="a router", model_fields={}, extra=refuse))) as chat:
        errors, texts, _ = ask(tmp_path / "j", chat)
    assert set(errors) == {None} and any("left out: temperature" in text for text in texts)


def test_a_refusal_in_a_field_of_its_own_is_a_reply_that_is_kept(tmp_path: Path) -> None:
    message = {"role": "assistant", "refusal": "I cannot help with that."}
    refusal = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}).encode()
    parts = {"role": "assistant", "content": [{"type": "text", "text": '{"caption":"A small '}, {"text": 'red ring."}'}]}
    in_parts = json.dumps({"choices": [{"message": parts}], "usage": {}}).encode()
    parsed = {"message": {"content": {"caption": "A small red ring."}}, "finish_reason": {"type": "stop"}}
    as_object = json.dumps({"choices": [parsed], "usage": {}}).encode()

    def script(times: int, body: dict[str, Any]) -> Act | None:
        task = task_of(body)
        return Act(raw=refusal) if task == "Task: qa" else Act(raw=in_parts if task.endswith("brief") else as_object)

    with running_chat(ChatServer(script)) as chat:
        errors, _, _ = ask(tmp_path / "j", chat)
        assert Counter(errors) == {None: 2 * len(SAMPLES), "content_filter": len(SAMPLES)}
        asked = len(chat.bodies)
        ask(tmp_path / "j", chat)
    assert len(chat.bodies) == asked == 5 * len(SAMPLES)  # a refusal is asked for again twice, and then it is one


def test_texts_in_parts_prove_schemas_and_are_replies_without_the_thought(tmp_path: Path) -> None:
    with running_chat(ChatServer(kind=ServerKind(name="a server that thinks", model_fields={}, in_parts=True))) as chat:
        errors, texts, _ = ask(tmp_path / "j", chat)
    assert set(errors) == {None} and not any("schema" in text for text in texts)


def test_an_address_may_name_the_whole_path_and_a_key_may_end_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTH_API_KEY", "mine\r\n")
    with running_chat(ChatServer()) as chat:
        chat.url += "/chat/completions"
        ask(tmp_path / "j", chat)
        assert chat.authorizations == {"Bearer mine"}


def thinking(tokens: int) -> ServerKind:
    """Return a kind of server whose model thinks for so many tokens before it says a word."""

    def think(body: dict[str, Any]) -> tuple[int, Any] | None:
        if body["max_tokens"] > tokens:
            return None
        message = {"role": "assistant", "content": None, "reasoning": "The user says hello. So"}
        return 200, {"choices": [{"message": message, "finish_reason": "length"}]}

    return ServerKind(name="thinks", model_fields={}, extra=think)


def test_a_model_that_thinks_first_is_taken_if_replies_have_the_tokens_for_it(tmp_path: Path) -> None:
    config = resolve(source="scenes", model="model", generate={"max_tokens": 4000}, tasks=["caption"])
    with running_chat(ChatServer(kind=thinking(1000))) as chat, Journal(tmp_path / "j") as journal, ExitStack() as stack:
        asked = config.model_copy(update={"base_url": (chat.url,)})
        engine = stack.enter_context(Client("model", "r", asked))
        for _ in ask_about(iter([batch_of(SAMPLES)]), asked, "r", lambda: engine, journal, RequestStats()):
            pass
        (table,) = read_annotations([[SampleInfo(sample.id, 1) for sample in SAMPLES]], asked, "r", journal)
    assert set(table["reply_error"].to_pylist()) == {None}


def test_a_model_that_thinks_longer_than_a_reply_may_be_is_refused_for_that(tmp_path: Path) -> None:
    with (
        running_chat(ChatServer(kind=thinking(1000))) as chat,
        pytest.raises(EngineError, match="thinks for more than") as caught,
    ):
        ask(tmp_path / "j", chat)
    assert "max_tokens" in caught.value.hint and not chat.bodies


@pytest.mark.parametrize("reason", ["eos", "eos_token", "end_turn", "STOP"])
def test_a_reply_that_has_ended_is_one_however_a_server_says_so(tmp_path: Path, reason: str) -> None:
    with running_chat(ChatServer(lambda times, body: Act(finish_reason=reason))) as chat:
        errors, *_ = ask(tmp_path / "j", chat)
    assert set(errors) == {None}


@pytest.mark.parametrize(
    "listed",
    [b'[{"id": "model", "context_length": 4096}]', b'{"data": [{"id": "model"}]}', b"<html>models</html>", b"[1]", b""],
)
def test_a_list_of_models_may_be_bare_or_no_list_at_all(tmp_path: Path, listed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async def models(self: ChatServer, request: web.Request) -> web.Response:
        return web.Response(body=listed)

    monkeypatch.setattr(ChatServer, "_models", models)
    with running_chat(ChatServer()) as chat:
        errors, *_ = ask(tmp_path / "j", chat)
    assert set(errors) == {None}


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ({"max_completion_tokens"}, "max_tokens (max_completion_tokens is sent)"),
        (set(), "max_tokens"),
    ],
)
def test_a_server_that_knows_no_max_tokens_is_asked_without(tmp_path: Path, known: set[str], told: str) -> None:
    """Its refusal names no other limit."""
    openai = next(kind for kind in KINDS if kind.name == "openai")
    strict = dataclasses.replace(openai, fields=PLAIN - {"max_tokens", "max_completion_tokens"} | known)
    with running_chat(ChatServer(kind=strict)) as chat:
        errors, texts, _ = ask(tmp_path / "j", chat)
    assert {*errors} == {None}
    assert any(text.endswith(f"left out: repetition_detection, uuid, {told}") for text in texts), texts


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large: 256. This model allows 100.",
        "Invalid max_tokens value, the valid range of max_tokens is [1, 128]",
        "Invalid 'max_tokens': integer above maximum value. Expected a value <= 128, but got 256 instead.",
        "max_tokens: 256 > 128, which is the maximum allowed number of output tokens",
    ],
)
def test_a_limit_that_is_too_large_is_no_unknown_field(tmp_path: Path, message: str) -> None:
    refusal = 400, {"error": {"message": message, "type": "invalid_request_error"}}
    small = ServerKind(name="small", model_fields={}, extra=lambda body: refusal)
    with running_chat(ChatServer(kind=small)) as chat, pytest.raises(EngineError, match="max_tokens"):
        ask(tmp_path / "j", chat)
