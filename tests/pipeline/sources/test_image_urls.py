"""Fetching images by URL: only where the user allows it, only from the public network, always within limits."""

import contextlib
import http.server
import ipaddress
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest

from pipeline.errors import ImageError
from pipeline.sources import image_urls
from pipeline.sources.image_urls import fetch_image, is_public
from pipeline.sources.parquet import embedded_bytes
from pipeline.stages.source_parts import PASSING_REASONS
from tests.hub.datasets import photo


class Handler(http.server.BaseHTTPRequestHandler):
    agents: ClassVar[list[str]] = []
    asked: ClassVar[list[tuple[str, str]]] = []  # the hosts and paths

    def do_GET(self) -> None:
        self.agents.append(self.headers["User-Agent"])
        self.asked.append((self.headers["Host"], self.path))
        kind, _, rest = self.path.strip("/").partition("/")
        if kind == "loop":
            self.send_response(302)
            self.send_header("Location", f"/{rest}" if rest else "/loop")
            self.end_headers()
            return
        if kind == "busy" and [path for _, path in self.asked].count(self.path) < 3:
            self.send_response(429 if rest else 503)
            self.send_header("Retry-After", rest or "0")
            self.end_headers()
            return
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", "/Köln/a b.jpg".encode().decode("latin-1"))
            self.end_headers()
            return
        self.send_response({"gone": 404, "secret": 403, "broken": 500}.get(kind, 200))
        if kind == "cut":
            self.send_header("Content-Length", str(2 * len(photo(1))))
        self.end_headers()
        try:
            for _ in range(40 if kind == "large" else 1):
                self.wfile.write(photo(1) if kind != "large" else bytes(10_000))
        except OSError:
            pass  # the client closed the connection

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def anywhere(address: object) -> bool:
    return True


def refused(url: str, allowed: image_urls.Allowed = is_public) -> str:
    with pytest.raises(ImageError) as caught:
        fetch_image(url, allowed)
    return caught.value.reason


def test_an_image_is_fetched_and_redirects_are_followed(server: str) -> None:
    assert fetch_image(f"{server}/photo", anywhere) == photo(1)
    assert fetch_image(f"{server}/loop/loop/photo", anywhere) == photo(1)
    assert Handler.agents[-1].startswith("synth-captioner/")  # Wikimedia refuses requests without a name


def test_every_bound_holds(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "MAX_BYTES", 100_000)
    assert refused(f"{server}/large", anywhere) == "file_too_large"
    assert refused(f"{server}/loop", anywhere) == "url_refused"
    assert refused(f"{server}/broken", anywhere) == "url_unreachable"
    monkeypatch.setattr(image_urls, "MAX_SECONDS", 0.0)
    assert refused(f"{server}/photo", anywhere) == "url_unreachable"


@pytest.mark.parametrize("url", ["http://[foo/x.png", "http://a:b:c/", "http://127.0.0.1:99999/"])
def test_what_is_no_url_is_a_reason_and_not_a_crash(url: str) -> None:
    assert refused(url, anywhere) == "url_unreachable"


def test_a_server_that_drips_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "MAX_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connected, _ = listening.accept()
            with contextlib.suppress(OSError):
                connected.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                for _ in range(200):
                    connected.sendall(b"x")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        started = time.monotonic()
        assert refused(f"http://127.0.0.1:{listening.getsockname()[1]}/", anywhere) == "url_unreachable"
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://localhost/x",
        "http://",
        "gopher://x",
        "http://localhost/x",
        "http://[::1]/",
        "http://0x7f.1/",
    ],
)
def test_what_is_not_the_public_web_is_refused(url: str) -> None:
    assert refused(url) == "url_refused"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fe80::1", "::ffff:127.0.0.1", "0.0.0.0", "100.64.0.1"],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    assert is_public(ipaddress.ip_address("8.8.8.8"))


def test_a_server_of_ones_own_is_not_even_asked(server: str) -> None:
    assert refused(f"{server}/photo") == "url_refused"
    for allow_urls, reason in ((False, "image_not_embedded"), (True, "url_refused")):
        with pytest.raises(ImageError) as caught:
            embedded_bytes({"bytes": None, "path": f"{server}/photo"}, allow_urls=allow_urls)
        assert caught.value.reason == reason


def test_a_local_path_is_not_opened_even_if_urls_are_allowed() -> None:
    with pytest.raises(ImageError) as caught:
        embedded_bytes({"bytes": None, "path": "/etc/hostname"}, allow_urls=True)
    assert caught.value.reason == "image_is_a_path"


@pytest.mark.parametrize(
    "address",
    [
        "64:ff9b::a00:1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "::7f00:1", "::a00:1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:168.63.129.16", "fec0::1", "168.63.129.16",
        "192.0.0.192", "5f00::1", "3fff::1", "2001:0:7f00:1::", "100.100.100.200", "fd00:ec2::254", "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1", "ff02::1", "::1", "::", "fe80::1", "192.88.99.1", "198.18.0.1", "100::1", "2001:db8::1",
    ],
)  # fmt: skip
def test_no_special_address_is_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8"])
def test_addresses_of_the_web_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_a_host_that_only_costs_is_given_up(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "_costs", {})
    monkeypatch.setattr(image_urls, "MAX_BYTES", 100_000)
    monkeypatch.setattr(image_urls, "MAX_WASTED_BYTES", 250_000)
    reasons = [refused(f"{server}/large", anywhere) for _ in range(5)]
    assert reasons == ["file_too_large"] * 3 + ["host_given_up"] * 2
    assert fetch_image(f"{server.replace('127.0.0.1', 'localhost')}/photo", anywhere) == photo(1)


