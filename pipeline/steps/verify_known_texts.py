"""Choose the texts that are known to be true or false of an image, which measure how often a check errs.

Human captions of the image are true. A caption of another image is false, and so is a text about the image
in which one word was replaced.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from pipeline.dataset.calibration import TRUE, KnownTexts
from pipeline.digests import hash_to_unit
from pipeline.inference import verification
from pipeline.tables import HUMAN
from pipeline.text.content_keys import content_words
from pipeline.text.falsehoods import plant_falsehoods
from pipeline.text.language import FUNCTION_WORDS
from pipeline.text.normalize import words_of

OTHER_IMAGE = "other_image"  # the kind of captions of another image
# Maximum known truths and planted falsehoods per image. Each costs up to four requests.
MAX_TRUTHS, MAX_FALSEHOODS = 3, 2
Claim = list[verification.Check]  # the questions about a claim
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KnownSample:
    """A sample with known texts.

    Falsehoods are made from the text `base`. `said` has the words of all texts about the sample: a statement
    with these words alone may be true. `rank` orders the candidates.
    """

    known: KnownTexts
    base: str
    said: set[str]
    rank: Callable[[str], float]

    @classmethod
    def of(cls, known: KnownTexts, captions: Sequence[Mapping[str, Any]], seed: int) -> "KnownSample":
        """Return the known texts of a sample, from rows of its captions."""
        if all(caption["prompt_id"] == HUMAN for caption in captions):
            # The human captions are the texts to check, so they are not known to be true.
            known = replace(known, captions=())
        texts = (*known.captions, *(caption["clean_text"] for caption in captions))
        said = {word for text in texts for word in (*words_of(text), *content_words(text))}
        if said.issuperset(facts_in(known.foreign or "")):
            known = replace(known, foreign=None)
        return cls(known, texts[0], said, partial(hash_to_unit, seed, captions[0]["sample_id"]))

    @property
    def to_split(self) -> list[str]:
        """The texts whose claims are asked about."""
        return [text for text in (self.base, self.known.foreign) if text]

    def claims(self, claims: Mapping[str, list[Claim]], *, splits: bool) -> Iterator[tuple[str, Claim]]:
        """Yield the known claims with their kinds. `claims` has the claims of the texts in `to_split`.

        `splits` states whether the model found these claims, or a rule.
        """
        if self.known.captions:
            yield from ((TRUE, claim) for claim in claims[self.base][:MAX_TRUTHS])
        planted: dict[str, Claim] = {}
        for claim in claims[self.base]:
            for kind, questions in self._plant(claim[0], splits=splits):
                planted.setdefault(kind, questions)
        yield from self._choose(planted.items())
        if self.known.foreign and splits:
            for claim in claims[self.known.foreign]:
                if not self.said.issuperset(facts_in(str(claim[0].claim))):
                    yield OTHER_IMAGE, claim
                    break

    def _plant(self, claim: verification.Check, *, splits: bool) -> Iterator[tuple[str, Claim]]:
        """Yield the kinds and questions of claims in which one word is replaced."""
        if splits:
            for kind, text in plant_falsehoods(str(claim.claim), self.said, self.rank):
                yield kind, verification.claim_checks(text)
        else:
            for kind, answer in plant_falsehoods(claim.expected, (), self.rank):
                text = f"{claim.question} {answer}"
                yield kind, [claim._replace(expected=answer, claim=text)]

    @property
    def texts(self) -> list[tuple[str, str]]:
        """The known texts that a judge rates, with their kinds."""
        texts = [(TRUE, text) for text in self.known.captions[:1]]
        texts += self._choose(plant_falsehoods(self.base, self.said, self.rank))
        return texts + [(OTHER_IMAGE, text) for text in (self.known.foreign,) if text]

    def _choose(self, planted: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
        return sorted(planted, key=lambda one: self.rank(one[0]))[:MAX_FALSEHOODS]


def facts_in(text: str) -> set[str]:
    """Return the words of a text that state something about an image."""
    return set(content_words(text)) - FUNCTION_WORDS
