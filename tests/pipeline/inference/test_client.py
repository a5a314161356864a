"""Client against a scripted server over real sockets: whatever the server does, each request ends in one stored reply."""

import json
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.errors import EngineError
from pipeline.inference import client, endpoints, probing, protocol
from pipeline.inference.client import START_REQUESTS, Client
from pipeline.inference.endpoints import MIN_MISSES
from pipeline.inference.journal import Journal
from pipeline.inference.probing import UNKNOWN_IMAGE
from pipeline.inference.queue import RequestStats, ask_about, read_annotations
from pipeline.progress import Progress
from pipeline.types import Sample, SampleInfo
from tests.chat.server import Act, ChatServer, Script, running_chat, task_of, uuid_of
from tests.clients import client_of
from tests.notes import Notes
from tests.plans import request_plan
from tests.scene_data import batch_of, scene_samples

SAMPLES = scene_samples(12)
ASKED = len(SAMPLES) * 3


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "FIRST_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(protocol, "LONGEST_BACKOFF_SECONDS", 0.1)
    for module in (client, endpoints):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(client, "GROUP_SECONDS", 0.05)


def run(
    path: Path, *urls: str, samples: list[Sample] = SAMPLES, progress: Progress | None = None, **settings: Any
) -> tuple[RequestStats, Counter[str | None]]:
    """Send requests for the samples; return their statistics, and the number of annotations by error."""
    config = resolve(source="scenes", base_url=list(urls), model="model", **settings)
    counts = RequestStats()
    with Journal(path) as journal, ExitStack() as stack:
        chunks = (batch_of(samples[n : n + 4]) for n in range(0, len(samples), 4))
        opened = client_of(config, progress=progress)
        for _ in ask_about(chunks, request_plan(config), config.server, lambda: stack.enter_context(opened), journal, counts):
            pass
        (table,) = read_annotations([[SampleInfo(sample.id, 1) for sample in samples]], request_plan(config), journal)
        stored = journal.totals()["replies"]
    assert counts.done == counts.total == len(samples) * 3  # nothing lost, nothing twice
    assert stored >= counts.total
    assert len(table["request_id"].unique()) == counts.total
    return counts, Counter(table["reply_error"].to_pylist())


def always(act: Act, times: int = 1000) -> Script:
    """Return a script that acts at the first `times` requests of every image for questions."""
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
        Act(status=500, close=True),
        Act(status=503, headers={"Retry-After": "0"}),
        Act(status=429),
        Act(cut=True),
        Act(raw=b'{"choices":[{"mess'),
    ],
    ids=lambda act: f"{act.status} {act.raw!r} {act.cut=}",
)
def test_a_request_that_a_server_fails_at_once_is_sent_again(tmp_path: Path, act: Act) -> None:
    with running_chat(ChatServer(always(act, times=1))) as chat:
        counts, errors = run(tmp_path / "j", chat.url)
    assert errors == {None: ASKED}
    assert counts.attempts == {1: ASKED}  # a server error does not count as an attempt
    assert len(chat.bodies) == ASKED + len(SAMPLES)


def test_a_server_that_is_too_slow_is_asked_again(tmp_path: Path) -> None:
    with running_chat(ChatServer(always(Act(seconds=1.5), times=1))) as chat:
        _, errors = run(tmp_path / "j", chat.url, server={"request_timeout_s": 0.5})
    assert errors == {None: ASKED}


@pytest.mark.parametrize("act", [Act(status=500, close=True), Act(raw=b"[]")], ids=lambda act: str(act.status))
def test_a_server_that_always_fails_at_a_request_costs_that_request_alone(tmp_path: Path, act: Act) -> None:
    with running_chat(ChatServer(always(act))) as chat:
        _, errors = run(tmp_path / "j", chat.url)
        assert errors == {None: ASKED - len(SAMPLES), "server_error": len(SAMPLES)}
        chat.script = lambda times, body: None
        rerun, errors = run(tmp_path / "j", chat.url)
    assert errors == {None: ASKED}
    assert rerun.asked == len(SAMPLES)  # the next run sends the requests that no model has answered


