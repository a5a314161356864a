"""VQA accuracy of a captioner that has learned answers."""

import statistics
from collections import Counter
from typing import Any

from pipeline.text.vqa_answers import normalize_answer
from trainer.checkpoint import Checkpoint
from trainer.data import Example, Question, most_common
from trainer.features import FeatureSource
from trainer.generate import answer_questions, answering_prompt
from trainer.metrics import derangement


def evaluate_questions(
    checkpoint: Checkpoint, examples: list[Example], states_of: FeatureSource
) -> tuple[dict[str, dict[str, float]], list[list[dict[str, Any]]]] | None:
    """Return VQA accuracy by type of answer, with shuffled images and of always giving the most frequent answer beside it.

    And what was said about each image. None where the captioner has learned no answers.
    """
    if not any(not style for _, style in checkpoint.captioner.config.prompts):
        return None
    source, _ = answering_prompt(checkpoint.captioner.config.prompts)
    asked = [(example, question) for example in examples for question in example.questions]
    other = {example.sample_id: examples[at] for example, at in zip(examples, derangement(len(examples)), strict=True)}
    own = answer_questions(checkpoint, states_of, [(example, q.question) for example, q in asked], source)
    blind = answer_questions(checkpoint, states_of, [(other[example.sample_id], q.question) for example, q in asked], source)
    right = [vqa_accuracy(said, question) for said, (_, question) in zip(own, asked, strict=True)]
    found = {}
    for kind in sorted({question.answer_type for _, question in asked}):
        places = [at for at, (_, question) in enumerate(asked) if question.answer_type == kind]
        truths = [asked[at][1] for at in places]
        most = Counter(normalize_answer(most_common(truth.answers)) for truth in truths).most_common(1)[0][0]
        found[kind] = {
            "count": len(places),
            "accuracy": statistics.fmean(right[at] for at in places),
            "shuffled": statistics.fmean(vqa_accuracy(blind[at], asked[at][1]) for at in places),
            "majority": statistics.fmean(vqa_accuracy(most, truth) for truth in truths),
        }
    said_of: dict[str, list[dict[str, Any]]] = {example.sample_id: [] for example in examples}
    for (example, question), said, accuracy in zip(asked, own, right, strict=True):
        about = {"question": question.question, "type": question.answer_type, "said": said, "answers": list(question.answers)}
        said_of[example.sample_id].append(about | {"accuracy": accuracy})
    return found, [said_of[example.sample_id] for example in examples]


def vqa_accuracy(answer: str, truth: Question) -> float:
    """Return VQA accuracy by the rule of Antol et al. (2015): right when three of the other people say so.

    Each person is left out in turn. All answers are normalised first; the official program compares letter by letter where
    all people said the same. With answers of fewer than four people, right is what equals one of them.
    """
    given = normalize_answer(answer)
    right = [normalize_answer(other) for other in truth.answers]
    if len(right) < 4:
        return float(given in right)
    return statistics.fmean(
        min(1.0, sum(other == given for at, other in enumerate(right) if at != left) / 3) for left in range(len(right))
    )
