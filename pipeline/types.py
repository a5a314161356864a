"""The types that sources, engines and executors exchange."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

Context = tuple[tuple[str, str], ...]  # names of columns of the source, with their values of one row

# Licenses of images. `push` redistributes pixels only if their licenses allow it; pixels of an unknown license are pushed to a
# private repository, unless the user states that they are public.
UNKNOWN = "unknown"  # files of a user, of which no license was stated
FLICKR_TERMS = "flickr-terms"  # photos of Flickr: research and education, no redistribution
NTT_EVALUATION = "ntt-evaluation"  # SlideVQA: internal evaluation only
GATED = "gated"  # on the Hub, with access granted by the owner to each user
UNDECLARED = "undeclared"  # on the Hub, without a declared license
KNOWN_LICENSES = (  # by the Hub's names, of those that let pixels be passed on
    "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "apache-2.0", "mit", "odc-by",
    "odbl", "pddl",
)  # fmt: skip
NON_REDISTRIBUTABLE = (FLICKR_TERMS, NTT_EVALUATION, GATED, UNDECLARED)


def non_redistributable(licenses: list[str]) -> list[str]:
    """Return the licenses under which pixels may not be redistributed."""
    return [name for name in licenses if name.partition(",")[0] in NON_REDISTRIBUTABLE]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceQA:
    """A question about a sample that people asked, with the answers that they gave."""

    question: str
    answers: tuple[str, ...]
    answer_type: str | None = None
    evidence_pages: tuple[int, ...] | None = None  # counted from 1
    expression: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image to annotate, or the pages of one deck, as the source encodes them.

    `id` is the sha256 of the image; of a deck, of its pages' hashes (images.decode.deck_id). Sizes are those of the first page.
    """

    id: str
    source_row: str
    images: tuple[bytes, ...]
    pdq_hashes: tuple[bytes, ...] = ()  # of each image; none if all images are known to be distinct
    width_px: int
    height_px: int
    license: str
    split: str | None = None  # as given by the source: train, validation or test
    references: tuple[str, ...] = ()  # captions that the source holds to be true
    context: Context = ()  # what a prompt may say about the sample
    reference_qa: tuple[ReferenceQA, ...] | None = None  # None: the source has no questions at all

    def to_row(self) -> dict[str, Any]:
        """Return the sample as a row of tables.SAMPLE."""
        values = asdict(self)
        return {"sample_id": values.pop("id"), **values}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Sample":
        """Return the sample of a row of tables.SAMPLE."""
        values = dict(row)
        return cls(id=values.pop("sample_id"), **values)


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """Some samples, whose images are read when they are needed: of a run that goes on, most replies are there."""

    ids: Sequence[str]
    read_images: Callable[[], Sequence[tuple[bytes, ...]]]  # of each sample

    @classmethod
    def of(cls, samples: Iterable[tuple[str, tuple[bytes, ...]]]) -> "SampleBatch":
        """Return a batch of samples whose images are in memory, given by their ids."""
        ids, images = zip(*samples, strict=True)
        return cls(ids, lambda: images)


class SampleInfo(NamedTuple):
    """What the annotations of a sample are read with."""

    sample_id: str
    pages: int
    source_split: str | None = None
    width_px: int = 0  # of the first page, upright
    height_px: int = 0
    human: tuple[dict[str, Any], ...] = ()  # annotations of texts that people wrote, if they are kept (tasks/human.py)