def test_a_refused_request_is_sent_again_by_the_next_run_alone(tmp_path: Path) -> None:
    with running_chat(ChatServer(always(Act(status=400)))) as chat:
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
def test_a_reply_of_no_use_is_asked_for_again_and_given_up_with_its_text(tmp_path: Path, act: Act, flaw: str) -> None:
    with running_chat(ChatServer(always(act, times=1))) as chat:
        counts, errors = run(tmp_path / "mended", chat.url)
        assert errors == {None: ASKED}
        assert (counts.attempts[2], counts.flaws) == (len(SAMPLES), {flaw: len(SAMPLES)})
        chat.script = always(act)
        counts, errors = run(tmp_path / "given-up", chat.url)
        assert counts.attempts == {1: ASKED - len(SAMPLES), 3: len(SAMPLES)}
        sent = len(chat.bodies)
        run(tmp_path / "given-up", chat.url)
    assert len(chat.bodies) == sent  # no reply is paid for twice, usable or not
    assert errors[flaw] == len(SAMPLES)


def test_each_attempt_differs_from_the_one_before_also_where_a_run_was_cut_off(tmp_path: Path) -> None:
    generate = {"qa_temperature": 0.25, "max_tokens": 100}
    with running_chat(ChatServer(always(Act(text="{]")))) as chat:
        for max_attempts in (1, 2, 3):
            run(tmp_path / "j", chat.url, samples=SAMPLES[:1], generate=generate | {"max_attempts": max_attempts})
    first, second, third = [body for body in chat.bodies if task_of(body) == "Task: qa"]
    assert [body["temperature"] for body in (first, second, third)] == [0.25, 0.75, 1.0]
    assert [body["max_tokens"] for body in (first, second, third)] == [100, 200, 200]
    assert [len(body["messages"]) for body in (first, second, third)] == [2, 2, 4]
    assert third["messages"][2] == {"role": "assistant", "content": "{]"}
    assert third["messages"][3]["content"].splitlines()[-1] == "Task: qa"


def test_only_the_request_that_kills_its_server_repeatedly_is_given_up(tmp_path: Path) -> None:
    chat = ChatServer()
    poison = SAMPLES[3].id

    def script(times: int, body: dict[str, Any]) -> Act | None:
        if uuid_of(body) == poison and task_of(body) == "Task: qa":
            chat.dead = True
            later(0.2, lambda: setattr(chat, "dead", False))
        return Act(status=500, close=True) if chat.dead else Act(seconds=0.02)

    chat.script = script
    with running_chat(chat):
        _, errors = run(tmp_path / "j", chat.url, server={"concurrency": 8})
    assert errors == {None: ASKED - 1, "server_error": 1}


def test_a_server_that_refuses_everything_is_not_asked_for_ever(tmp_path: Path) -> None:
    with running_chat(ChatServer(lambda times, body: Act(status=400))) as chat:
        with pytest.raises(EngineError, match="refuses every request: scripted 400"):
            run(tmp_path / "j", chat.url)
        assert len(chat.bodies) < 2 * client.MAX_REFUSALS_BEFORE_REPLY + START_REQUESTS


def test_a_server_that_refuses_faster_than_it_answers_is_asked_on(tmp_path: Path) -> None:
    """As one that refuses large images at once, and takes its time for the others."""
    large = {sample.id for sample in SAMPLES[:8]}
    script: Script = lambda times, body: Act(status=413) if uuid_of(body) in large else Act(seconds=0.4)  # noqa: E731
    with running_chat(ChatServer(script)) as chat:
        _, errors = run(tmp_path / "j", chat.url, server={"concurrency": 40})
    assert errors == {None: ASKED - 3 * len(large), "refused_by_server": 3 * len(large)}


def test_a_server_that_asks_to_wait_for_hours_ends_the_run(tmp_path: Path) -> None:
    waits = Act(status=429, headers={"Retry-After": "7300"})
    with running_chat(ChatServer()) as chat:
        chat.script = lambda times, body: waits if len(chat.bodies) > 5 else None
        with pytest.raises(EngineError, match="asks to wait for 2 h 2 min") as caught:
            run(tmp_path / "j", chat.url, server={"concurrency": 1})
    assert "the same command" in caught.value.hint
    with running_chat(ChatServer(lambda times, body: waits)) as chat, running_chat(ChatServer()) as other:
        chat.script = lambda times, body: waits if len(chat.bodies) > 5 else None
        _, errors = run(tmp_path / "k", chat.url, other.url, server={"concurrency": 2})
    assert errors == {None: ASKED}


