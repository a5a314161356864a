"""Probing: a run adapts to the fields of each kind of server; keys go only to their servers."""

import json
import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EngineError
from pipeline.inference import client, protocol
from pipeline.inference.journal import Journal
from tests.chat.kinds import IGNORES_SCHEMAS, KINDS, PROXY, ServerKind, refuse
from tests.chat.server import Act, ChatServer, running_chat, task_of
from tests.clients import client_of, config_of, endpoints_of, model_of
from tests.notes import Notes
from tests.plans import ask, stored_annotations
from tests.scene_data import batch_of, scene_samples

SAMPLES = scene_samples(4)
FIELDS = {"temperature", "top_p", "max_tokens", "response_format"}
LEFT_OUT = {"openai that thinks": {"temperature", "top_p", "max_tokens"}}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "FIRST_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(client, "GROUP_SECONDS", 0.05)


def run(
    path: Path, chat: ChatServer, max_tokens: int = 400, **server: Any
) -> tuple[list[str | None], list[str], str]:
    """Ask about the samples; return the errors of all annotations, the messages, and the model revision."""
    notes = Notes()
    generate = {"max_tokens": max_tokens}
    config = config_of(chat.url, server={"concurrency": 4, **server}, generate=generate)
    name, revision = model_of(config)
    with Journal(path) as journal, ExitStack() as stack:
        chunks = iter([batch_of(SAMPLES)])
        engine = lambda: stack.enter_context(client_of(config, name, notes))  # noqa: E731
        ask(config, chunks, engine, journal, revision=revision)
        table = stored_annotations(config, [sample.id for sample in SAMPLES], journal, revision)
    return table["reply_error"].to_pylist(), notes.texts, revision


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_requests_have_exactly_the_fields_that_the_server_supports(kind: ServerKind, tmp_path: Path) -> None:
    with running_chat(ChatServer(kind=kind)) as chat:
        errors, texts, revision = run(tmp_path / "j", chat)
    assert errors == [None] * 3 * len(SAMPLES) and "unenforced" not in revision
    left_out = LEFT_OUT.get(kind.name, set())
    for body in chat.bodies:
        image = next(part for part in body["messages"][1]["content"] if part["type"] == "image_url")
        assert ("uuid" in image) == ("repetition_detection" in body) == (kind.name == "vllm")
        assert FIELDS - body.keys() == left_out
        assert body["response_format"]["type"] == "json_schema"
    assert len(chat.bodies) == 3 * len(SAMPLES)
    assert len(chat.refused) == len(left_out)
    messages = " ".join(texts)
    assert all(name in messages for name in left_out) and ("left out" in messages) == bool(left_out)
    assert ("not greedy" in messages) == ("temperature" in left_out)


@pytest.mark.parametrize("kind", [PROXY, IGNORES_SCHEMAS], ids=lambda kind: kind.name)
def test_server_without_schemas_is_refused_unless_enforced_schema_is_off(
    kind: ServerKind, tmp_path: Path
) -> None:
    def script(times: int, body: dict[str, Any]) -> Act | None:
        assert "follows this JSON schema" in body["messages"][1]["content"][-1]["text"]
        return None if times else Act('{"wrong": true}')

    with running_chat(ChatServer(script, kind=kind)) as chat:
        with pytest.raises(EngineError, match="does not enforce JSON schemas") as refused:
            run(tmp_path / "strict", chat)
        assert "--no-enforced-schema" in refused.value.hint and not chat.bodies
        errors, texts, revision = run(tmp_path / "loose", chat, enforced_schema=False)
    assert errors == [None] * 3 * len(SAMPLES)
    retried = [body for body in chat.bodies if task_of(body) == "Task: qa"]
    assert len(retried) == 2 * len(SAMPLES)  # the first reply to each request was invalid
    assert revision.endswith("+unenforced")
    assert any("does not enforce JSON schemas" in text for text in texts)
    assert not any("response_format" in body for body in chat.bodies)


def test_unreachable_server_or_missing_model_list_is_an_error_with_hint(tmp_path: Path) -> None:
    with running_chat(ChatServer(kind=PROXY)) as chat:
        with pytest.raises(EngineError, match="does not list its models") as unnamed:
            model_of(config_of(chat.url, model=None))
        assert "--model" in unnamed.value.hint
        with pytest.raises(EngineError, match=r"no server answers at .*Connect call failed") as unreachable:
            model_of(config_of("http://127.0.0.1:9/v1", model=None))
        assert "synth serve" in unreachable.value.hint
        with pytest.raises(EngineError, match="does not exist"):
            other = config_of(chat.url, model="other", server={"enforced_schema": False})
            client_of(other, "other").__enter__()


