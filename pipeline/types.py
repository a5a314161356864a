"""The few shapes that sources, engines and the run hand to each other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image to annotate. `id` is the sha256 of `image`, the encoded bytes as the source holds them."""

    id: str
    source_row: str
    image: bytes
    width_px: int
    height_px: int
    licence: str
    references: tuple[str, ...] = ()  # captions that the source holds to be true
    facts: dict[str, Any] | None = None  # what is known of a drawn scene; no model sees it


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One row of a source that cannot be used, and why."""

    source_row: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A set of images by name. `revision` changes when what it yields changes."""

    name: str
    revision: str
    rows: Iterator[Sample | Rejected]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a model chooses its tokens. Temperature 0 is greedy."""

    temperature: float
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question to a model about one image. `id` is the digest of all that the reply depends on."""

    id: str
    sample_id: str
    task: str
    style: str
    prompt_id: str
    system: str
    text: str
    image: bytes
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a model answered. Any `finish_reason` but "stop" means that the text is not whole."""

    request_id: str
    text: str
    finish_reason: str
    prompt_tokens: int
    reply_tokens: int


class Engine(Protocol):
    """Something that answers requests: a model in this process, or a server."""

    model: str
    revision: str

    def ask(self, requests: list[Request]) -> Iterator[list[Reply]]:
        """Yield replies in groups as they are done, until each request has one."""
        ...
