"""Metrics: equal to pycocoevalcap on the same tokens."""

import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from trainer.metrics import cider_d, score, score_each, tokenize

Corpus = tuple[list[list[str]], list[list[list[str]]]]


def random_corpus(seed: int, images: int = 60) -> Corpus:
    """Return hypotheses, one of them empty, with one to five references each."""
    rng = random.Random(seed)

    def text() -> list[str]:
        words = ["a", "red", "blue", "circle", "square", "on", "the", "left", "of", "and"]
        return rng.choices(words, k=rng.randint(1, 14))

    references = [[text() for _ in range(rng.randint(1, 5))] for _ in range(images)]
    hypotheses = [list(texts[0]) if rng.random() < 0.3 else text() for texts in references]
    hypotheses[seed % images] = []
    return hypotheses, references


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_those_of_pycocoevalcap(seed: int) -> None:
    hypotheses, references = random_corpus(seed)
    references_by_image = {n: [" ".join(r) for r in texts] for n, texts in enumerate(references)}
    hypotheses_by_image = {n: [" ".join(h)] for n, h in enumerate(hypotheses)}
    scores = score(hypotheses, references, score_each(hypotheses, references))
    bleus, _ = Bleu(4).compute_score(references_by_image, hypotheses_by_image, verbose=0)
    assert [scores[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(bleus, abs=1e-12)
    rouge, _ = Rouge().compute_score(references_by_image, hypotheses_by_image)
    assert scores["rouge_l"] == pytest.approx(rouge, abs=1e-12)
    cider, cider_by_image = Cider().compute_score(references_by_image, hypotheses_by_image)
    assert scores["cider_d"] == pytest.approx(cider, abs=1e-12)
    assert cider_d(hypotheses, references) == pytest.approx(list(cider_by_image), abs=1e-12)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("लड़की सड़क पर खेल रही है।", ["लड़की", "सड़क", "पर", "खेल", "रही", "है"]),
        ("一只狗在草地上。", ["一", "只", "狗", "在", "草", "地", "上"]),
        ("รถสี", ["ร", "ถ", "สี"]),
        ("كَلْبٌ يَجْرِي", ["كَلْبٌ", "يَجْرِي"]),
        ("Two 狗 run 3.5 m_x", ["two", "狗", "run", "3.5", "m", "x"]),
        ("A man's T-shirt, 3.5 m (red)!", ["a", "man", "'s", "t-shirt", "3.5", "m", "red"]),
        ("A man\u2019s, man\u2018s or man\u02bcs dog", ["a", *["man", "'s"] * 2, "or", "man", "'s", "dog"]),
        ("She isn't ready, they're here", ["she", "is", "n't", "ready", "they", "'re", "here"]),
        ("a man 's dog is n't", ["a", "man", "'s", "dog", "is", "n't"]),
        ("dogs' rock'n'roll o'clock 't 5's", ["dogs", "rock'n'roll", "o'clock", "'t", "5", "'s"]),
    ],
)
def test_text_is_split_into_words_or_characters(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens
