"""Endpoints: health and proxies of one server."""

import asyncio

import pytest

from pipeline.inference import endpoints
from pipeline.inference.endpoints import Endpoint


@pytest.mark.parametrize(
    ("health", "models", "is_healthy"),
    [
        (200, None, True), (503, 200, False), (None, 200, False), (404, 200, True), (404, 503, False),
        (302, 404, True),
    ],
)  # fmt: skip
def test_server_is_healthy_if_health_page_succeeds_or_in_its_absence_model_list_answers(
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