def test_second_server_with_another_model_is_refused() -> None:
    with (
        running_chat(ChatServer()) as chat,
        running_chat(ChatServer(model="other")) as second,
        pytest.raises(EngineError, match=f"{second.url} does not serve model"),
    ):
        client_of(config_of(chat.url, second.url)).__enter__()


def thinking(tokens: int) -> ServerKind:
    """Return a kind of server whose model thinks for `tokens` tokens before it writes."""

    def think(body: dict[str, Any]) -> tuple[int, Any] | None:
        message = {"role": "assistant", "content": None, "reasoning": "The user says hello. So"}
        is_cut = body["max_tokens"] <= tokens
        return (200, {"choices": [{"message": message, "finish_reason": "length"}]}) if is_cut else None

    return ServerKind(name="thinks", model_fields={}, extra=think)


def refusing(message: str, status: int = 400) -> ServerKind:
    return ServerKind(name="refuses", model_fields={}, extra=lambda body: refuse(message, status))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (refusing("Your credit is too low."), {"enforced_schema": False}, "first request: Your credit is"),
        (refusing("max_tokens is too large: 256. This model allows 100."), {}, "max_tokens"),
        (thinking(1000), {}, "uses more than 400 reasoning tokens"),
        (refusing("Slow down.", 429), {"startup_timeout_s": 0.1}, "answers 429 to every request"),
    ],
)
def test_refused_first_request_ends_the_run_with_the_reason_of_the_server(
    kind: ServerKind, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with running_chat(ChatServer(kind=kind)) as chat, pytest.raises(EngineError, match=message) as caught:
        run(tmp_path / "j", chat, **settings)
    assert "schema" not in str(caught.value) and not chat.bodies


@pytest.mark.parametrize(
    "answer", [b'{"error": {"message": "sk-very-secret is bad"}}', b"data: sk-very-secret is bad"]
)
def test_probe_error_hides_the_key(answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTH_API_KEY", "sk-very-secret")
    chat = ChatServer()
    chat.probe_answer = answer
    with running_chat(chat), pytest.raises(EngineError, match=r"with an error: .*\[key\] is bad"):
        run(tmp_path / "j", chat)


@pytest.mark.parametrize(
    "kind",
    [thinking(1000), ServerKind(name="a server that thinks", model_fields={}, in_parts=True)],
    ids=["in tokens", "in parts"],
)
def test_thinking_model_is_accepted_if_max_tokens_suffices(kind: ServerKind, tmp_path: Path) -> None:
    with running_chat(ChatServer(kind=kind)) as chat:
        errors, texts, _ = run(tmp_path / "j", chat, max_tokens=4000)
    assert set(errors) == {None} and not any("schema" in text for text in texts)


def test_refusal_field_is_stored_as_a_reply(tmp_path: Path) -> None:
    message = {"role": "assistant", "refusal": "I cannot help with that."}
    refusal = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}).encode()
    script = lambda times, body: Act(raw=refusal) if task_of(body) == "Task: qa" else None  # noqa: E731
    with running_chat(ChatServer(script)) as chat:
        errors, _, _ = run(tmp_path / "j", chat)
        assert Counter(errors) == {None: 2 * len(SAMPLES), "content_filter": len(SAMPLES)}
        asked = len(chat.bodies)
        run(tmp_path / "j", chat)
    assert len(chat.bodies) == asked == 5 * len(SAMPLES)  # each refused request is retried twice


@pytest.mark.parametrize(
    ("served", "others", "wanted", "found"),
    [
        ("tiny@c0ffee", [], None, "tiny@c0ffee"),
        ("tiny@c0ffee", [], "tiny", "tiny@c0ffee"),
        ("models/gemma", [], "gemma", "models/gemma"),
        ("qwen@q8_0", ["qwen"], "qwen", "qwen"),  # an exact match has priority
        ("m@abc", ["m@def"], "m", "m matches several models"),
        ("a", ["b"], None, "serves 2 models"),
        ("llama", [], "model", "does not serve model"),
        ("house-vlm", [], "hause-vlm", "does not serve hause-vlm"),
    ],
)
def test_model_is_found_by_its_full_or_short_name(
    served: str, others: list[str], wanted: str | None, found: str
) -> None:
    with running_chat(ChatServer(model=served)) as chat:
        chat.other_models = others
        config = config_of(chat.url, model=wanted)
        if " " not in found:
            assert model_of(config)[0] == found
            return
        with pytest.raises(EngineError, match=found) as caught:
            model_of(config)
        assert all(name in caught.value.hint for name in (served, *others))
        assert caught.value.hint.startswith("did you mean house-vlm?") == (wanted == "hause-vlm")


