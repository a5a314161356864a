"""Fetch hostile URLs in a network namespace of its own: a server there listens on every internal address, and counts who comes.

Run as `unshare --net python -m tests.hostile.namespace`; prints JSON.
"""

import fcntl
import json
import socket
import struct
import threading
from typing import Any

from pipeline.errors import ImageError
from pipeline.sources import image_urls
from pipeline.sources.image_urls import fetch_image

SET_ADDRESS, SET_FLAGS, UP = 0x8916, 0x8914, 0x1
INTERNAL = ("127.0.0.1", "169.254.169.254", "10.0.0.1", "192.168.0.1", "172.16.0.1", "168.63.129.16", "100.100.100.200")
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


def bring_up() -> None:
    """Bring up loopback with an address of each kind: in a new namespace there is nothing else."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, SET_FLAGS, struct.pack("16sh", b"lo", UP))
        for number, address in enumerate(INTERNAL[1:]):
            name = f"lo:{number}".encode()
            request = struct.pack("16sHH4s8s", name, socket.AF_INET, 0, socket.inet_aton(address), bytes(8))
            fcntl.ioctl(handle, SET_ADDRESS, request)


def resolve_names(asked: dict[str, int]) -> Any:
    """Return a resolver that lies: the second answer is another than the first, or one of two is internal."""
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(host, str) or not host.endswith(".example"):
            return real(host, port, *arguments, **options)
        asked[host] = asked.get(host, 0) + 1
        public, internal = "93.184.216.34", "10.0.0.1"
        addresses = {
            "rebinds.example": [public if asked[host] == 1 else internal],
            "two.example": [public, internal],
            "internal.example": [internal],
            "redirects.example": [public],
        }.get(host, [public])
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    return getaddrinfo


def main() -> None:
    """Fetch all, and print the reasons and the connections that arrived."""
    bring_up()
    came: list[str] = []

    def serve(family: int, address: str) -> None:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address, 80))
            listener.listen()
            ready.release()
            while True:
                connection, peer = listener.accept()
                came.append(str(connection.getsockname()[0]))
                connection.close()
                del peer

    ready = threading.Semaphore(0)
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        threading.Thread(target=serve, args=(family, address), daemon=True).start()
        ready.acquire()
    with socket.create_connection(("10.0.0.1", 80), timeout=5):
        pass  # the server is there, and would be reached
    with socket.create_connection(("::1", 80), timeout=5):
        pass
    while len(came) < 2:
        threading.Event().wait(0.01)
    asked: dict[str, int] = {}
    socket.getaddrinfo = resolve_names(asked)
    image_urls.MAX_SECONDS = 3.0
    reasons = {}
    for url in URLS:
        try:
            reasons[url] = f"FETCHED {fetch_image(url)!r}"
        except ImageError as error:
            reasons[url] = error.reason
        except Exception as error:  # noqa: BLE001  # what no run should end with
            reasons[url] = f"TRACEBACK {error!r}"
    print(json.dumps({"reasons": reasons, "came": came[2:], "asked": asked}))


main()
