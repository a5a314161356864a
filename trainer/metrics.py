"""Caption metrics: BLEU, ROUGE-L and CIDEr-D. For the same tokens, scores equal those of pycocoevalcap.

A corpus is a list of images. Each image has one hypothesis and one or more references, as lists of tokens.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from pipeline.digests import digest
from pipeline.text.normalize import combining_marks

Tokens = Sequence[str]
References = Sequence[Sequence[Tokens]]
NgramCounts = Counter[tuple[str, ...]]
NgramWeights = dict[tuple[str, ...], float]
MAX_N = 4
CIDER_SIGMA = 6.0
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
_APOSTROPHES = str.maketrans("\u2018\u2019\u02bc", "'''")
# Chinese, Japanese, Thai, Lao, Burmese and Khmer: scripts without spaces between words.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"


def tokenize(text: str) -> list[str]:
    """Split a text into lower-case words and numbers without punctuation, as in COCO evaluation.

    As there, "isn't" is split into "is" and "n't", and "man's" into "man" and "'s".
    In scripts without spaces, such as Chinese, each character is a token, as in sacreBLEU (Post, 2018).
    """
    text = text.lower().translate(_APOSTROPHES)
    return _word().findall(_CLITIC.sub(r" \1", text) if "'" in text else text)


@cache
def _word() -> re.Pattern[str]:
    marks = combining_marks()
    letter = rf"(?:(?![_{_UNSPACED}])[\w{marks}])"
    words = rf"(?:n|\B)'(?:t|s|m|d|re|ve|ll)\b|{letter}+(?:['-]{letter}+)*"
    return re.compile(rf"\d+(?:[.,]\d+)+|(?=\w)[{_UNSPACED}][{marks}]*|{words}")


def score_each(
    hypotheses: Sequence[Tokens], references: References, rarity: "Rarity | None" = None
) -> dict[str, list[float]]:
    """Return the ROUGE-L and CIDEr-D scores of each image."""
    rouges = [rouge_l(hypothesis, refs) for hypothesis, refs in zip(hypotheses, references, strict=True)]
    return {"rouge_l": rouges, "cider_d": cider_d(hypotheses, references, rarity)}


def score(
    hypotheses: Sequence[Tokens], references: References, per_image: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Return all corpus scores. `per_image` is the result of `score_each`."""
    scores = {f"bleu_{n}": value for n, value in enumerate(bleu(hypotheses, references), 1)}
    return scores | {name: sum(values) / len(values) for name, values in per_image.items()}


def ngrams(tokens: Tokens, n: int) -> NgramCounts:
    """Count the n-grams in a token sequence."""
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def bleu(hypotheses: Sequence[Tokens], references: References) -> list[float]:
    """Return corpus BLEU-1 to BLEU-4 (Papineni et al., 2002). Brevity is relative to the closest length."""
    # These avoid division by zero, as in pycocoevalcap.
    tiny, small = 1e-15, 1e-9
    matched, possible = [0] * MAX_N, [0] * MAX_N
    length = reference_length = 0
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        length += len(hypothesis)
        reference_length += min((abs(len(r) - len(hypothesis)), len(r)) for r in refs)[1]
        for n in range(1, MAX_N + 1):
            max_counts: NgramCounts = Counter()
            for reference in refs:
                max_counts |= ngrams(reference, n)
            matched[n - 1] += (ngrams(hypothesis, n) & max_counts).total()
            possible[n - 1] += max(0, len(hypothesis) - n + 1)
    ratio = (length + tiny) / (reference_length + small)
    penalty = 1.0 if ratio >= 1 else math.exp(1 - 1 / ratio)
    product, scores = 1.0, []
    for n in range(1, MAX_N + 1):
        product *= (matched[n - 1] + tiny) / (possible[n - 1] + small)
        scores.append(product ** (1 / n) * penalty)
    return scores


def rouge_l(hypothesis: Tokens, references: Sequence[Tokens], beta: float = 1.2) -> float:
    """Return ROUGE-L (Lin, 2004): F-measure of the best LCS precision and recall over all references."""
    common = [_longest_common(hypothesis, reference) for reference in references]
    # pycocoevalcap counts an empty text as one word, so the length is max(1, ...).
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
            length = diagonal + 1 if a_word == b_word else max(row[column], row[column - 1])
            diagonal, row[column] = row[column], length
    return row[-1]


class Rarity:
    """Inverse document frequencies of n-grams. All references of an image form one document."""

    def __init__(self, references: References) -> None:
        self._num_images: NgramCounts = Counter()
        for refs in references:
            grams = (ngrams(ref, n) for ref in refs for n in range(1, MAX_N + 1))
            self._num_images.update(set().union(*grams))
        self._log_images = math.log(max(1, len(references)))

    def weigh(self, tokens: Tokens) -> list[NgramWeights]:
        """Return TF-IDF weights by n-gram, one dict for each n."""

        def weight(gram: tuple[str, ...], count: int) -> float:
            return count * (self._log_images - math.log(max(1, self._num_images[gram])))

        counts = [ngrams(tokens, n) for n in range(1, MAX_N + 1)]
        return [{gram: weight(gram, count) for gram, count in of_n.items()} for of_n in counts]


def cider_d(
    hypotheses: Sequence[Tokens], references: References, rarity: Rarity | None = None
) -> list[float]:
    """Return CIDEr-D (Vedantam et al., 2015) of each image, multiplied by 10 as in COCO evaluation.

    By default, n-grams are weighted by their rarity among these images, so scores on different test sets are
    not comparable. The score is 0 for an image without references.
    """
    weigh = (rarity or Rarity(references)).weigh
    scores = []
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        hypothesis_weights = weigh(hypothesis)
        total = 0.0
        for reference in refs:
            pairs = zip(hypothesis_weights, weigh(reference), strict=True)
            similarity = sum(_clipped_cosine(a, b) for a, b in pairs) / MAX_N
            # pycocoevalcap defines length as the number of bigrams.
            gap = max(0, len(hypothesis) - 1) - max(0, len(reference) - 1)
            total += similarity * math.exp(-(gap**2) / (2 * CIDER_SIGMA**2))
        scores.append(10 * total / max(1, len(refs)))
    return scores


def _clipped_cosine(hypothesis: NgramWeights, reference: NgramWeights) -> float:
    shared = [gram for gram in hypothesis if gram in reference]
    dot = sum(min(hypothesis[gram], reference[gram]) * reference[gram] for gram in shared)
    norms = [math.sqrt(sum(w * w for w in weights.values())) for weights in (hypothesis, reference)]
    norm = norms[0] * norms[1]
    return dot / norm if norm else 0.0


def bootstrap(per_image: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Return 95 % bootstrap intervals of mean scores. Images are resampled with a fixed seed."""
    scores = [np.array(values) for values in per_image.values()]
    num_images, random = len(scores[0]), np.random.default_rng(0)
    # Use one sample at a time, because all samples take 8 GB for a million images.
    drawn = (random.integers(num_images, size=num_images) for _ in range(1000))
    means = [[values[indices].mean() for values in scores] for indices in drawn]
    lows, highs = np.quantile(means, (0.025, 0.975), axis=0).tolist()
    return dict(zip(per_image, zip(lows, highs, strict=True), strict=True))


def derangement(names: Sequence[str]) -> list[int]:
    """Return, for each name, the index of another name. The pairs do not depend on the order of `names`."""
    order = sorted(range(len(names)), key=lambda index: (digest(names[index]), index))
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [following[index] for index in range(len(names))]
