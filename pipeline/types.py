"""The types that sources, engines and executors exchange."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Protocol

# The name of the model that the settings `model`, `base_url` and `engine` choose.
DEFAULT_MODEL = "default"
UNITS = ("requests", "prompt_tokens", "reply_tokens")  # units in which the use of a model is counted
# How images are compared: near-duplicates are rejected for photos, and only grouped for graphics.
ImageKind = Literal["photos", "graphics"]
# Names of mapped source columns, with their values in one row.
Context = tuple[tuple[str, str], ...]

# Image licenses. `push` redistributes pixels only if their license allows it. Pixels with an unknown license
# are pushed to a private repository, unless the user chooses a public one.
UNKNOWN = "unknown"
# Flickr's terms permit research and education, and SlideVQA's license permits internal evaluation. A Hub
# repository may require access requests (gated), or declare no license.
FLICKR_TERMS, NTT_EVALUATION, GATED, UNDECLARED = "flickr-terms", "ntt-evaluation", "gated", "undeclared"
# Hub identifiers of licenses that permit redistribution.
KNOWN_LICENSES = (
    "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0",
    "apache-2.0", "mit", "odc-by", "odbl", "pddl",
)  # fmt: skip
NON_REDISTRIBUTABLE = (FLICKR_TERMS, NTT_EVALUATION, GATED, UNDECLARED)


def non_redistributable(licenses: list[str]) -> list[str]:
    """Return the licenses that forbid the redistribution of pixels."""
    return [name for name in licenses if name.partition(",")[0] in NON_REDISTRIBUTABLE]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceQA:
    """A human question about a sample, with all human answers to it. Page numbers start at 1."""

    question: str
    answers: tuple[str, ...]
    answer_type: str | None = None
    evidence_pages: tuple[int, ...] | None = None
    expression: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image to annotate, or the pages of one deck, encoded as in the source.

    `id` is the SHA-256 of the image, or of the hashes of a deck's pages (images.decode.deck_id). `width_px`
    and `height_px` are the size of the first page. `pdq_hashes` is empty if all images are known to be
    distinct. `contrast` is the largest contrast of a page (images.decode.check_image). `references` are human
    captions. `reference_qa` is None if the source has no questions about any image.
    """

    id: str
    source_row: str
    images: tuple[bytes, ...]
    pdq_hashes: tuple[bytes, ...] = ()
    width_px: int
    height_px: int
    license: str
    split: str | None = None
    references: tuple[str, ...] = ()
    context: Context = ()
    reference_qa: tuple[ReferenceQA, ...] | None = None
    contrast: float = math.inf

    def to_row(self) -> dict[str, Any]:
        """Return the sample as a row of tables.SAMPLE."""
        # `asdict(self)` would copy every value.
        names = (field.name for field in fields(self) if field.name not in ("id", "contrast"))
        values = {name: getattr(self, name) for name in names}
        questions = self.reference_qa and [asdict(question) for question in self.reference_qa]
        return {"sample_id": self.id, **values, "reference_qa": questions}


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """Some samples. Their images are read only on demand, since a resumed run needs few of them."""

    ids: Sequence[str]
    read_images: Callable[[], Sequence[tuple[bytes, ...]]]

    @classmethod
    def of(cls, samples: Iterable[tuple[str, tuple[bytes, ...]]]) -> "SampleBatch":
        """Return a batch of samples whose images are in memory."""
        ids, images = zip(*samples, strict=True)
        return cls(ids, lambda: images)


class SampleInfo(NamedTuple):
    """The properties of a sample that its annotations depend on.

    `width_px` and `height_px` are the size of the upright first page. `human` has annotations made
    from human texts, if human texts are kept (tasks/human.py).
    """

    sample_id: str
    pages: int
    source_split: str | None = None
    width_px: int = 0
    height_px: int = 0
    human: tuple[dict[str, Any], ...] = ()


