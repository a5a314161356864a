"""Create clients for the servers in a configuration, as pipeline.inference.engines does."""

from typing import Any

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.inference.client import Client
from pipeline.inference.endpoints import Endpoint, named_endpoints
from pipeline.inference.probing import find_model
from pipeline.progress import NullProgress, Progress
from tests.plans import request_plan


def config_of(*urls: str, model: str | None = "model", **settings: Any) -> Config:
    return resolve(source="scenes", base_url=list(urls), model=model, **settings)


def client_of(config: Config, model: str = "model", progress: Progress | None = None) -> Client:
    max_tokens, progress = request_plan(config).largest_max_tokens, progress or NullProgress()
    return Client(model, config.server, max_tokens, urls=config.base_url, progress=progress)


def model_of(config: Config) -> tuple[str, str]:
    return find_model(config.base_url, config.model, config.server)


def endpoints_of(config: Config) -> list[Endpoint]:
    return named_endpoints(config.base_url, config.server)
