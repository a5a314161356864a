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
    checkpoint: Checkpoint, examples: list[Example], features: FeatureSource
) -> tuple[dict[str, dict[str, float]], list[list[dict[str, Any]]]] | None:
    """Return VQA accuracy by answer type, and the answers for each image; None if the captioner learned no answers.

    Baselines: accuracy with shuffled images, and of always giving the most frequent answer.
    """
    if not any(not style for _, style in checkpoint.captioner.config.prompts):
        return None
    source, _ = answering_prompt(checkpoint.captioner.config.prompts)
    pairs = [(example, question) for example in examples for question in example.questions]
    partner = {example.sample_id: examples[i] for example, i in zip(examples, derangement(len(examples)), strict=True)}
    answers = answer_questions(checkpoint, features, [(example, q.question) for example, q in pairs], source)
    shuffled_pairs = [(partner[example.sample_id], question.question) for example, question in pairs]
    shuffled_answers = answer_questions(checkpoint, features, shuffled_pairs, source)
    accuracies = [vqa_accuracy(answer, question) for answer, (_, question) in zip(answers, pairs, strict=True)]
    scores = {}
    for kind in sorted({question.answer_type for _, question in pairs}):
        indices = [i for i, (_, question) in enumerate(pairs) if question.answer_type == kind]
        truths = [pairs[i][1] for i in indices]
        majority = Counter(normalize_answer(most_common(truth.answers)) for truth in truths).most_common(1)[0][0]
        scores[kind] = {
            "count": len(indices),
            "accuracy": statistics.fmean(accuracies[i] for i in indices),
            "shuffled": statistics.fmean(vqa_accuracy(shuffled_answers[i], pairs[i][1]) for i in indices),
            "majority": statistics.fmean(vqa_accuracy(majority, truth) for truth in truths),
        }
    rows_of: dict[str, list[dict[str, Any]]] = {example.sample_id: [] for example in examples}
    for (example, question), answer, accuracy in zip(pairs, answers, accuracies, strict=True):
        row = {"question": question.question, "type": question.answer_type, "said": answer, "answers": list(question.answers)}
        rows_of[example.sample_id].append(row | {"accuracy": accuracy})
    return scores, [rows_of[example.sample_id] for example in examples]


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
