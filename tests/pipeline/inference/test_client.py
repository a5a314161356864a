"""Client against a scripted server over real sockets: each request ends in one stored reply."""

import asyncio
import io
import json
import logging
import signal
import threading
import time
from base64 import b64decode
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pipeline.errors import EngineError
from pipeline.images.decode import PATCH_PX
from pipeline.inference import client, endpoints, protocol
from pipeline.inference.client import FIRST_REQUESTS, MAX_REQUESTS, Client, Concurrency
from pipeline.inference.endpoints import Endpoint
from pipeline.inference.journal import Journal
from pipeline.inference.protocol import MAX_LONG_WAITS, RetryState
from pipeline.inference.queue import RequestStats
from pipeline.inference.requests import build_requests
from pipeline.progress import Progress
from pipeline.types import Sample, Sampling
from tests.chat.kinds import PROXY, VLLM, ServerKind
from tests.chat.server import Act, ChatServer, Script, running_chat, task_of, uuid_of
from tests.clients import client_of, config_of
from tests.media import encoded
from tests.notes import Notes
from tests.plans import ask, request_plan, stored_annotations
from tests.scene_data import batch_of, scene_samples

SAMPLES = scene_samples(12)
ASKED = len(SAMPLES) * 3


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "FIRST_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(protocol, "LONGEST_BACKOFF_SECONDS", 0.1)
    monkeypatch.setattr(endpoints, "POLL_SECONDS", 0.05)


