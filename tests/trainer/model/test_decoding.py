"""Decoding: greedy, beam search and sampling on small Markov chains."""

import itertools

import pytest
import torch
from torch import Tensor

from trainer.model.decoding import DecodingConfig, beam_search, decode, sample_token

EOS, WORDS = 0, 4
PROMPT = torch.zeros(1, 1, dtype=torch.long)


def all_go_on(rows: Tensor) -> None:
    raise AssertionError(f"rows {rows} were to go on alone")


class Chain:
    """A language model whose next token depends only on the last one."""

    def __init__(self, scores: list[list[float]]) -> None:
        self.logs = torch.tensor(scores).log()
        self.calls = 0

    def step(self, new_RT: Tensor) -> Tensor:
        self.calls += 1
        return self.logs[new_RT[:, -1]]

    def mean_log(self, text: list[int]) -> float:
        path = [0, *text, EOS]
        return sum(float(self.logs[a, b]) for a, b in itertools.pairwise(path)) / (len(path) - 1)


def search(chain: Chain, beams: int, max_tokens: int) -> list[list[int]]:
    decoding = DecodingConfig(num_beams=beams)
    return beam_search(chain.step, lambda rows: None, all_go_on, PROMPT, decoding, max_tokens, EOS)


# From the start (0) word 1 is likeliest, but it leads nowhere; word 2 leads to a sure end.
TRAP = [[0.01, 0.5, 0.45, 0.04], [0.1, 0.3, 0.3, 0.3], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]]


def test_greedy_takes_the_likeliest_token_until_eos() -> None:
    chain = Chain([[0.1, 0.1, 0.8, 0.0], [0.7, 0.1, 0.1, 0.1], [0.1, 0.8, 0.05, 0.05], [0.25] * 4])
    assert decode(chain.step, all_go_on, PROMPT, DecodingConfig(), 9, EOS) == [[2, 1]]
    assert chain.calls == 3


def test_ended_rows_are_removed() -> None:
    """Rows end after different lengths, and `keep` must receive the remaining rows."""
    lengths, computed, kept = torch.tensor([4, 0, 2, 1, 3]), [], []

    def step(new_RT: Tensor) -> Tensor:
        nonlocal lengths
        computed.append(len(new_RT))
        words = (lengths > 0).long()
        lengths = lengths - 1
        return torch.nn.functional.one_hot(words, WORDS).float()

    def keep(rows: Tensor) -> None:
        nonlocal lengths
        kept.append(rows.tolist())
        lengths = lengths[rows]

    texts = decode(step, keep, PROMPT.expand(5, 1), DecodingConfig(), 9, EOS)
    assert texts == [[1] * 4, [], [1] * 2, [1], [1] * 3]
    # One ended row of five is less than MIN_ENDED_SHARE.
    assert computed == [5, 5, 3, 2, 1]
    assert kept == [[0, 2, 4], [0, 2], [0]]


def test_text_without_eos_has_the_maximum_length() -> None:
    chain = Chain([[0.0, 1.0, 0.0, 0.0]] * WORDS)
    assert decode(chain.step, all_go_on, PROMPT, DecodingConfig(), 5, EOS) == [[1] * 5]
    assert search(chain, 2, 5) == [[1] * 5]


@pytest.mark.parametrize("beams", [2, 3])
def test_beam_search_finds_the_likeliest_text_that_greedy_misses(beams: int) -> None:
    chain = Chain(TRAP)
    (greedy,) = decode(chain.step, all_go_on, PROMPT, DecodingConfig(), 4, EOS)
    (best,) = search(chain, beams, 4)
    candidates = [list(text) for n in range(1, 4) for text in itertools.product(range(1, WORDS), repeat=n)]
    assert best == [2] == max(candidates, key=chain.mean_log)
    assert greedy[0] == 1


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_batched_beam_search_equals_beam_search_of_single_rows(beams: int) -> None:
    """Each row has its own chain, which must follow `keep`, and a step count, which must follow `reorder`."""
    count, words, longest = 12, 14, 9
    torch.manual_seed(beams)
    logs = (3 * torch.randn(count, words, words)).log_softmax(-1)
    # These chains end early.
    logs[:4, :, EOS] += 4

    def search_rows(rows: list[int]) -> tuple[list[list[int]], list[int]]:
        chains, steps, computed = logs[rows], torch.zeros(len(rows) * beams, dtype=torch.long), []

        def step(new_RT: Tensor) -> Tensor:
            computed.append(len(new_RT))
            assert steps.tolist() == [len(computed) - 1] * len(new_RT)
            steps.add_(1)
            return chains[torch.arange(len(new_RT)) // beams, new_RT[:, -1]]

        def reorder(origins: Tensor) -> None:
            nonlocal steps
            assert (origins // beams).unique_consecutive().tolist() == (origins[::beams] // beams).tolist()
            steps = steps[origins]

        def keep(groups: Tensor) -> None:
            nonlocal chains
            assert len(groups) * beams == len(steps)
            chains = chains[groups]

        prompt = torch.zeros(len(rows), 1, dtype=torch.long)
        decoding = DecodingConfig(num_beams=beams)
        return beam_search(step, reorder, keep, prompt, decoding, longest, EOS), computed

    together, computed = search_rows(list(range(count)))
    assert together == [search_rows([row])[0][0] for row in range(count)]
    assert computed == sorted(computed, reverse=True) and computed[-1] < computed[0]
    assert len({len(text) for text in together}) > 2


def test_length_penalty_prefers_longer_texts_in_beam_search() -> None:
    """The short text has the higher mean log-probability, the long text the higher sum."""
    chain = Chain([[0.0, 0.9, 0.1, 0.0], [0.5, 0.0, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0], [0.9, 0.0, 0.0, 0.1]])
    found = {}
    for penalty in (0.0, 3.0):
        decoding = DecodingConfig(num_beams=3, length_penalty=penalty)
        (found[penalty],) = beam_search(chain.step, lambda _: None, all_go_on, PROMPT, decoding, 6, EOS)
    assert found[0.0] in ([1], [1, 3]) and len(found[3.0]) > len(found[0.0])


@pytest.mark.parametrize("beams", [1, 3])
def test_text_has_the_minimum_length_and_repeats_no_ngram(beams: int) -> None:
    chain = Chain([[0.6, 0.4, 0.0, 0.0], [0.6, 0.01, 0.38, 0.01], [0.6, 0.3, 0.05, 0.05], [0.25] * WORDS])
    limits: list[dict[str, int]] = [{"min_new_tokens": 5}, {"min_new_tokens": 6, "no_repeat_ngram_size": 2}]
    for options in limits:
        decoding = DecodingConfig(num_beams=beams, **options)
        if beams == 1:
            (text,) = decode(chain.step, all_go_on, PROMPT, decoding, 9, EOS)
        else:
            (text,) = beam_search(chain.step, lambda _: None, all_go_on, PROMPT, decoding, 9, EOS)
        assert len(text) >= options["min_new_tokens"] and EOS not in text
        pairs = list(itertools.pairwise(text))
        assert (len(set(pairs)) == len(pairs)) == ("no_repeat_ngram_size" in options)


def test_top_p_sampling_leaves_out_unlikely_tokens() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    tokens = sample_token(scores, DecodingConfig(temperature=1.0, top_p=0.7))
    counts = torch.bincount(tokens, minlength=4) / 4000
    assert counts[2:].tolist() == [0.0, 0.0]
    assert counts[0].item() == pytest.approx(0.5 / 0.8, abs=0.03)