class SourceTexts(NamedTuple):
    """A sample's context, whether it has human captions and questions, and the size of its first page.

    Requests about the sample depend on them. `escalated` has the pairs of task and style that are also
    requested from the next model of the ladder.
    """

    context: Context = ()
    has_captions: bool = False
    has_questions: bool = False
    width_px: int = 0
    height_px: int = 0
    escalated: frozenset[tuple[str, str]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A source row that cannot be used, with the reason."""

    source_row: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSample:
    """A source row with its undecoded images. `fields` has the remaining fields of its Sample."""

    source_row: str
    images: tuple[bytes, ...]
    license: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A named set of images.

    `revision` changes when the rows change, and is "" if changes cannot be detected. `read(n)` yields the
    rows after the first n, always in the same order. `count` returns the number of rows, or None if it is
    unknown before all rows are read. `messages` are shown before the run. With `decks`, samples are documents
    of several pages. `is_partial` states that the source has only the first part of the named dataset.
    `license` applies to all images, and is "" if the source states no license.
    """

    name: str
    revision: str
    read: Callable[[int], Iterator[Sample | Rejected]]
    count: Callable[[], int | None] = lambda: None
    messages: tuple[str, ...] = ()
    decks: bool = False
    is_partial: bool = False
    license: str = ""

    @property
    def rows(self) -> Iterator[Sample | Rejected]:
        """All rows, starting with the first."""
        return self.read(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the model samples tokens. Temperature 0 means greedy decoding."""

    temperature: float
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question to a model about one sample. `id` is a digest of all that its reply depends on.

    An unusable reply is retried with other sampling settings under the same id. `attempt` starts at 0.
    `schema` is the JSON schema of the reply, or "" for a reply in plain text. `images` are attached only when
    the request is sent. `pages` has the numbers of the pages that the model sees, starting at 1, or is None
    for all pages. `failed` is an earlier reply with feedback on it, which the model also sees. Images are
    scaled down to `max_pixels`. `model` is the name of the model in the settings.
    """

    id: str
    sample_id: str
    task: str
    style: str
    prompt_id: str
    system: str
    text: str
    schema: str
    sampling: Sampling
    images: tuple[bytes, ...] = ()
    pages: tuple[int, ...] | None = None
    max_pixels: int | None = None
    attempt: int = 0
    failed: tuple[str, str] | None = None
    model: str = DEFAULT_MODEL
    wants_logprobs: bool = False

    @property
    def shows_image(self) -> bool:
        """Whether the model sees any image."""
        return self.pages != ()

    def pages_of(self, images: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Return those images of a sample that the model sees."""
        return images if self.pages is None else tuple(images[page - 1] for page in self.pages)

    @property
    def shown(self) -> str:
        """A key that identifies the images that the model sees."""
        return self.sample_id if self.pages is None else f"{self.sample_id}.{'-'.join(map(str, self.pages))}"

    def reply(
        self,
        text: str,
        finish_reason: str,
        prompt_tokens: int = 0,
        reply_tokens: int = 0,
        logprobs: Sequence[float] = (),
    ) -> "Reply":
        """Return a reply to this attempt of the request. `logprobs` are those of its tokens, if known."""
        reply = Reply(self.id, self.attempt, text, finish_reason, prompt_tokens, reply_tokens)
        if not (self.wants_logprobs and logprobs):
            return reply
        mean = round(math.fsum(logprobs) / len(logprobs), 6)
        return replace(reply, logprob_mean=mean, logprob_min=round(min(logprobs), 6))


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply of a model. If `finish_reason` is not "stop", the text is incomplete.

    `max_pixels` is the size to which images were scaled down, or None for the size in the request.
    `logprob_mean` and `logprob_min` are over the tokens, or None if the server returns no log-probabilities.
    """

    request_id: str
    attempt: int
    text: str
    finish_reason: str
    prompt_tokens: int
    reply_tokens: int
    max_pixels: int | None = None
    logprob_mean: float | None = None
    logprob_min: float | None = None


# Finish reasons of requests that the model did not answer. The reply text is the server's message. A later
# run sends the request again.
REFUSED_BY_SERVER = "refused_by_server"
SERVER_ERROR = "server_error"
UNANSWERED = (REFUSED_BY_SERVER, SERVER_ERROR)


class RequestSource(Protocol):
    """The requests to answer, as an engine sees them."""

    def take(self) -> list[Request]:
        """Return the next requests. An empty list is not final, since replies may lead to more requests."""

    def sending(self, requests: Sequence[Request]) -> None:
        """Record that these requests are about to be sent."""


class Engine(Protocol):
    """Answers requests with a model in this process or on servers. Its context must be entered first."""

    def __enter__(self) -> "Engine": ...

    def __exit__(self, *error: object) -> None: ...

    def ask(self, work: RequestSource) -> Iterator[list[Reply]]:
        """Yield groups of replies until `work` has no more requests and every request has its reply."""

    def metrics(self) -> dict[str, str]:
        """Return metrics for the progress display, by name."""