def run(
    path: Path,
    *urls: str,
    samples: list[Sample] = SAMPLES,
    progress: Progress | None = None,
    concurrency: int | None = None,
    server: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[RequestStats, Counter[str | None]]:
    """Send the requests about samples; return statistics, and the number of annotations by error."""
    config = config_of(*urls, server={"concurrency": concurrency, **(server or {})}, **settings)
    counts = RequestStats()
    with Journal(path) as journal, ExitStack() as stack:
        chunks = (batch_of(samples[n : n + 4]) for n in range(0, len(samples), 4))
        opened = client_of(config, progress=progress)
        ask(config, chunks, lambda: stack.enter_context(opened), journal, counts)
        table = stored_annotations(config, [sample.id for sample in samples], journal)
        stored = journal.totals()["replies"]
    assert counts.done == counts.total == len(samples) * 3
    assert stored >= counts.total
    assert len(table["request_id"].unique()) == counts.total
    return counts, Counter(table["reply_error"].to_pylist())


def slow_server(seconds: float) -> ChatServer:
    return ChatServer(lambda times, body: Act(seconds=seconds))


def always(act: Act, times: int = 1000) -> Script:
    """Return a script that applies `act` to the first `times` question requests about each image."""
    return lambda earlier, body: act if earlier < times and task_of(body) == "Task: qa" else None


def test_each_request_is_sent_once_with_its_image_between_system_text_and_task(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        counts, errors = run(tmp_path / "j", chat.url)
    assert errors == {None: ASKED} and len(chat.bodies) == counts.asked == ASKED
    assert {uuid_of(body) for body in chat.bodies} == {sample.id for sample in SAMPLES}
    for body in chat.bodies:
        system, user = body["messages"]
        assert system["role"] == "system" and "seed" not in body
        assert [part["type"] for part in user["content"]] == ["image_url", "text"]


@pytest.mark.parametrize(
    "act",
    [
        Act(status=500, close=True), Act(status=503, headers={"Retry-After": "0"}), Act(status=429),
        Act(cut=True), Act(raw=b'{"choices":[{"mess'), Act(seconds=1.5),
    ],
    ids=lambda act: f"{act.status} {act.raw!r} {act.cut=} {act.seconds=}",
)  # fmt: skip
def test_failed_request_is_sent_again_and_counts_as_one_attempt(tmp_path: Path, act: Act) -> None:
    with running_chat(ChatServer(always(act, times=1))) as chat:
        timeout_s, notes = 0.5 if act.seconds else 60, Notes()
        server = {"request_timeout_s": timeout_s}
        counts, errors = run(tmp_path / "j", chat.url, server=server, progress=notes)
    (warning,) = notes.texts  # one warning for each kind of failure
    assert warning.startswith(f"warning: {chat.url} fails (") and warning.endswith(
        "; failed requests are retried"
    )
    assert errors == {None: ASKED}
    assert counts.attempts == {1: ASKED}
    assert len(chat.bodies) == ASKED + len(SAMPLES)


@pytest.mark.parametrize(("kind", "servers"), [(VLLM, 1), (VLLM, 2), (PROXY, 1)])
def test_external_server_begins_with_the_default_limit_of_requests_in_flight(
    kind: ServerKind, servers: int
) -> None:
    with ExitStack() as stack:
        chats = [stack.enter_context(running_chat(ChatServer(kind=kind))) for _ in range(servers)]
        config = config_of(*(chat.url for chat in chats), server={"enforced_schema": kind is VLLM})
        asking = stack.enter_context(client_of(config))
        assert asking.metrics()["in flight"] == f"0 of {client.FIRST_REQUESTS * servers}"


def test_started_servers_get_a_quarter_more_requests_than_fit_in_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch: Any = SimpleNamespace(name="model", api_key="", max_num_seqs=20)

    @asynccontextmanager
    async def run_servers(launches: list[Any], progress: Progress) -> AsyncIterator[list[Any]]:
        yield [SimpleNamespace(root=chat.url.removesuffix("/v1"), socket=None)] * len(launches)

    monkeypatch.setattr(client, "run_servers", run_servers)
    asking = Client("model", config_of().server, 100, launches=[launch, launch])
    with running_chat(ChatServer()) as chat, asking:
        assert asking.metrics()["in flight"] == "0 of 50"


def test_timeouts_lower_the_number_of_requests_in_flight(tmp_path: Path) -> None:
    chat = ChatServer()
    chat.script = lambda times, body: Act(seconds=2) if len(chat.bodies) <= 4 else None
    with running_chat(chat), Journal(tmp_path / "j") as journal:
        config = config_of(chat.url, server={"concurrency": 8, "request_timeout_s": 0.5})
        with client_of(config) as asking:
            ask(config, [batch_of(SAMPLES[:4])], lambda: asking, journal)
            assert asking.metrics()["in flight"] == "0 of 6" and asking.metrics()["server errors"] == "4"


@pytest.mark.parametrize(
    "act", [Act(status=500, close=True), Act(raw=b"[]")], ids=lambda act: str(act.status)
)
def test_request_that_always_fails_is_abandoned_and_sent_by_next_run(tmp_path: Path, act: Act) -> None:
    with running_chat(ChatServer(always(act))) as chat:
        _, errors = run(tmp_path / "j", chat.url)
        assert errors == {None: ASKED - len(SAMPLES), "server_error": len(SAMPLES)}
        chat.script = lambda times, body: None
        rerun, errors = run(tmp_path / "j", chat.url)
    assert errors == {None: ASKED}
    assert rerun.asked == len(SAMPLES)


@pytest.mark.parametrize("status", [400, 403])
def test_refused_request_is_sent_again_only_by_next_run(tmp_path: Path, status: int) -> None:
    with running_chat(ChatServer(always(Act(status=status)))) as chat:
        for sent in (ASKED, ASKED + len(SAMPLES)):
            _, errors = run(tmp_path / "j", chat.url)
            assert errors == {None: ASKED - len(SAMPLES), "refused_by_server": len(SAMPLES)}
            assert len(chat.bodies) == sent


@pytest.mark.parametrize(
    ("act", "flaw"),
    [
        (Act(text='{"caption"'), "not_json"),
        (Act(text='{"qa":[', finish_reason="length"), "cut_short"),
        (Act(text='{"qa":[', finish_reason="MAX_TOKENS"), "cut_short"),
        (Act(text='{"qa":[', finish_reason="repetition"), "repeats_itself"),
        (Act(text='{"qa":[]}'), "off_schema"),
        (Act(text="{}", finish_reason="content_filter"), "content_filter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_reply_is_retried_and_finally_kept_with_flaw(tmp_path: Path, act: Act, flaw: str) -> None:
    with running_chat(ChatServer(always(act, times=1))) as chat:
        counts, errors = run(tmp_path / "recovers", chat.url)
        assert errors == {None: ASKED}
        assert (counts.attempts[2], counts.flaws) == (len(SAMPLES), {flaw: len(SAMPLES)})
        chat.script = always(act)
        counts, errors = run(tmp_path / "abandoned", chat.url)
        assert counts.attempts == {1: ASKED - len(SAMPLES), 3: len(SAMPLES)}
        sent = len(chat.bodies)
        run(tmp_path / "abandoned", chat.url)
    assert len(chat.bodies) == sent  # no reply is paid for twice, usable or not
    assert errors[flaw] == len(SAMPLES)


def test_each_attempt_changes_the_sampling_settings_even_across_runs(tmp_path: Path) -> None:
    with running_chat(ChatServer(always(Act(text="{]")))) as chat:
        for max_attempts in (1, 2, 3):
            generate = {"qa_temperature": 0.25, "max_tokens": 100, "max_attempts": max_attempts}
            run(tmp_path / "j", chat.url, samples=SAMPLES[:1], generate=generate)
    bodies = [body for body in chat.bodies if task_of(body) == "Task: qa"]
    sampling = [(body["temperature"], body["max_tokens"], len(body["messages"])) for body in bodies]
    assert sampling == [(0.25, 100, 2), (0.75, 200, 2), (1.0, 200, 4)]
    failed, feedback = bodies[2]["messages"][2:]
    assert failed == {"role": "assistant", "content": "{]"}
    assert feedback["content"].splitlines()[-1] == "Task: qa"


def test_long_caption_of_a_large_image_fits_the_context_at_each_attempt(tmp_path: Path) -> None:
    chat = ChatServer(lambda times, body: Act(text='{"caption":"', finish_reason="length"))
    samples = [replace(SAMPLES[0], images=(encoded(Image.new("RGB", (2000, 1500)), "JPEG"),))]
    with running_chat(chat), Journal(tmp_path / "j") as journal, ExitStack() as stack:
        config = config_of(chat.url, tasks=["caption"], generate={"caption_styles": ["ocr"]})
        config = config.model_copy(update={"source": "folder:x"})
        opened = client_of(config)
        ask(config, [batch_of(samples)], lambda: stack.enter_context(opened), journal)
    tokens = []
    for body in chat.bodies:
        url = body["messages"][1]["content"][0]["image_url"]["url"]
        with Image.open(io.BytesIO(b64decode(url.partition(",")[2]))) as image:
            tokens.append((body["max_tokens"], image.width * image.height // PATCH_PX**2))
    assert [reply for reply, _ in tokens] == [2048, 2432, 2432]
    assert all(900 < image <= 4096 - client.MIN_PROMPT_TOKENS - reply for reply, image in tokens)


@pytest.mark.parametrize(
    ("text", "has_image", "tokens"),
    [
        ("Look.", True, (8192 - 640 - 512, 2048)),
        ("x" * 8000, True, (8192 - 4000 - 512, 2048)),
        ("x" * 16_000, True, (2048, 2048)),  # image and reply each get at least a quarter of the context
        ("x" * 8000, False, (0, 8192 - 4000)),
    ],
)
def test_long_prompt_leaves_fewer_tokens_for_images(
    text: str, tokens: tuple[int, int], *, has_image: bool
) -> None:
    (request, *_) = build_requests("a" * 64, request_plan(config_of()))
    request = replace(
        request, system="", text=text, images=(b"x",) if has_image else (), max_pixels=None,
        sampling=Sampling(temperature=0, max_tokens=9999),
    )  # fmt: skip
    fitted = client.fit_context(request, 8192, 256)
    assert ((fitted.max_pixels or 0) // PATCH_PX**2, fitted.sampling.max_tokens) == tokens
    if has_image:
        pages = client.fit_context(replace(request, images=(b"x", b"y")), 8192, 256)
        assert pages.max_pixels == tokens[0] * PATCH_PX**2 // 2
        assert client.fit_context(replace(request, max_pixels=5000), 8192, 256).max_pixels == 5000


def test_only_the_request_that_crashes_its_server_is_abandoned(tmp_path: Path) -> None:
    chat = ChatServer()
    poison = SAMPLES[3].id

    def script(times: int, body: dict[str, Any]) -> Act | None:
        if uuid_of(body) == poison and task_of(body) == "Task: qa":
            chat.dead = True
            later(0.2, lambda: setattr(chat, "dead", False))
        return Act(status=500, close=True) if chat.dead else Act(seconds=0.02)

    chat.script = script
    with running_chat(chat):
        _, errors = run(tmp_path / "j", chat.url, concurrency=8)
    assert errors == {None: ASKED - 1, "server_error": 1}


def test_retry_after_of_two_hours_ends_the_run_unless_another_server_answers(tmp_path: Path) -> None:
    waits = Act(status=429, headers={"Retry-After": "7300"})
    with running_chat(ChatServer()) as chat:
        chat.script = lambda times, body: waits if len(chat.bodies) > 5 else None
        with pytest.raises(EngineError, match="asks clients to wait for 2 h 2 min") as caught:
            run(tmp_path / "j", chat.url, concurrency=1)
    assert "the same command" in caught.value.hint
    with running_chat(ChatServer(lambda times, body: waits)) as chat, running_chat(ChatServer()) as other:
        chat.script = lambda times, body: waits if len(chat.bodies) > 5 else None
        _, errors = run(tmp_path / "k", chat.url, other.url, concurrency=2)
    assert errors == {None: ASKED}


def test_replies_in_flight_are_stored_when_an_error_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with running_chat(ChatServer()) as chat:
        chat.script = lambda times, body: Act(status=401) if len(chat.bodies) == 20 else Act(seconds=0.3)
        with pytest.raises(EngineError, match="scripted 401"):
            run(path, chat.url, samples=scene_samples(20), concurrency=16)
        asked = len(chat.bodies)
    with Journal(path) as journal:
        assert journal.totals()["replies"] == asked - 1


@pytest.mark.parametrize("status", [200, 400, 403])
def test_key_that_a_server_repeats_is_removed_from_messages_and_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("SYNTH_API_KEY", key)
    progress, problem = Notes(), ""
    echo = json.dumps({"error": {"message": f"bad header Authorization: Bearer {key} in it"}}).encode()
    chat = ChatServer(lambda times, body: Act(status=status, raw=echo) if len(chat.bodies) > 5 else None)
    with running_chat(chat), caplog.at_level(logging.DEBUG):
        try:
            run(tmp_path / "j", chat.url, progress=progress, concurrency=2, server={"max_failure_frac": 1.0})
        except EngineError as error:
            problem = str(error)
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("j*"))
    assert key.encode() not in kept
    assert key not in problem + caplog.text + " ".join(progress.texts)
    if status in (200, 400):
        assert b"Authorization: [key] in it" in kept


def test_faster_server_gets_more_requests_and_each_image_goes_to_one_server(tmp_path: Path) -> None:
    slow = slow_server(0.3)
    with running_chat(slow), running_chat(ChatServer()) as fast:
        run(tmp_path / "j", slow.url, fast.url, concurrency=6)
    assert len(slow.bodies) + len(fast.bodies) == ASKED
    assert 0 < len(slow.bodies) < len(fast.bodies)
    assert not {uuid_of(body) for body in slow.bodies} & {uuid_of(body) for body in fast.bodies}


@pytest.mark.parametrize("fails", [Act(status=500), Act(status=429, headers={"Retry-After": "4"})])
def test_server_that_fails_immediately_gets_few_requests(tmp_path: Path, fails: Act) -> None:
    good = slow_server(0.05)
    with running_chat(good), running_chat(ChatServer(lambda times, body: fails)) as bad:
        _, errors = run(tmp_path / "j", good.url, bad.url, samples=scene_samples(40), concurrency=8)
    assert errors == {None: 120}
    assert len(good.bodies) == 120 and 0 < len(bad.bodies) < 40


def later(seconds: float, act: Callable[[], None]) -> None:
    threading.Timer(seconds, act).start()


def after_first_requests(chat: ChatServer, act: Callable[[], object]) -> None:
    """Call `act` in a thread, once the server has received four requests."""

    def wait() -> None:
        while len(chat.bodies) < 4:
            time.sleep(0.01)
        act()

    threading.Thread(target=wait).start()


def test_requests_of_a_dead_server_are_sent_to_the_other_server(tmp_path: Path) -> None:
    with running_chat(slow_server(0.05)) as stays, ExitStack() as stack:
        dies = stack.enter_context(running_chat(slow_server(0.05)))
        after_first_requests(dies, stack.close)
        _, errors = run(tmp_path / "j", stays.url, dies.url, samples=scene_samples(60), concurrency=8)
    assert errors == {None: 180}
    assert dies.bodies and len(stays.bodies) < 180


def test_replies_are_stored_when_no_server_recovers(tmp_path: Path) -> None:
    samples = scene_samples(60)
    with ExitStack() as stack:
        chat = stack.enter_context(running_chat(slow_server(0.02)))
        after_first_requests(chat, stack.close)
        with pytest.raises(EngineError, match="no server answers"):
            run(tmp_path / "j", chat.url, samples=samples, concurrency=4, server={"startup_timeout_s": 0.5})
    with Journal(tmp_path / "j") as journal:
        stored = journal.totals()["replies"]
    assert len(chat.bodies) - 2 * 4 <= stored < 180


def test_failed_restart_of_a_started_server_ends_the_run_with_the_server_error(tmp_path: Path) -> None:
    chunks = iter([batch_of(scene_samples(30))])
    with ExitStack() as stack, Journal(tmp_path / "j") as journal:
        chat = stack.enter_context(running_chat(slow_server(0.02)))
        config = config_of(chat.url, server={"concurrency": 2})
        with client_of(config) as client:
            client._servers = [SimpleNamespace(failure=EngineError("vLLM died 4 times"))]  # type: ignore[list-item]
            after_first_requests(chat, stack.pop_all().close)
            with pytest.raises(EngineError, match="vLLM died 4 times"):
                ask(config, chunks, lambda: client, journal)


def test_undecodable_image_rejects_only_its_own_requests(tmp_path: Path) -> None:
    bad = replace(SAMPLES[0], images=(b"no image",))
    with running_chat(ChatServer()) as chat:
        stats, errors = run(tmp_path / "j", chat.url, samples=[bad, *SAMPLES[1:3]])
    assert stats.done == 9
    assert errors == {None: 6, "refused_by_server": 3}


@pytest.mark.usefixtures("heard_sigint")
def test_ctrl_c_stores_the_replies_that_have_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "GROUP_SECONDS", 60)
    chat = ChatServer()
    chat.script = lambda times, body: Act() if len(chat.bodies) <= 3 else Act(seconds=1)
    with running_chat(chat), Journal(tmp_path / "j") as journal, ExitStack() as stack:
        config = config_of(chat.url, server={"concurrency": 64})
        asking = stack.enter_context(client_of(config))
        arrived: list[int] = []
        is_interrupted = threading.Event()
        count = Client._done

        def interrupt(self: Client, task: Any, in_flight: Any) -> None:
            count(self, task, in_flight)
            arrived.append(1)
            if len(arrived) >= 3 and in_flight.replies and not is_interrupted.is_set():
                is_interrupted.set()
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Client, "_done", interrupt)
        chunks = iter([batch_of(SAMPLES)])
        with pytest.raises(KeyboardInterrupt):
            ask(config, chunks, lambda: asking, journal)
        assert journal.totals()["replies"] >= 3


@pytest.mark.parametrize(("status", "code"), [(402, None), (429, "insufficient_quota")])
def test_used_up_credit_ends_run_and_next_run_resumes(tmp_path: Path, status: int, code: str | None) -> None:
    error = {"message": "Look at your billing.", "code": code}
    spent = Act(status=status, raw=json.dumps({"error": error}).encode())
    with running_chat(ChatServer()) as chat:
        chat.script = lambda times, body: spent if len(chat.bodies) > 5 else None
        with pytest.raises(EngineError, match="has no credit left for this API key: Look at your billing"):
            run(tmp_path / "j", chat.url, concurrency=1)
        chat.script = lambda times, body: None
        counts, errors = run(tmp_path / "j", chat.url)
    assert errors == {None: ASKED} and counts.asked == ASKED - 5


def test_proxy_is_used_only_for_remote_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_chat(ChatServer()) as chat:  # this server is the proxy
        monkeypatch.setenv("HTTP_PROXY", chat.url.removesuffix("/v1"))
        _, errors = run(tmp_path / "j", "http://model.invalid:8000/v1")
        assert errors == {None: ASKED}
        assert {headers["Host"] for headers in chat.headers} == {"model.invalid:8000"}
        monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
        with pytest.raises(EngineError, match="through the proxy http://") as caught:
            run(tmp_path / "m", "http://model.invalid:8000/v1")
        assert "NO_PROXY" in caught.value.hint and "secret" not in str(caught.value)
    with running_chat(ChatServer()) as here:  # the proxy has ended
        run(tmp_path / "l", here.url)


def add_batch(concurrency: Concurrency, seconds: float) -> int:
    """Add as many replies as are needed to change the limit. Return the new limit."""
    for _ in range(4 * concurrency.limit):
        concurrency.add_reply(seconds)
    return concurrency.limit


def test_limit_is_lowered_by_busy_answers_and_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BUSY_SECONDS", -1)
    concurrency = Concurrency(20, 20)
    limits = []
    for _ in range(2):
        concurrency.slow_down()
        limits.append(concurrency.limit)
    limits += [add_batch(concurrency, seconds=9.0) for _ in range(2)]
    assert limits == [15, 11, 16, 20]


def test_limit_grows_while_replies_take_less_than_twice_the_fastest_time() -> None:
    concurrency = Concurrency(FIRST_REQUESTS, MAX_REQUESTS)
    seconds = (6.0, 4.0, 7.0, 8.0, 9.0)
    assert [add_batch(concurrency, value) for value in seconds] == [36, 40, 45, 45, 45]
    limits = [add_batch(concurrency, seconds=4.0) for _ in range(12)]
    assert limits == sorted(limits) and limits[-1] == MAX_REQUESTS


def test_simultaneous_busy_answers_lower_the_limit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 5000.0)
    concurrency = Concurrency(12, 12)
    concurrency.slow_down()
    concurrency.slow_down()
    assert concurrency.limit == 9


@pytest.mark.parametrize(
    ("stated_s", "waits"),
    [
        (4.0, 2),
        # A server may state a wait that is longer than the usual limit of 10 s.
        (1800.0, MAX_LONG_WAITS + 1),
    ],
)
def test_request_is_abandoned_if_its_server_stays_busy(
    stated_s: float, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(protocol, "monotonic", lambda: now[0])
    state, waits_s = RetryState(patience_s=10), list[float]()
    while (wait_s := state.after_busy(stated_s)) is not None:
        waits_s.append(wait_s)
        now[0] += wait_s + 1
    assert len(waits_s) == waits and stated_s <= min(waits_s) <= max(waits_s) <= 1.2 * stated_s


def test_request_is_abandoned_after_the_fifth_fault_or_the_third_crash() -> None:
    state = RetryState(patience_s=10)
    assert [state.after_fault() is None for _ in range(5)] == [False] * 4 + [True]
    assert [state.after_crash() for _ in range(3)] == [0.0, 0.0, None]


@pytest.mark.parametrize(
    ("health", "models", "is_healthy"),
    [
        (200, None, True), (503, 200, False), (None, 200, False), (404, 200, True), (404, 503, False),
        (302, 404, True),
    ],
)  # fmt: skip
def test_health_of_a_server_follows_its_health_page_or_else_its_model_list(
    health: int | None, models: int | None, is_healthy: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def status_of(url: str, *_: object, **__: object) -> int | None:
        return health if url.endswith("/health") else models

    monkeypatch.setattr(endpoints, "status_of", status_of)
    assert asyncio.run(endpoints.Endpoint("http://127.0.0.1:9/v1", {}).is_healthy()) == is_healthy


@pytest.mark.parametrize(
    ("url", "no_proxy", "proxy"),
    [
        ("https://api.example.com/v1", "", "http://proxy:3128"),
        ("https://api.example.com/v1", "example.com,other.org", None),
        ("https://api.notexample.com/v1", "example.com,ample.com", "http://proxy:3128"),
        ("https://10.1.2.3:8000/v1", "", None),
        ("https://[::1]:8000/v1", "", None),
        ("https://localhost:8000/v1", "", None),
        ("https://vllm-7:8000/v1", "", None),
        ("http://api.example.com/v1", "", None),  # the environment names no proxy for http
    ],
)
def test_proxy_is_used_only_for_public_addresses(
    url: str, no_proxy: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "no_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "proxy:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert Endpoint(url, {}).proxy == proxy
