"""Addresses of servers, as settings name them."""

from urllib.parse import urlsplit

AT_SERVER = "@http"  # between the name of a judge and its address


def address_of(url: str) -> str:
    """Return the address under which a server speaks the protocol: with /v1 where no path is given, and in one spelling."""
    parts = urlsplit(url.rstrip("/").removesuffix("/chat/completions"))
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    user, at, _ = parts.netloc.rpartition("@")
    usual = {"http": 80, "https": 443}[parts.scheme]
    port = "" if parts.port in (None, usual) else f":{parts.port}"
    return f"{parts.scheme}://{user}{at}{host}{port}{parts.path.rstrip('/') or '/v1'}"


def judge_address(judge: str | None) -> str:
    """Return the address in MODEL@URL; empty if there is none."""
    _, at, rest = (judge or "").partition(AT_SERVER)
    return at.removeprefix("@") + rest


def origin_of(url: str) -> tuple[str, str]:
    """Return the scheme, and the host with its port, of a server."""
    parts = urlsplit(address_of(url))
    return parts.scheme, parts.netloc.rpartition("@")[2]
