"""POPE (Li et al., 2023): a captioner is asked for things that are in an image, and for as many that are not.

What is in an image, its references say (chair.py): a thing that they leave out may be asked for as absent.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.digests import hash_to_unit
from pipeline.text.objects import PERSON, is_kind_of, named_things
from pipeline.text.vqa_answers import normalize_answer
from trainer.checkpoint import Checkpoint
from trainer.data import Example
from trainer.features import FeatureSource
from trainer.generate import answer_questions
from trainer.prompts import answering_prompt

MAX_IMAGES = 500  # that are asked about, as in POPE
MAX_PROBES = 3  # of each kind, about an image
MIN_IMAGES = 2  # that show a thing, for it to be asked for
ABSENT_KINDS = ("random", "popular", "adversarial")  # any things, the most frequent, those most often seen beside what is there
_UNCOUNTED = "water grass snow sand food furniture luggage fruit meat hair clothing"
_MASSES = frozenset(_UNCOUNTED.split())


@dataclass(frozen=True, slots=True)
class Probe:
    """A question for a thing in an image, and whether it is there; it counts for the scores of `kinds` of absent things."""

    sample_id: str
    question: str
    is_there: bool
    kinds: tuple[str, ...]


@dataclass(slots=True)
class PopeEvaluation:
    """The probes of some images, and what was answered."""

    probes: dict[str, list[Probe]]  # by sample id
    source: str  # in the prompts of answers
    answers: dict[Probe, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, examples: Sequence[Example], references: Sequence[Sequence[str]]
    ) -> "PopeEvaluation | None":
        """Return what to ask about the first images; None if the captioner has learned no answers, or nothing can be asked."""
        prompts = checkpoint.captioner.config.prompts
        if all(style for _, style in prompts):
            return None
        probes = make_probes([example.sample_id for example in examples], references)
        return cls(probes, answering_prompt(prompts)[0]) if probes else None

    def ask(self, checkpoint: Checkpoint, features: FeatureSource, shown: Sequence[Example]) -> None:
        """Ask all that is to be asked about the images of these examples."""
        pairs = [(example, probe) for example in shown for probe in self.probes.get(example.sample_id, ())]
        questions = [(example, probe.question) for example, probe in pairs]
        answers = answer_questions(checkpoint, features, questions, self.source)
        self.answers.update({probe: answer for (_, probe), answer in zip(pairs, answers, strict=True)})

    def scores(self) -> dict[str, dict[str, float]]:
        """Return for each kind of absent things the accuracy; precision, recall and F1 of yes; and the share of yes.

        An answer that is neither yes nor no is wrong.
        """
        return {kind: _score([(p, text) for p, text in self.answers.items() if kind in p.kinds]) for kind in ABSENT_KINDS}


def make_probes(ids: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[Probe]]:
    """Return the probes of the first images, by sample id; the same ones for the same images."""
    present = [{thing.concept for text in of_image for thing in named_things(text)} for of_image in references]
    images = Counter(concept for concepts in present for concept in concepts)
    frequent = [concept for concept, count in images.most_common() if count >= MIN_IMAGES]
    word_of, beside = _usual_words(references), _count_beside(present)
    probes: dict[str, list[Probe]] = {}
    for sample_id, concepts in list(zip(ids, present, strict=True))[:MAX_IMAGES]:
        there = [concept for concept in frequent if concept in concepts]
        absent = [concept for concept in frequent if not any(is_kind_of(concept, one) for one in concepts)]
        count = min(MAX_PROBES, len(there), len(absent))
        if not count:
            continue
        order = random.Random(hash_to_unit(sample_id))
        seen_beside = Counter({concept: sum(beside[one][concept] for one in concepts) for concept in absent})
        chosen = {
            "random": order.sample(absent, count),
            "popular": absent[:count],
            "adversarial": [concept for concept, _ in seen_beside.most_common(count)],
        }
        of_image = [Probe(sample_id, _question(word_of[one]), True, ABSENT_KINDS) for one in order.sample(there, count)]
        for concept in dict.fromkeys(one for several in chosen.values() for one in several):
            kinds = tuple(kind for kind in ABSENT_KINDS if concept in chosen[kind])
            of_image.append(Probe(sample_id, _question(word_of[concept]), False, kinds))
        probes[sample_id] = of_image
    return probes


def _count_beside(present: Sequence[set[int]]) -> dict[int, Counter[int]]:
    """Return for each concept how many images show it together with each other one."""
    beside: dict[int, Counter[int]] = defaultdict(Counter)
    for concepts in present:
        for concept in concepts:
            beside[concept].update(concepts - {concept})
    return beside


def _usual_words(references: Sequence[Sequence[str]]) -> dict[int, str]:
    """Return the most frequent word for each concept; a person is asked for as a person."""
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for thing in (thing for of_image in references for text in of_image for thing in named_things(text)):
        counts[thing.concept][thing.word] += 1
    return {concept: words.most_common(1)[0][0] for concept, words in counts.items()} | {PERSON: "person"}


def _question(word: str) -> str:
    article = "any" if word in _MASSES else "an" if word[0] in "aeiou" else "a"
    return f"Is there {article} {word} in the image?"


def _score(answered: Sequence[tuple[Probe, str]]) -> dict[str, float]:
    pairs = [(probe.is_there, normalize_answer(text).partition(" ")[0]) for probe, text in answered]
    yes = [is_there for is_there, answer in pairs if answer == "yes"]
    right = sum(answer == ("yes" if is_there else "no") for is_there, answer in pairs)
    precision = sum(yes) / max(1, len(yes))
    recall = sum(yes) / max(1, sum(is_there for is_there, _ in pairs))
    return {
        "count": len(pairs),
        "accuracy": right / max(1, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes": len(yes) / max(1, len(pairs)),
        "neither": sum(answer not in ("yes", "no") for _, answer in pairs) / max(1, len(pairs)),
    }