def test_revision_is_read_from_the_model_name_or_hashed_from_name_and_root() -> None:
    def revision(model: str, root: str = "") -> str:
        with running_chat(ChatServer(model=model)) as chat:
            chat.model_root = root
            return model_of(config_of(chat.url, model=None))[1]

    digest, commit = "c0ffee" * 2 + "1234", "c0ffee1234" * 4
    for stated in (digest, commit, f"{digest}+0a1b2c3d"):
        assert revision(f"tiny@{stated}") == stated
    digests = [revision(name) for name in ("a@q4_k_m", "b@q4_k_m", "a@c0ffee", f"a@{digest}0")]
    assert len(set(digests)) == 4 and all(re.fullmatch("[0-9a-f]{16}", one) for one in digests)
    assert revision("m", "/models/a") == revision("m", "/models/a") != revision("m", "/models/b")


def test_api_key_from_the_environment_is_sent_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_chat(ChatServer()) as chat:
        chat.key = "sesame-7"
        with pytest.raises(EngineError, match="requires an API key, but none is set") as caught:
            model_of(config_of(chat.url, model=None))
        assert "SYNTH_API_KEY" in caught.value.hint
        monkeypatch.setenv("SYNTH_API_KEY", "sesame-7")
        assert model_of(config_of(chat.url, model=None))[0] == "model"


def test_key_and_headers_go_only_to_their_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SYNTH_API_KEY", raising=False)
    with running_chat(ChatServer()) as chat:
        monkeypatch.setenv("OPENAI_API_KEY", "of-openai")
        run(tmp_path / "a", chat)
        assert chat.authorizations == {None}  # this is not OpenAI's server
        monkeypatch.setenv("MY_KEY", "mine")
        run(tmp_path / "b", chat, key_env="MY_KEY", headers={"X-Title": "synth", "api-key": "$MY_KEY"})
        assert chat.authorizations == {None, "Bearer mine"}
        assert {(one.get("X-Title"), one.get("api-key")) for one in chat.headers[-5:]} == {("synth", "mine")}
        with pytest.raises(EngineError, match=r"uses \$NO_SUCH, but this environment variable is not set"):
            run(tmp_path / "c", chat, headers={"api-key": "$NO_SUCH"})
    openai, other = endpoints_of(config_of("https://api.openai.com/v1", "https://evil-openai.com/v1"))
    assert openai.headers["Authorization"] == "Bearer of-openai" and "Authorization" not in other.headers


def test_servers_of_another_model_get_only_their_own_key_and_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTH_API_KEY", "of-all")
    writer, other = "http://127.0.0.1:1/w/v1", "http://127.0.0.1:1/j/v1"

    def headers_for(address: str, name: str) -> tuple[str | None, str | None]:
        config = config_of(
            writer, model="m", server={"headers": {"X-All": "b"}},
            verify={"judge": f"big@{address}"}, models={"small": {"model": "s", "base_url": [address]}},
        )  # fmt: skip
        (endpoint,) = endpoints_of(config.of_model(name))
        return endpoint.headers.get("Authorization"), endpoint.headers.get("X-All")

    for name in ("judge", "small"):
        assert headers_for(other, name) == (None, None)
        # The address of the captioning model with a trailing slash is the same server.
        assert headers_for("http://127.0.0.1:1/w/v1/", name) == ("Bearer of-all", "b")
        monkeypatch.setenv(f"SYNTH_{name.upper()}_API_KEY", f"of-{name}")
        for address in (writer, other):
            assert headers_for(address, name) == (f"Bearer of-{name}", None)
    monkeypatch.setenv("EXAMPLE_KEY", "of-example")
    own = {"base_url": [other], "key_env": "EXAMPLE_KEY", "headers": {"X-All": "own"}}
    (endpoint,) = endpoints_of(config_of(writer, model="m", models={"small": own}).of_model("small"))
    assert (endpoint.headers["Authorization"], endpoint.headers["X-All"]) == ("Bearer of-example", "own")
