"""The servers of `base_url`, with their keys and what the settings say of each."""

import os
from base64 import b64encode
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from pipeline.config import Config
from pipeline.config.addresses import address_of
from pipeline.errors import EngineError
from pipeline.inference.endpoints import KEY, LEAST_KEY_CHARACTERS, Endpoint
from pipeline.inference.pace import Pace

JUDGE_KEY = "SYNTH_JUDGE_API_KEY"  # for the judge's server, if it is another one: that must not get the key of the first
OPENAI_KEY = "OPENAI_API_KEY"  # for OpenAI's own servers


def named_endpoints(config: Config, key_name: str | None = None) -> list[Endpoint]:
    """Return the servers of `base_url`, with what the settings say of each.

    A server gets the key that the environment has under the name in its own settings, else under `key_name`, else under that
    for all servers, else under the usual one; where its address has a name and a password, these instead. Raises EngineError
    if a header of the settings names a variable that is not set.
    """
    endpoints = []
    for url in config.base_url:
        parts, settings = urlsplit(url), config.endpoint(url)
        usual = OPENAI_KEY if _wants_openai_key(parts.hostname or "") else KEY
        name = settings.key_env or key_name or config.server.key_env or usual
        address, login = _without_login(address_of(url))
        key = os.environ.get(name, "").strip()  # a file of keys may end its lines in its own way
        headers = {header: _from_environment(header, value) for header, value in settings.headers.items()}
        pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        all_headers = request_headers(key or None) | (login.headers if login else {}) | headers
        endpoints.append(Endpoint(address, all_headers, name, pace, weight=settings.weight))
        secret = (login.password or login.user) if login else ""
        endpoints[-1].keys += [secret] if len(secret) >= LEAST_KEY_CHARACTERS else []
    return endpoints


@dataclass(frozen=True, slots=True)
class Login:
    """The name and the password in the address of a server."""

    user: str
    password: str

    @property
    def headers(self) -> dict[str, str]:
        """The header that takes their place (RFC 7617)."""
        return {"Authorization": f"Basic {b64encode(f'{self.user}:{self.password}'.encode()).decode()}"}


def _without_login(url: str) -> tuple[str, Login | None]:
    """Return an address without the name and the password in it, which messages would show, and these."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    user, _, password = login.partition(":")
    return parts._replace(netloc=host).geturl(), Login(unquote(user), unquote(password))


def _wants_openai_key(host: str) -> bool:
    """Return whether a server is OpenAI's, and the environment has a key for it and none of ours."""
    return (host == "openai.com" or host.endswith(".openai.com")) and KEY not in os.environ and OPENAI_KEY in os.environ


def _from_environment(name: str, value: str) -> str:
    if not value.startswith("$"):
        return value
    if value[1:] not in os.environ:
        raise EngineError(f"the header {name} is to be {value}, which is not set", hint=f"export {value[1:]}=...")
    return os.environ[value[1:]].strip()


def request_headers(key: str | None) -> dict[str, str]:
    """Return the headers of a request, with a key if there is one."""
    return {
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        **({"Authorization": f"Bearer {key}"} if key else {}),
    }
