"""Fetching images by URL: only with permission, from the public network, and within limits."""

import contextlib
import gzip
import http.server
import ipaddress
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from yarl import URL

from pipeline.errors import ImageError
from pipeline.sources import image_urls
from pipeline.sources.image_urls import fetch_image, is_public
from pipeline.sources.parquet import embedded_bytes
from pipeline.sources.read import PASSING_REASONS
from tests.hub.datasets import photo

PACKED = gzip.compress(bytes(1_000_000))


class Handler(http.server.BaseHTTPRequestHandler):
    agents: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.agents.append(self.headers["User-Agent"])
        kind, _, rest = self.path.strip("/").partition("/")
        if kind == "loop":
            self.send_response(302)
            self.send_header("Location", f"/{rest}" if rest else "/loop")
            self.end_headers()
            return
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", "/Köln/a b.jpg".encode().decode("latin-1"))
            self.end_headers()
            return
        self.send_response({"gone": 404, "secret": 403, "broken": 500, "busy": 429}.get(kind, 200))
        if kind == "cut":
            self.send_header("Content-Length", str(2 * len(photo(1))))
        if kind == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            for _ in range(40 if kind == "large" else 1):
                self.wfile.write({"large": bytes(10_000), "packed": PACKED}.get(kind, photo(1)))
        except OSError:
            pass  # the client closes the connection

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


@pytest.fixture(autouse=True)
def no_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "_costs", {})
    monkeypatch.setattr(image_urls, "BUSY_PAUSE_S", 0.2)


@pytest.mark.parametrize("path", ["photo", "loop/loop/photo", "K%C3%B6ln", "moved"])
def test_image_is_fetched_and_redirects_are_followed(server: str, path: str) -> None:
    assert fetch_image(f"{server}/{path}", anywhere) == photo(1)
    assert Handler.agents[-1].startswith("synth-captioner/")  # Wikimedia refuses requests without a name


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("large", "file_too_large"),
        ("loop", "url_refused"),
        ("broken", "url_unreachable"),
        ("cut", "url_unreachable"),
        ("gone", "url_not_found"),
        ("secret", "url_not_found"),
        ("busy", "url_unreachable"),
    ],
)
def test_host_fault_becomes_the_reason(
    server: str, path: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_urls, "MAX_BYTES", 100_000)
    assert refused(f"{server}/{path}", anywhere) == reason
    assert "url_not_found" not in PASSING_REASONS  # the next run does not retry it


def test_compressed_body_is_not_unpacked(server: str) -> None:
    assert fetch_image(f"{server}/packed", anywhere) == PACKED


@pytest.mark.parametrize(
    "url", ["http://[foo/x.png", "http://a:b:c/", "http://127.0.0.1:99999/", "http://\ud800.test/"]
)
def test_malformed_url_is_rejected(url: str) -> None:
    assert refused(url, anywhere) == "url_unreachable"


def test_slow_response_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
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
        "file:///etc/passwd", "ftp://localhost/x", "http://", "gopher://x", "http://localhost/x", "http://[::1]/",
        "http://0x7f.1/", "http://127.1/", "http://2130706433/", "http://127.000.000.001/", "http://①②⑦.⓪.⓪.①/",
    ],
)  # fmt: skip
def test_url_outside_the_public_web_is_refused(url: str) -> None:
    assert refused(url) == "url_refused"


def answer_with(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Answer each host lookup with the next address; return the looked-up hosts."""
    hosts: list[str] = []

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        hosts.append(host)
        addresses = answers[min(len(hosts), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return hosts


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["93.184.216.34", "10.0.0.1"]])
def test_host_with_an_internal_address_is_refused(
    addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, addresses)
    assert refused("http://a.test/x") == "url_refused"


def test_connection_uses_the_checked_address(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is not resolved again: a second answer may be another address."""
    hosts = answer_with(monkeypatch, ["127.0.0.1"], ["127.9.9.9"])
    assert fetch_image(
        f"http://a.test:{URL(server).port}/photo", lambda address: str(address) == "127.0.0.1"
    ) == photo(1)
    assert hosts == ["a.test"]


def test_redirect_to_an_internal_address_is_refused(server: str) -> None:
    def is_other(address: object) -> bool:
        return str(address) != "127.0.0.2"

    assert refused(f"{server}/loop//127.0.0.2:{URL(server).port}/photo", is_other) == "url_refused"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fe80::1", "::ffff:127.0.0.1",
        "0.0.0.0", "100.64.0.1", "64:ff9b::a00:1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::",
        "2002:a00:1::1", "::7f00:1", "::a00:1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
        "::ffff:168.63.129.16", "fec0::1", "168.63.129.16", "192.0.0.192", "5f00::1", "3fff::1",
        "2001:0:7f00:1::", "100.100.100.200", "fd00:ec2::254", "255.255.255.255",
        "224.0.0.1", "ff02::1", "::", "192.88.99.1", "198.18.0.1", "100::1", "2001:db8::1",
    ],
)  # fmt: skip
def test_internal_address_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8"]
)
def test_web_address_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_table_row_cannot_reach_local_servers_or_files(server: str) -> None:
    for path, allow_urls, reason in (
        (f"{server}/photo", False, "image_not_embedded"),
        (f"{server}/photo", True, "url_refused"),
        ("/etc/hostname", True, "image_is_a_path"),
    ):
        with pytest.raises(ImageError) as caught:
            embedded_bytes({"bytes": None, "path": path}, allow_urls=allow_urls)
        assert caught.value.reason == reason


def test_host_that_wastes_bytes_is_given_up(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_urls, "MAX_BYTES", 100_000)
    monkeypatch.setattr(image_urls, "MAX_WASTED_BYTES", 250_000)
    reasons = [refused(f"{server}/large", anywhere) for _ in range(5)]
    assert reasons == ["file_too_large"] * 3 + ["host_given_up"] * 2
    assert fetch_image(f"{server.replace('127.0.0.1', 'localhost')}/photo", anywhere) == photo(1)


def test_slowly_failing_host_is_given_up_unless_mostly_useful() -> None:
    cost = image_urls._costs[URL("http://127.0.0.1:9")] = image_urls.HostCost(wasted_seconds=121.0)
    assert refused("http://127.0.0.1:9/x.jpg", anywhere) == "host_given_up"
    cost.useful_seconds = 500.0
    assert refused("http://127.0.0.1:9/x.jpg", anywhere) == "url_unreachable"


def test_pause_of_a_busy_host_is_wasted_time(server: str) -> None:
    assert refused(f"{server}/busy", anywhere) == "url_unreachable"
    (cost,) = image_urls._costs.values()
    assert cost.wasted_seconds >= 0.2


def test_process_that_ends_early_does_not_wait_for_fetches() -> None:
    code = "import time; from pipeline.sources.image_urls import fetch_ahead; "
    code += "print(next(fetch_ahead([0, 60], lambda seconds: time.sleep(seconds))))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
