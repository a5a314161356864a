"""Scores of captions against references: BLEU, ROUGE-L and CIDEr-D, equal to pycocoevalcap's on the same tokens.

A corpus is a list of images; each has one hypothesis and one or more references, all of them lists of tokens.
"""

import importlib.util
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence

Tokens = Sequence[str]
RequestStats = Counter[tuple[str, ...]]
MAX_N = 4
_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+(?:['\u2019-][^\W_]+)*")


def tokenize(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation is dropped, as it is before captions are scored on COCO."""
    return _WORD.findall(text.lower())


def score_each(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, list[float]]:
    """Return ROUGE-L and CIDEr-D of each image."""
    rouges = [rouge_l(hypothesis, mine) for hypothesis, mine in zip(hypotheses, references, strict=True)]
    return {"rouge_l": rouges, "cider_d": cider_d(hypotheses, references)}


def score(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], each: Mapping[str, Sequence[float]] | None = None
) -> dict[str, float]:
    """Return all scores of a corpus; `each` is what `score_each` returns, where that is known already.

    Raises:
        ValueError: the two lengths differ, there is no image, or an image has no reference.
    """
    if len(hypotheses) != len(references) or not hypotheses or not all(references):
        raise ValueError("a corpus needs one hypothesis and at least one reference for each of at least one image")
    scores = {f"bleu_{n}": value for n, value in enumerate(bleu(hypotheses, references), 1)}
    each = each or score_each(hypotheses, references)
    return scores | {name: sum(values) / len(values) for name, values in each.items()}


def ngrams(tokens: Tokens, n: int) -> RequestStats:
    """Count the n-grams of a text."""
    return Counter(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))


def bleu(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 (Papineni et al., 2002), with the closest reference length, as COCO counts them."""
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's guards against division by zero, kept to be equal
    matched, possible = [0] * MAX_N, [0] * MAX_N
    length = reference_length = 0
    for hypothesis, mine in zip(hypotheses, references, strict=True):
        length += len(hypothesis)
        reference_length += min((abs(len(r) - len(hypothesis)), len(r)) for r in mine)[1]
        for n in range(1, MAX_N + 1):
            best: RequestStats = Counter()
            for reference in mine:
                best |= ngrams(reference, n)
            matched[n - 1] += (ngrams(hypothesis, n) & best).total()
            possible[n - 1] += max(0, len(hypothesis) - n + 1)
    ratio = (length + tiny) / (reference_length + small)
    penalty = 1.0 if ratio >= 1 else math.exp(1 - 1 / ratio)
    product, scores = 1.0, []
    for n in range(1, MAX_N + 1):
        product *= (matched[n - 1] + tiny) / (possible[n - 1] + small)
        scores.append(product ** (1 / n) * penalty)
    return scores


def rouge_l(hypothesis: Tokens, references: Sequence[Tokens], beta: float = 1.2) -> float:
    """F-measure of the longest common subsequence (Lin, 2004): best precision and best recall over the references."""
    common = [_longest_common(hypothesis, reference) for reference in references]
    # An empty text is one empty word to pycocoevalcap, whence the guard.
    precision = max(c / max(1, len(hypothesis)) for c in common)
    recall = max(c / max(1, len(r)) for c, r in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common(a: Tokens, b: Tokens) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for at, other in enumerate(b, 1):
            diagonal, row[at] = row[at], diagonal + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]


def cider_d(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of each image (Vedantam et al., 2015), times 10, as COCO gives it.

    The weight of an n-gram falls with the number of images whose references hold it, so scores of different test sets
    do not compare. Repetition is clipped, and a difference in length costs by a Gaussian of width `sigma`.
    """
    documents: RequestStats = Counter()
    for mine in references:
        documents.update({gram for reference in mine for n in range(1, MAX_N + 1) for gram in ngrams(reference, n)})
    log_images = math.log(len(references))

    def weigh(tokens: Tokens) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: count * (log_images - math.log(max(1, documents[gram]))) for gram, count in ngrams(tokens, n).items()}
            for n in range(1, MAX_N + 1)
        ]

    scores = []
    for hypothesis, mine in zip(hypotheses, references, strict=True):
        ours = weigh(hypothesis)
        total = 0.0
        for reference in mine:
            theirs = weigh(reference)
            # pycocoevalcap measures length in bigrams.
            gap = max(0, len(hypothesis) - 1) - max(0, len(reference) - 1)
            similar = sum(_clipped_cosine(a, b) for a, b in zip(ours, theirs, strict=True)) / MAX_N
            total += similar * math.exp(-(gap**2) / (2 * sigma**2))
        scores.append(10 * total / len(mine))
    return scores


def _clipped_cosine(ours: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    dot = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
    norm = math.sqrt(sum(w * w for w in ours.values())) * math.sqrt(sum(w * w for w in theirs.values()))
    return dot / norm if norm else 0.0


def meteor(corpora: Sequence[Sequence[Tokens]], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Return METEOR (Denkowski and Lavie, 2014) of several sets of hypotheses for the same images.

    By the program that pycocoevalcap brings, which takes some seconds to start; nothing without Java or that package.
    """
    if shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None:
        return []
    from pycocoevalcap.meteor.meteor import Meteor

    theirs = {at: [" ".join(reference) for reference in mine] for at, mine in enumerate(references)}
    program = Meteor()
    return [
        float(program.compute_score(theirs, {at: [" ".join(text)] for at, text in enumerate(hypotheses)})[0])
        for hypotheses in corpora
    ]


def bootstrap(each: Mapping[str, Sequence[float]], draws: int = 1000) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of the means of `score_each`: percentiles over corpora drawn from the images with replacement.

    The weights of CIDEr-D stay those of the whole corpus, as is usual; draws are always the same.
    """
    rng, images = random.Random(0), len(next(iter(each.values())))
    means: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(draws):
        drawn = rng.choices(range(images), k=images)
        for name, values in each.items():
            means[name].append(sum(values[at] for at in drawn) / len(drawn))
    return {name: (sorted(found)[int(0.025 * draws)], sorted(found)[int(0.975 * draws)]) for name, found in means.items()}


def derangement(count: int) -> list[int]:
    """Return an order, always the same, in which nothing is at its own place (for `count` above 1)."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    return [after[place] for place in range(count)]