class SourceTexts(NamedTuple):
    """What the source says of a sample, as far as requests depend on it."""

    context: Context = ()
    has_captions: bool = False  # that people wrote
    has_questions: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One row of a source that cannot be used, and why."""

    source_row: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSample:
    """The images of a row as a source has them, which nobody has decoded yet; `fields` are those of its Sample."""

    source_row: str
    images: tuple[bytes, ...]
    license: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A named set of images. `revision` changes when its rows change; it is empty where nobody can tell."""

    name: str
    revision: str
    read: Callable[[int], Iterator[Sample | Rejected]]  # yields the rows behind so many first ones, in the same order each time
    count: Callable[[], int | None] = lambda: None  # number of rows, if it is known without reading all
    messages: tuple[str, ...] = ()  # what a user should know before the run: files that are not read, captions that were found
    decks: bool = False  # whether its samples are documents of several pages
    is_partial: bool = False  # whether it holds a first part only of what it is named after
    license: str = ""  # of all its images, where the place says it that the source is read from

    @property
    def rows(self) -> Iterator[Sample | Rejected]:
        """All rows, from the first."""
        return self.read(0)


@dataclass(frozen=True, slots=True)
class SourceSlice:
    """Part `number`, counted from 0, of the `of` disjoint parts that make up a source."""

    number: int
    of: int


ALL = SourceSlice(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a model chooses its tokens. Temperature 0 is greedy."""

    temperature: float
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question to a model about one sample. `id` is the digest of all that the first reply depends on.

    An unusable reply is retried with other sampling under the same id: `attempt` counts from 0.
    """

    id: str
    sample_id: str
    task: str
    style: str
    prompt_id: str
    system: str
    text: str
    schema: str  # of the reply, as JSON
    sampling: Sampling
    images: tuple[bytes, ...] = ()  # that the model sees; left out until the request is to be sent
    pages: tuple[int, ...] | None = None  # which of the sample's images these are, counted from 1; None: all of them
    attempt: int = 0
    failed: tuple[str, str] | None = None  # an earlier reply and feedback on it, shown to the model

    @property
    def shows_image(self) -> bool:
        """Whether the model sees any image."""
        return self.pages != ()

    def pages_of(self, images: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Return those of a sample's images that the model sees."""
        return images if self.pages is None else tuple(images[page - 1] for page in self.pages)

    @property
    def shown(self) -> str:
        """The key of the images that the model sees: the sample, or some of its pages, or none."""
        return self.sample_id if self.pages is None else f"{self.sample_id}.{'-'.join(map(str, self.pages))}"

    def reply(self, text: str, finish_reason: str, prompt_tokens: int = 0, reply_tokens: int = 0) -> "Reply":
        """Return a reply to this attempt."""
        return Reply(self.id, self.attempt, text, finish_reason, prompt_tokens, reply_tokens)


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply of a model. Any `finish_reason` but "stop" means that the text is incomplete."""

    request_id: str
    attempt: int
    text: str
    finish_reason: str
    prompt_tokens: int
    reply_tokens: int
    max_pixels: int | None = None  # to which images were scaled down before they were sent; None: as the settings say
    seconds: float = field(default=0.0, compare=False)  # from sending the request to the reply; not in the journal


# synth's own finish reasons, if no model answered; `text` is the server's message. A later run retries.
REFUSED_BY_SERVER = "refused_by_server"
SERVER_ERROR = "server_error"
UNANSWERED = (REFUSED_BY_SERVER, SERVER_ERROR)


class RequestSource(Protocol):
    """The requests to answer, as an engine sees them."""

    def take(self) -> list[Request]:
        """Return the next requests; an empty list if there are none now. Replies may lead to more."""

    def sending(self, requests: Sequence[Request]) -> None:
        """Record that these requests are about to be sent."""

    def withdraw(self, requests: Sequence[Request]) -> None:
        """Take back that these requests, which have no reply, were to be sent: the run ends before."""

    def answered(self) -> bool:
        """Return whether any request has a reply already, from this run or an earlier one."""


class Engine(Protocol):
    """Answers requests by a model in this process, or by servers. A context manager; ready when entered."""

    model: str
    revision: str

    def __enter__(self) -> "Engine": ...

    def __exit__(self, *error: object) -> None: ...

    def ask(self, work: RequestSource) -> Iterator[list[Reply]]:
        """Yield replies in groups as they are done, until nothing is left to take and each request has its reply."""

    def metrics(self) -> dict[str, str]:
        """Return metrics for the progress display, by name."""