def test_a_gateway_whose_server_is_away_for_a_while_costs_no_request(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        chat.script = lambda times, body: Act(status=502) if 5 < len(chat.bodies) < 80 else None
        counts, errors = run(tmp_path / "j", chat.url, server={"concurrency": 4})
    assert errors == {None: ASKED} and counts.attempts == {1: ASKED}


def test_a_server_that_denies_one_request_is_asked_the_others(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        chat.script = lambda times, body: Act(status=403) if uuid_of(body) == SAMPLES[0].id else None
        _, errors = run(tmp_path / "j", chat.url, server={"concurrency": 1})
        assert errors == {None: ASKED - 3, "refused_by_server": 3}
        chat.bodies.clear()
        chat.script = lambda times, body: Act(status=403) if len(chat.bodies) > 5 else None
        with pytest.raises(EngineError, match="scripted 403"):  # to all, from then on
            run(tmp_path / "k", chat.url, samples=scene_samples(20), server={"concurrency": 1})
        assert len(chat.bodies) <= 6 + client.MAX_DENIED


def test_requests_in_flight_are_kept_when_a_run_ends_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with running_chat(ChatServer()) as chat:
        chat.script = lambda times, body: Act(status=401) if len(chat.bodies) == 20 else Act(seconds=0.3)
        with pytest.raises(EngineError, match="scripted 401"):
            run(path, chat.url, samples=scene_samples(20), server={"concurrency": 16})
        asked = len(chat.bodies)
    with Journal(path) as journal:
        assert journal.totals()["replies"] == asked - 1


def test_a_server_that_keeps_images_gets_each_image_once(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        chat.keeps_images = True
        counts, errors = run(tmp_path / "j", chat.url, samples=scene_samples(20), server={"concurrency": 8})
    assert errors == {None: 60}
    assert counts.asked == 60
    assert chat.missed == [UNKNOWN_IMAGE]  # the probe
    assert len(chat.images) == 20
    assert 30 <= chat.named <= 40  # of the last ones some do not wait for their image where there is nothing else to send


def test_an_image_that_a_server_has_forgotten_is_sent_again(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        chat.keeps_images = True
        chat.script = lambda times, body: forget(chat, "01234567")
        counts, errors = run(tmp_path / "j", chat.url, samples=scene_samples(40), server={"concurrency": 8})
    assert (errors, counts.asked) == ({None: 120}, 120)
    assert len(chat.missed) > 1
    assert chat.named > 10


def test_names_are_given_up_if_a_server_forgets_most_images(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        chat.keeps_images = True
        chat.script = lambda times, body: forget(chat)
        _, errors = run(tmp_path / "j", chat.url, samples=scene_samples(30), server={"concurrency": 4})
    assert errors == {None: 90}
    assert chat.named == 0
    assert MIN_MISSES < len(chat.missed) < MIN_MISSES + 8


@pytest.mark.parametrize("on_miss", [Act(status=404), Act(), Act(seconds=30)], ids=["404", "a reply", "no answer"])
def test_a_server_that_does_not_refuse_the_name_of_no_image_gets_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_miss: Act
) -> None:
    monkeypatch.setattr(probing, "IMAGE_PROBE_SECONDS", 0.2)
    with running_chat(ChatServer()) as chat:
        chat.keeps_images, chat.on_miss = True, on_miss
        _, errors = run(tmp_path / "j", chat.url)
    assert (errors, chat.named, chat.missed) == ({None: ASKED}, 0, [UNKNOWN_IMAGE])


def forget(chat: ChatServer, digits: str = "0123456789abcdef") -> None:
    """Let a server forget the images whose uuid begins with one of these digits."""
    for uuid in [uuid for uuid in chat.images if uuid[0] in digits]:
        del chat.images[uuid]


@pytest.mark.parametrize("status", [200, 400, 403])
def test_a_key_that_a_server_repeats_is_in_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("SYNTH_API_KEY", key)
    progress, told = Notes(), ""
    echo = json.dumps({"error": {"message": f"bad header Authorization: Bearer {key} in it"}}).encode()
    chat = ChatServer(lambda times, body: Act(status=status, raw=echo) if len(chat.bodies) > 5 else None)
    with running_chat(chat), caplog.at_level(logging.DEBUG):
        try:
            run(tmp_path / "j", chat.url, progress=progress, server={"concurrency": 2, "max_failure_frac": 1.0})
        except EngineError as error:
            told = str(error)
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("j*"))
    assert key.encode() not in kept
    assert key not in told + caplog.text + " ".join(progress.texts)
    if status in (200, 400):
        assert b"Authorization: [key] in it" in kept


def test_work_goes_to_the_server_with_the_least_to_do_and_an_image_stays_where_it_is(tmp_path: Path) -> None:
    slow = ChatServer(lambda times, body: Act(seconds=0.3))
    with running_chat(slow), running_chat(ChatServer()) as fast:
        run(tmp_path / "j", slow.url, fast.url, server={"concurrency": 6})
    assert len(slow.bodies) + len(fast.bodies) == ASKED
    assert 0 < len(slow.bodies) < len(fast.bodies)
    assert not {uuid_of(body) for body in slow.bodies} & {uuid_of(body) for body in fast.bodies}


@pytest.mark.parametrize("fails", [Act(status=500), Act(status=429, headers={"Retry-After": "4"})])
def test_a_server_that_fails_at_once_takes_no_requests_from_one_that_answers(tmp_path: Path, fails: Act) -> None:
    """It always has the least to do, and would be asked most."""
    good = ChatServer(lambda times, body: Act(seconds=0.05))
    with running_chat(good), running_chat(ChatServer(lambda times, body: fails)) as bad:
        _, errors = run(tmp_path / "j", good.url, bad.url, samples=scene_samples(40), server={"concurrency": 8})
    assert errors == {None: 120}
    assert len(good.bodies) == 120 and 0 < len(bad.bodies) < 40


def later(seconds: float, act: Callable[[], None]) -> None:
    threading.Timer(seconds, act).start()


def after_first_requests(chat: ChatServer, act: Callable[[], object]) -> None:
    """Act once a server has got a few requests."""

    def wait() -> None:
        while len(chat.bodies) < 4:
            time.sleep(0.01)
        act()

    threading.Thread(target=wait).start()


def test_one_of_two_servers_may_die(tmp_path: Path) -> None:
    with running_chat(ChatServer(lambda times, body: Act(seconds=0.05))) as stays, ExitStack() as stack:
        dies = stack.enter_context(running_chat(ChatServer(lambda times, body: Act(seconds=0.05))))
        after_first_requests(dies, stack.close)
        _, errors = run(tmp_path / "j", stays.url, dies.url, samples=scene_samples(60), server={"concurrency": 8})
    assert errors == {None: 180}
    assert dies.bodies
    assert len(stays.bodies) < 180  # the other server answered some requests before it died


def test_a_server_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    first = ChatServer(lambda times, body: Act(seconds=0.05))
    with ExitStack() as stack:
        stack.enter_context(running_chat(first))
        port = int(first.url.split(":")[2].split("/")[0])
        restarted = ChatServer()

        def die_and_come_back() -> None:
            closing = stack.pop_all()
            closing.close()
            time.sleep(0.5)
            stack.enter_context(running_chat(restarted, port))

        after_first_requests(first, die_and_come_back)
        _, errors = run(tmp_path / "j", first.url, samples=scene_samples(40), server={"concurrency": 4})
    assert errors == {None: 120}
    assert restarted.bodies


def test_when_no_server_comes_back_what_is_done_is_kept(tmp_path: Path) -> None:
    samples = scene_samples(60)
    with ExitStack() as stack:
        chat = stack.enter_context(running_chat(ChatServer(lambda times, body: Act(seconds=0.02))))
        after_first_requests(chat, stack.close)
        with pytest.raises(EngineError, match="no server answers"):
            run(tmp_path / "j", chat.url, samples=samples, server={"concurrency": 4, "startup_timeout_s": 0.5})
    with Journal(tmp_path / "j") as journal:
        stored = journal.totals()["replies"]
    assert len(chat.bodies) - 2 * 4 <= stored < 180


def test_a_crash_loses_at_most_one_window_of_requests(tmp_path: Path) -> None:
    chat = ChatServer(lambda times, body: Act(seconds=0.01 * (len(chat.bodies) % 7)))
    lost: list[int] = []

    class Watched(Journal):
        def keep(self, answered: Any) -> None:
            lost.append(len(chat.bodies) - self.totals()["replies"])  # requests that a crash at this point would lose
            super().keep(answered)

    chunks = iter([batch_of(scene_samples(30))])
    with running_chat(chat):
        config = resolve(source="scenes", model="model", base_url=[chat.url], server={"concurrency": 8})
        with Watched(tmp_path / "j") as journal, client_of(config) as client:
            for _ in ask_about(chunks, request_plan(config), config.server, lambda: client, journal, RequestStats()):
                pass
    assert len(chat.bodies) == 90
    assert max(lost) <= 8


def test_a_server_of_ours_that_cannot_be_kept_alive_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    config = resolve(source="scenes", model="model", server={"concurrency": 2})
    chunks = iter([batch_of(scene_samples(30))])
    with ExitStack() as stack, Journal(tmp_path / "j") as journal:
        chat = stack.enter_context(running_chat(ChatServer(lambda times, body: Act(seconds=0.02))))
        with client_of(config.model_copy(update={"base_url": (chat.url,)})) as client:
            client._servers = [SimpleNamespace(failure=EngineError("vLLM died 4 times"))]  # type: ignore[list-item]
            after_first_requests(chat, stack.pop_all().close)
            with pytest.raises(EngineError, match="vLLM died 4 times"):
                for _ in ask_about(chunks, request_plan(config), config.server, lambda: client, journal, RequestStats()):
                    pass


@pytest.mark.parametrize(("waiting", "grows"), [(0, True), (200, False)])
def test_the_window_follows_the_queue_of_the_server(tmp_path: Path, waiting: int, grows: bool) -> None:  # noqa: FBT001
    chat = ChatServer(lambda times, body: Act(seconds=0.2))
    chat.metrics = f'vllm:num_requests_running{{engine="0"}} 20.0\nvllm:num_requests_waiting{{engine="0"}} {waiting}.0\n'
    with running_chat(chat):
        run(tmp_path / "j", chat.url, samples=scene_samples(80))
    assert (chat.max_in_flight > START_REQUESTS) == grows


def test_replies_state_their_seconds_and_tokens(tmp_path: Path) -> None:
    stats = RequestStats(seconds={})
    with running_chat(ChatServer(lambda times, body: Act(seconds=0.1))) as chat, Journal(tmp_path / "j") as journal:
        config = resolve(source="scenes", model="model", base_url=[chat.url], tasks=["caption"])
        with client_of(config) as asked:
            for _ in ask_about(
                iter([batch_of(SAMPLES[:2])]), request_plan(config), config.server, lambda: asked, journal, stats
            ):
                pass
    assert stats.seconds and len(stats.seconds) == 4 and min(stats.seconds.values()) >= 0.1 and stats.asking_s > 0.1
    assert (stats.prompt_tokens, stats.reply_tokens) == (160, 48)


def test_an_image_that_cannot_be_sent_is_the_reason_of_its_own_requests_alone(tmp_path: Path) -> None:
    bad = replace(SAMPLES[0], images=(b"no image",))
    with running_chat(ChatServer()) as chat:
        stats, errors = run(tmp_path / "j", chat.url, samples=[bad, *SAMPLES[1:3]])
    assert stats.done == 9
    assert errors == {None: 6, "refused_by_server": 3}


@pytest.mark.usefixtures("heard_sigint")
def test_ctrl_c_keeps_the_replies_that_have_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "GROUP_SECONDS", 60)  # of replies that wait to be kept together
    answered: list[int] = []

    def script(times: int, body: dict[str, Any]) -> Act:
        answered.append(1)
        return Act() if len(answered) <= 3 else Act(seconds=1)

    config = resolve(source="scenes", model="model", server={"concurrency": 64})
    with running_chat(ChatServer(script)) as chat, Journal(tmp_path / "j") as journal, ExitStack() as stack:
        asking = stack.enter_context(client_of(config.model_copy(update={"base_url": (chat.url,)})))
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
            for _ in ask_about(chunks, request_plan(config), config.server, lambda: asking, journal, RequestStats()):
                pass
        assert journal.totals()["replies"] >= 3


def test_requests_that_an_interrupted_run_did_not_send_are_not_counted(tmp_path: Path) -> None:
    """Else a few interruptions use up a budget."""
    config = resolve(source="scenes", model="model", server={"concurrency": 2, "max_requests": 1000})
    stats = RequestStats()
    with running_chat(ChatServer()) as chat, Journal(tmp_path / "j") as journal:
        with client_of(config.model_copy(update={"base_url": (chat.url,)})) as asking:
            groups = ask_about(
                iter([batch_of(scene_samples(20))]), request_plan(config), config.server, lambda: asking, journal, stats
            )
            next(groups)
            assert isinstance(groups, Generator)
            groups.close()
        assert 0 < len(chat.bodies) < 20 < client.SENT_BATCH
        asked = journal.totals()["asked"]
        assert len(chat.bodies) - 1 <= asked == stats.asked <= len(chat.bodies) + 2  # a probe; two may be on their way


@pytest.mark.parametrize("act", [Act(status=401), Act(status=402), Act(status=307, headers={"Location": "http://elsewhere/"})])
def test_a_server_that_refuses_what_every_request_asks_is_left_out_where_there_is_another(tmp_path: Path, act: Act) -> None:
    stays = ChatServer(lambda times, body: Act(seconds=0.02))
    with running_chat(stays) as first, running_chat(ChatServer()) as leaves:
        leaves.script = lambda times, body: act if len(leaves.bodies) > 3 else Act(seconds=0.02)
        _, errors = run(tmp_path / "j", first.url, leaves.url, samples=scene_samples(40), server={"concurrency": 4})
    assert errors == {None: 120}
    assert 3 < len(leaves.bodies) < 12


@pytest.mark.parametrize(("status", "code"), [(402, None), (429, "insufficient_quota")])
def test_credit_that_is_used_up_ends_the_run_and_the_next_one_goes_on(tmp_path: Path, status: int, code: str | None) -> None:
    spent = Act(status=status, raw=json.dumps({"error": {"message": "Look at your billing.", "code": code}}).encode())
    with running_chat(ChatServer()) as chat:
        chat.script = lambda times, body: spent if len(chat.bodies) > 5 else None
        with pytest.raises(EngineError, match="has no credit left for this key: Look at your billing"):
            run(tmp_path / "j", chat.url, server={"concurrency": 1})
        chat.script = lambda times, body: None
        counts, errors = run(tmp_path / "j", chat.url)
    assert errors == {None: ASKED} and counts.asked == ASKED - 5


def test_a_server_of_another_model_that_comes_later_is_left_out(tmp_path: Path) -> None:
    first, late = ChatServer(lambda times, body: Act(seconds=0.05)), ChatServer(model="another")
    with running_chat(late):
        port = int(late.url.split(":")[2].split("/")[0])
    with running_chat(first), ExitStack() as stack:
        after_first_requests(first, lambda: [stack.enter_context(running_chat(late, port))])
        _, errors = run(tmp_path / "j", first.url, late.url, samples=scene_samples(60), server={"concurrency": 4})
    assert errors == {None: 180} and late.headers and not late.bodies


def test_the_proxy_of_the_environment_is_used_for_other_machines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_chat(ChatServer()) as chat:  # it takes the requests for any host, as a proxy does
        monkeypatch.setenv("HTTP_PROXY", chat.url.removesuffix("/v1"))
        _, errors = run(tmp_path / "j", "http://model.invalid:8000/v1")
        assert errors == {None: ASKED}
        assert {headers["Host"] for headers in chat.headers} == {"model.invalid:8000"}
        chat.headers.clear()
        monkeypatch.setenv("NO_PROXY", "model.invalid")
        with pytest.raises(EngineError, match="no server answers"):
            run(tmp_path / "k", "http://model.invalid:8000/v1")
        assert not chat.headers
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
        with pytest.raises(EngineError, match="through the proxy http://") as caught:
            run(tmp_path / "m", "http://model.invalid:8000/v1")
        assert "NO_PROXY" in caught.value.hint and "secret" not in str(caught.value)
    with running_chat(ChatServer()) as here:  # and that proxy is gone
        run(tmp_path / "l", here.url)
