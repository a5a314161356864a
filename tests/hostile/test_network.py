"""Network: no untrusted URL reaches an internal address.

The test runs this file as `unshare --net python -m tests.hostile.test_network`. There, a server listens on
all internal addresses and records connections.
"""

import fcntl
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
from typing import Any

import pytest

from pipeline.errors import ImageError
from pipeline.sources import image_urls
from pipeline.sources.image_urls import fetch_image

SET_ADDRESS, SET_FLAGS, UP = 0x8916, 0x8914, 0x1
INTERNAL = (
    "127.0.0.1", "169.254.169.254", "10.0.0.1", "192.168.0.1", "172.16.0.1", "168.63.129.16",
    "100.100.100.200",
)  # fmt: skip
URLS = (
    *(f"http://{address}/latest/meta-data" for address in INTERNAL),
    "http://localhost/", "http://LOCALHOST./", "http://0/", "http://0.0.0.0/", "http://127.1/", "http://127.000.000.001/",
    "http://2130706433/", "http://0x7f000001/", "http://017700000001/", "http://[::1]/", "http://[::]/",
    "http://[::ffff:127.0.0.1]/", "http://[::ffff:a00:1]/", "http://[64:ff9b::a00:1]/", "http://[2002:a00:1::]/",
    "http://public.example@127.0.0.1/", "http://127.0.0.1#@public.example/", "http://127.0.0.1%2f@public.example/",
    "http://127.0.0.1:80\\@public.example/", "http:///127.0.0.1/", "http:127.0.0.1/", "//127.0.0.1/", "file:///etc/passwd",
    "gopher://127.0.0.1/_x", "ftp://127.0.0.1/x", "dict://127.0.0.1/x", "http://127.0.0.1\r\nHost: evil/", "http://①②⑦.⓪.⓪.①/",
    "http://rebinds.example/", "http://two.example/", "http://redirects.example/", "http://internal.example/",
)  # fmt: skip
PUBLIC = "93.184.216.34"
ADDRESSES = {"rebinds.example": [PUBLIC], "two.example": [PUBLIC, "10.0.0.1"]}
ADDRESSES["internal.example"] = ["10.0.0.1"]


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: network namespaces are of Linux")
def test_no_url_reaches_internal_address() -> None:
    unshare = shutil.which("unshare")
    assert unshare, "util-linux is on every Linux"
    for options in (("--net",), ("--net", "--map-root-user")):
        command = [unshare, *options, sys.executable, "-m", "tests.hostile.test_network"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if "unshare" not in done.stderr:
            break
    else:
        pytest.skip(f"NOT RUN: a network namespace cannot be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["connections"] == []
    assert set(result["reasons"].values()) <= {"url_refused", "url_unreachable"}, result["reasons"]
    assert len(result["reasons"]) == len(URLS)
    # resolved once: a second answer cannot be another address
    assert result["asked"].count("rebinds.example") == 1


def bring_up() -> None:
    """Bring up loopback with an internal address of each kind."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, SET_FLAGS, struct.pack("16sh", b"lo", UP))
        for number, address in enumerate(INTERNAL[1:]):
            name = f"lo:{number}".encode()
            request = struct.pack("16sHH4s8s", name, socket.AF_INET, 0, socket.inet_aton(address), bytes(8))
            fcntl.ioctl(handle, SET_ADDRESS, request)


def listen(connections: list[str]) -> None:
    """Accept connections to port 80 of all addresses in threads, and record the addresses."""

    def serve(listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            connections.append(str(connection.getsockname()[0]))
            connection.close()

    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        listener = socket.create_server((address, 80), family=family)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
    for address in ("10.0.0.1", "::1"):
        with socket.create_connection((address, 80), timeout=5):
            pass  # the server is reachable
    while len(connections) < 2:
        threading.Event().wait(0.01)
    connections.clear()


def main() -> None:
    """Fetch all URLs, and print the reasons, the connections, and the resolved names."""
    bring_up()
    connections: list[str] = []
    listen(connections)
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        """Resolve test names to internal addresses: in the second answer only, or as one of two."""
        if not isinstance(host, str) or not host.endswith(".example"):
            return resolve(host, port, *arguments, **options)
        is_rebound = host == "rebinds.example" and host in asked
        addresses = ["10.0.0.1"] if is_rebound else ADDRESSES.get(host, [PUBLIC])
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    socket.getaddrinfo = getaddrinfo
    image_urls.MAX_SECONDS = 3.0
    reasons = {}
    for url in URLS:
        try:
            reasons[url] = f"FETCHED {fetch_image(url)!r}"
        except ImageError as error:
            reasons[url] = error.reason
        except Exception as error:  # noqa: BLE001  # an error that would end a run
            reasons[url] = f"TRACEBACK {error!r}"
    print(json.dumps({"reasons": reasons, "connections": connections, "asked": asked}))


if __name__ == "__main__":
    main()