def test_a_host_that_is_slow_to_fail_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "_costs", {})
    image_urls._costs["https", "slow.example", None] = image_urls.HostCost(wasted_seconds=121.0)
    assert refused("https://slow.example/x.jpg", anywhere) == "host_given_up"
    image_urls._costs["https", "slow.example", None].useful_seconds = 500.0
    assert refused("https://slow.example/x.jpg") != "host_given_up"  # a good host with some dead links


def test_a_second_of_several_attempts_at_once_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that stalls for a second costs 16 attempts one second, and not 16."""
    now = [0.0]
    monkeypatch.setattr("pipeline.sources.image_urls.time.monotonic", lambda: now[0])
    cost = image_urls.HostCost()
    now[0] = 10.0
    for started in (0.0, 0.0, 4.0):
        cost.add(started, is_useful=False)
    assert cost.wasted_seconds == 10.0
    now[0] = 12.0
    cost.add(9.0, is_useful=True)
    assert (cost.wasted_seconds, cost.useful_seconds) == (10.0, 2.0)


def test_a_response_that_ends_early_is_unreachable_and_may_be_fetched_later(server: str) -> None:
    assert refused(f"{server}/cut", anywhere) == "url_unreachable"


def test_each_address_of_a_host_is_tried(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(server.rpartition(":")[2])
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.9.9.9", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: addresses)
    tried, connect = [], socket.create_connection

    def connect_to(address: tuple[str, int], timeout: float) -> socket.socket:
        tried.append(address[0])
        if address[0] == "127.9.9.9":
            raise ConnectionRefusedError
        return connect(address, timeout)

    monkeypatch.setattr(socket, "create_connection", connect_to)
    assert fetch_image(f"{server}/image", anywhere) == photo(1)
    assert tried == ["127.9.9.9", "127.0.0.1"]


@pytest.mark.parametrize("path", ["gone", "secret"])
def test_what_a_host_does_not_have_is_no_matter_of_the_network(server: str, path: str) -> None:
    """A reading is not done anew for it."""
    assert refused(f"{server}/{path}", anywhere) == "url_not_found"
    assert "url_not_found" not in PASSING_REASONS


def test_a_busy_host_is_asked_again_while_there_is_time(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    monkeypatch.setattr("pipeline.sources.image_urls.time.sleep", paused.append)
    Handler.asked.clear()
    assert fetch_image(f"{server}/busy", anywhere) == photo(1)
    assert paused == [0.5, 0.5]
    assert refused(f"{server}/busy/3600", anywhere) == "url_unreachable"
    assert paused == [0.5, 0.5]


def test_a_host_that_is_always_busy_is_given_up(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pauses cost as much as any other failure."""
    now = [0.0]
    monkeypatch.setattr(image_urls, "_costs", {})
    monkeypatch.setattr("pipeline.sources.image_urls.time.monotonic", lambda: now[0])
    monkeypatch.setattr("pipeline.sources.image_urls.time.sleep", lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(image_urls, "_get", always_busy)
    reasons = [refused(f"{server}/photo", anywhere) for _ in range(6)]
    assert reasons == ["url_unreachable"] * 5 + ["host_given_up"]


def always_busy(*_: object) -> tuple[str | None, bytes]:
    raise image_urls._AskedToWaitError("a.test", 429, 2.0)


def test_addresses_are_sent_as_browsers_send_them(server: str) -> None:
    Handler.asked.clear()
    for path in ("Köln/a b.jpg?q=ä b&x=%20", "K%C3%B6ln", "moved"):
        assert fetch_image(f"{server}/{path}", anywhere) == photo(1)
    assert [path for _, path in Handler.asked] == [
        "/K%C3%B6ln/a%20b.jpg?q=%C3%A4%20b&x=%20", "/K%C3%B6ln", "/moved", "/K%C3%B6ln/a%20b.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "port", "named"), [("https", 443, "a.test"), ("https", 444, "a.test:444"), ("http", 80, "a.test")]
)
def test_a_usual_port_is_not_named_to_the_host(scheme: str, port: int, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sign what they are asked with the name of the host."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", port))]
    )
    monkeypatch.setattr(image_urls, "_connect", lambda *_: ours)
    monkeypatch.setattr(image_urls, "_tls_context", lambda: SimpleNamespace(wrap_socket=lambda raw, **_: raw))
    theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
    assert fetch_image(f"{scheme}://a.test:{port}/x") == b"x"
    assert f"\r\nHost: {named}\r\n" in theirs.recv(10_000).decode()


ENDS_EARLY = """
import time
from pipeline.sources.image_urls import fetch_ahead
rows = fetch_ahead(range(5), lambda job: time.sleep(600 * job) or job)
print(next(rows))
"""


def test_a_run_that_ends_before_its_images_waits_for_no_slow_host() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS_EARLY], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n"
