"""VQA accuracy of a captioner that has learned answers."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.text.vqa_answers import normalize_answer
from trainer.checkpoint import Checkpoint
from trainer.data import Example, Question, most_common
from trainer.features import FeatureSource
from trainer.generate import answer_questions
from trainer.metrics import derangement
from trainer.prompts import answering_prompt


@dataclass(frozen=True, slots=True)
class VqaEvaluation:
    """The questions about some examples, each asked about its own image and about another one."""

    examples: Sequence[Example]
    source: str  # in the prompts of answers
    position: dict[str, int]  # of each example, by sample id
    asked_with: list[int]  # by example: that whose questions are asked about its image, too
    answers: dict[tuple[int, int, bool], str] = field(default_factory=dict)  # by example, question, and whether shuffled

    @classmethod
    def of(cls, checkpoint: Checkpoint, examples: Sequence[Example]) -> "VqaEvaluation | None":
        """Return the questions; None if the captioner learned no answers."""
        prompts = checkpoint.captioner.config.prompts
        if all(style for _, style in prompts):
            return None
        asked_with = [0] * len(examples)
        for index, image in enumerate(derangement([example.sample_id for example in examples])):
            asked_with[image] = index
        position = {example.sample_id: index for index, example in enumerate(examples)}
        return cls(examples, answering_prompt(prompts)[0], position, asked_with)

    def ask(self, checkpoint: Checkpoint, features: FeatureSource, shown: Sequence[Example]) -> None:
        """Ask all that is to be asked about the images of these examples, so that each image is encoded once."""
        keys, pairs = [], []
        for image in shown:
            own = self.position[image.sample_id]
            for index, is_shuffled in ((own, False), (self.asked_with[own], True)):
                for number, question in enumerate(self.examples[index].questions):
                    keys.append((index, number, is_shuffled))
                    pairs.append((image, question.question))
        self.answers.update(zip(keys, answer_questions(checkpoint, features, pairs, self.source), strict=True))

    def scores(self) -> dict[str, dict[str, float]]:
        """Return VQA accuracy by answer type, that with shuffled images, and that of always the most frequent answer."""
        scores = {}
        asked = [(i, n, q) for i, example in enumerate(self.examples) for n, q in enumerate(example.questions)]
        for kind in sorted({question.answer_type for _, _, question in asked}):
            of_kind = [(i, n, question) for i, n, question in asked if question.answer_type == kind]
            counts = Counter(normalize_answer(most_common(question.answers)) for _, _, question in of_kind)
            majority = counts.most_common(1)[0][0]
            scores[kind] = {
                "count": len(of_kind),
                "accuracy": statistics.fmean(vqa_accuracy(self.answers[i, n, False], q) for i, n, q in of_kind),
                "shuffled": statistics.fmean(vqa_accuracy(self.answers[i, n, True], q) for i, n, q in of_kind),
                "majority": statistics.fmean(vqa_accuracy(majority, question) for _, _, question in of_kind),
            }
        return scores

    def rows(self) -> list[list[dict[str, Any]]]:
        """Return the questions of each example with what was said."""
        return [
            [
                {"question": question.question, "type": question.answer_type, "said": self.answers[index, number, False]}
                | {"answers": list(question.answers), "accuracy": vqa_accuracy(self.answers[index, number, False], question)}
                for number, question in enumerate(example.questions)
            ]
            for index, example in enumerate(self.examples)
        ]


def vqa_accuracy(answer: str, truth: Question) -> float:
    """Return VQA accuracy (Antol et al., 2015): min(1, matching annotators / 3), leaving out each annotator in turn.

    All answers are normalised first; the official program compares verbatim if all annotators agree. With fewer than four
    annotators, an answer is right if it equals one of theirs.
    """
    given = normalize_answer(answer)
    truths = [normalize_answer(reference) for reference in truth.answers]
    if len(truths) < 4:
        return float(given in truths)
    return statistics.fmean(
        min(1.0, sum(reference == given for i, reference in enumerate(truths) if i != j) / 3) for j in range(len(truths))
    )
