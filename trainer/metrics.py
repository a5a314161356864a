"""Scores of captions against references: BLEU, ROUGE-L and CIDEr-D, equal to pycocoevalcap's on the same tokens.

A corpus is a list of images; each has one hypothesis and one or more references, all of them lists of tokens.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from pipeline.digests import digest
from pipeline.text.normalize import combining_marks, has_marks

Tokens = Sequence[str]
NgramCounts = Counter[tuple[str, ...]]
MAX_N = 4
_APOSTROPHES = str.maketrans("\u2018\u2019\u02bc", "'''")  # models and people write dog's in several ways
_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+(?:['-][^\W_]+)*")
# Chinese, Japanese, Thai, Lao, Burmese and Khmer: scripts without spaces between words.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")


def tokenize(text: str) -> list[str]:
    """Return lower-case words and numbers without punctuation, as captions are scored on COCO.

    Of scripts without spaces between words each character is a token, as sacreBLEU (Post, 2018) cuts Chinese; marks such as
    vowel signs belong to their letter.
    """
    lower = text.lower().translate(_APOSTROPHES)  # which may make marks
    is_plain = lower.isascii() or not (has_marks(lower) or _HAS_UNSPACED.search(lower))
    return (_WORD if is_plain else _any_word()).findall(lower)


@cache
def _any_word() -> re.Pattern[str]:
    marks = combining_marks()
    letter = rf"(?:(?![_{_UNSPACED}])[\w{marks}])"
    return re.compile(rf"\d+(?:[.,]\d+)+|(?=\w)[{_UNSPACED}][{marks}]*|{letter}+(?:['-]{letter}+)*")


def score_each(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, list[float]]:
    """Return ROUGE-L and CIDEr-D of each image."""
    rouges = [rouge_l(hypothesis, refs) for hypothesis, refs in zip(hypotheses, references, strict=True)]
    return {"rouge_l": rouges, "cider_d": cider_d(hypotheses, references)}


def score(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], per_image: Mapping[str, Sequence[float]] | None = None
) -> dict[str, float]:
    """Return all scores of a corpus; `per_image` is the result of `score_each`, if already computed.

    Raises ValueError if the two lengths differ, there is no image, or an image has no reference.
    """
    if len(hypotheses) != len(references) or not hypotheses or not all(references):
        raise ValueError("a corpus needs one hypothesis and at least one reference for each of at least one image")
    scores = {f"bleu_{n}": value for n, value in enumerate(bleu(hypotheses, references), 1)}
    per_image = per_image or score_each(hypotheses, references)
    return scores | {name: sum(values) / len(values) for name, values in per_image.items()}


def ngrams(tokens: Tokens, n: int) -> NgramCounts:
    """Count the n-grams of a text."""
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def bleu(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Return corpus BLEU-1 to BLEU-4 (Papineni et al., 2002), with the closest reference length, as COCO does."""
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's guards against division by zero, kept for equal scores
    matched, possible = [0] * MAX_N, [0] * MAX_N
    length = reference_length = 0
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        length += len(hypothesis)
        reference_length += min((abs(len(r) - len(hypothesis)), len(r)) for r in refs)[1]
        for n in range(1, MAX_N + 1):
            best: NgramCounts = Counter()
            for reference in refs:
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
    """Return ROUGE-L (Lin, 2004): F-measure of the longest common subsequence, with best precision and recall of references."""
    common = [_longest_common(hypothesis, reference) for reference in references]
    # pycocoevalcap treats an empty text as one empty word, hence the guard.
    precision = max(c / max(1, len(hypothesis)) for c in common)
    recall = max(c / max(1, len(r)) for c, r in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common(a: Tokens, b: Tokens) -> int:
    row = [0] * (len(b) + 1)
    for a_word in a:
        diagonal = 0
        for column, b_word in enumerate(b, 1):
            diagonal, row[column] = row[column], diagonal + 1 if a_word == b_word else max(row[column], row[column - 1])
    return row[-1]


class Rarity:
    """How rare each n-gram is among the images of a corpus: CIDEr-D weighs it by the logarithm."""

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        self._images: NgramCounts = Counter()
        for refs in references:
            self._images.update({gram for reference in refs for n in range(1, MAX_N + 1) for gram in ngrams(reference, n)})
        self._log_images = math.log(max(1, len(references)))

    def weigh(self, tokens: Tokens) -> list[dict[tuple[str, ...], float]]:
        """Return the weights of the n-grams of a text, for each n."""
        return [
            {
                gram: count * (self._log_images - math.log(max(1, self._images[gram])))
                for gram, count in ngrams(tokens, n).items()
            }
            for n in range(1, MAX_N + 1)
        ]


def cider_d(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], sigma: float = 6.0, rarity: Rarity | None = None
) -> list[float]:
    """Return CIDEr-D of each image (Vedantam et al., 2015), times 10, as COCO reports it; 0 for one without references.

    The weight of an n-gram falls with the number of images whose references contain it, so scores on different test sets
    are not comparable; `rarity` is that of another corpus. Repetition is clipped; a difference in length is penalized by a
    Gaussian of width `sigma`.
    """
    weigh = (rarity or Rarity(references)).weigh
    scores = []
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        hypothesis_weights = weigh(hypothesis)
        total = 0.0
        for reference in refs:
            reference_weights = weigh(reference)
            # pycocoevalcap measures length in bigrams.
            gap = max(0, len(hypothesis) - 1) - max(0, len(reference) - 1)
            similar = sum(_clipped_cosine(a, b) for a, b in zip(hypothesis_weights, reference_weights, strict=True)) / MAX_N
            total += similar * math.exp(-(gap**2) / (2 * sigma**2))
        scores.append(10 * total / max(1, len(refs)))
    return scores


def _clipped_cosine(hypothesis: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    dot = sum(min(weight, reference[gram]) * reference[gram] for gram, weight in hypothesis.items() if gram in reference)
    norm = math.sqrt(sum(w * w for w in hypothesis.values())) * math.sqrt(sum(w * w for w in reference.values()))
    return dot / norm if norm else 0.0


def bootstrap(per_image: Mapping[str, Sequence[float]], draws: int = 1000) -> dict[str, tuple[float, float]]:
    """Return 95 % bootstrap intervals of the mean scores of `score_each`; images are drawn with replacement.

    CIDEr-D weights stay those of the whole corpus, as is usual; the seed is fixed.
    """
    rng, images = random.Random(0), len(next(iter(per_image.values())))
    means: dict[str, list[float]] = {name: [] for name in per_image}
    for _ in range(draws):
        drawn = rng.choices(range(images), k=images)
        for name, values in per_image.items():
            means[name].append(sum(values[index] for index in drawn) / len(drawn))
    return {name: (sorted(scores)[int(0.025 * draws)], sorted(scores)[int(0.975 * draws)]) for name, scores in means.items()}


def derangement(names: Sequence[str]) -> list[int]:
    """Return the position of another name for each of several distinct ones: the same one in whatever order they come."""
    order = sorted(range(len(names)), key=lambda index: (digest(names[index]), index))
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    return [after[index] for index in range(len(names))]
