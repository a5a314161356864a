"""Open the port of a server and format its URL. Does not import torch, so errors appear at once."""

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can be reached only from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def url_of(host: str, listener: socket.socket) -> str:
    """Return the URL of a server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
