"""Find the proxy that the environment names for an address."""

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for an address (HTTPS_PROXY, HTTP_PROXY, and NO_PROXY for exceptions).

    Servers of this machine and of a private network, and hosts without a dot in their name, are asked directly.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        is_near = not ipaddress.ip_address(host).is_global
    except ValueError:
        is_near = "." not in host
    proxies = getproxies()
    # *.example.com, which `proxy_bypass` does not know, as many write .example.com.
    subdomains = tuple(entry.strip()[1:] for entry in proxies.get("no", "").split(",") if entry.strip().startswith("*."))
    if is_near or host.endswith(subdomains) or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxy = proxies.get(parts.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"
