"""Things that a captioner names and nobody else sees: in its captions (CHAIR), and when it is asked for them (POPE).

Both were made for the 80 objects of COCO, which people have marked in every image. Here a thing is in an image if a reference
names it, or a kind of it, by WordNet (pipeline/text/objects.py). References leave things out, walls and the sky above all: the
shares are too high, and mean something beside those of people, whose captions are judged by the others of the same image.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.digests import hash_to_unit
from pipeline.text.objects import Named, is_kind_of, named_things
from pipeline.text.vqa_answers import normalize_answer
from trainer.checkpoint import Checkpoint
from trainer.data import Example
from trainer.features import FeatureSource
from trainer.generate import answer_questions
from trainer.prompts import answering_prompt

MAX_PROBED_IMAGES = 500  # as POPE asks about
PROBES = 3  # of each kind, about an image
MIN_IMAGES = 2  # that name a thing, for it to be asked for
ABSENT = ("random", "popular", "adversarial")  # things that are asked for in vain: any, frequent ones, or those that go along


def chair(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return CHAIR (Rohrbach et al., 2018): the share of captions that name a thing which no reference names, and of things.

    `things` is how many a caption names on average.
    """
    wrong = [_unsupported(caption, refs) for caption, refs in zip(captions, references, strict=True)]
    named = [sum(1 for _ in named_things(caption)) for caption in captions]
    return {
        "captions": sum(map(bool, wrong)) / max(1, len(wrong)),
        "of_things": sum(map(len, wrong)) / max(1, sum(named)),
        "things": sum(named) / max(1, len(named)),
    }


def chair_of_people(references: Sequence[Sequence[str]]) -> dict[str, float] | None:
    """Return CHAIR of the first reference of each image by the others; None if no image has several."""
    several = [refs for refs in references if len(refs) > 1]
    return chair([refs[0] for refs in several], [refs[1:] for refs in several]) if several else None


def _unsupported(caption: str, references: Sequence[str]) -> list[Named]:
    supported = {thing.concept for reference in references for thing in named_things(reference)}
    return [one for one in named_things(caption) if not any(is_kind_of(one.concept, other) for other in supported)]


@dataclass(frozen=True, slots=True)
class Probe:
    """A question for a thing in an image, and whether it is there; `kinds` are those of ABSENT whose scores it counts for."""

    sample_id: str
    question: str
    is_there: bool
    kinds: tuple[str, ...]


@dataclass(slots=True)
class Probing:
    """Questions for things that are in images, and for as many that are not (POPE; Li et al., 2023)."""

    probes: dict[str, list[Probe]]  # by sample id
    source: str  # in the prompts of answers
    answers: dict[Probe, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, examples: Sequence[Example], references: Sequence[Sequence[str]]) -> "Probing | None":
        """Return what is asked about the first images; None if the captioner has learned no answers, or there is nothing."""
        prompts = checkpoint.captioner.config.prompts
        if all(style for _, style in prompts):
            return None
        probes = make_probes([example.sample_id for example in examples], references)
        return cls(probes, answering_prompt(prompts)[0]) if probes else None

    def ask(self, checkpoint: Checkpoint, features: FeatureSource, shown: Sequence[Example]) -> None:
        """Ask all that is to be asked about the images of these examples."""
        asked = [(example, probe) for example in shown for probe in self.probes.get(example.sample_id, ())]
        pairs = [(example, probe.question) for example, probe in asked]
        answers = answer_questions(checkpoint, features, pairs, self.source)
        self.answers.update({probe: answer for (_, probe), answer in zip(asked, answers, strict=True)})

    def scores(self) -> dict[str, dict[str, float]]:
        """Return for each kind of absent things the accuracy, precision, recall and F1 of yes, and the share of yes.

        An answer that is neither yes nor no is wrong.
        """
        return {kind: _score([(p, said) for p, said in self.answers.items() if kind in p.kinds]) for kind in ABSENT}


def make_probes(ids: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[Probe]]:
    """Return the probes of the first images, by sample id; the same ones for the same images."""
    present = [{thing.concept: thing.word for text in refs for thing in named_things(text)} for refs in references]
    images = Counter(concept for concepts in present for concept in concepts)
    words = _words([thing for concepts in present for thing in concepts.items()])
    frequent = [concept for concept, count in images.most_common() if count >= MIN_IMAGES and concept in words]
    beside: dict[int, Counter[int]] = defaultdict(Counter)
    for concepts in present:
        for concept in concepts:
            beside[concept].update(other for other in concepts if other != concept)
    probes: dict[str, list[Probe]] = {}
    for sample_id, concepts in list(zip(ids, present, strict=True))[:MAX_PROBED_IMAGES]:
        there = [concept for concept in frequent if concept in concepts]
        absent = [concept for concept in frequent if not any(is_kind_of(concept, one) for one in concepts)]
        order = random.Random(hash_to_unit(sample_id))
        count = min(PROBES, len(there), len(absent))
        goes_along = Counter({concept: sum(beside[one][concept] for one in concepts) for concept in absent})
        chosen = {
            "random": order.sample(absent, count),
            "popular": absent[:count],
            "adversarial": [concept for concept, _ in goes_along.most_common(count)],
        }
        of_image = [Probe(sample_id, _question(words[one]), True, ABSENT) for one in order.sample(there, count)]
        for concept in dict.fromkeys(one for several in chosen.values() for one in several):
            kinds = tuple(kind for kind in ABSENT if concept in chosen[kind])
            of_image.append(Probe(sample_id, _question(words[concept]), False, kinds))
        if count:
            probes[sample_id] = of_image
    return probes


def _words(named: Sequence[tuple[int, str]]) -> dict[int, str]:
    """Return the most frequent word for each concept that is no plural, as far as its ending tells."""
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for concept, word in named:
        if not word.endswith("s") or word.endswith("ss"):
            counts[concept][word] += 1
    return {concept: of_concept.most_common(1)[0][0] for concept, of_concept in counts.items()}


def _question(word: str) -> str:
    return f"Is there {'an' if word[0] in 'aeiou' else 'a'} {word} in the image?"


def _score(answered: Sequence[tuple[Probe, str]]) -> dict[str, float]:
    said = [(probe.is_there, normalize_answer(answer).partition(" ")[0]) for probe, answer in answered]
    yes = [is_there for is_there, answer in said if answer == "yes"]
    right = sum((answer == "yes") if is_there else (answer == "no") for is_there, answer in said)
    precision = sum(yes) / max(1, len(yes))
    recall = sum(yes) / max(1, sum(is_there for is_there, _ in said))
    return {
        "count": len(said),
        "accuracy": right / max(1, len(said)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes": len(yes) / max(1, len(said)),
    }


def describe(result: dict[str, Any]) -> list[str]:
    """Return the figures of an evaluation's `things` as lines for people."""
    own, shuffled, people = result["chair"], result["shuffled_chair"], result.get("people")
    line = f"{own['captions']:.0%} of the captions name a thing that no reference names, {own['of_things']:.0%} of all things"
    beside = f"; with shuffled images {shuffled['captions']:.0%} and {shuffled['of_things']:.0%}"
    beside += f"; people {people['captions']:.0%} and {people['of_things']:.0%}" if people else ""
    asked = [
        f"asked for {kind} things: right {scores['accuracy']:.0%}, yes {scores['yes']:.0%} (half is true; {scores['count']})"
        for kind, scores in result.get("probes", {}).items()
    ]
    return [line + beside, *asked]
