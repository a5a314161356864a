"""Decoding: greedy takes the likeliest word, beam search finds the likeliest text, sampling keeps to the likely words."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from trainer.model.decoding import DecodingConfig, beam_search, decode, sample_token

EOS, WORDS = 0, 4
PROMPT = torch.zeros(1, 1, dtype=torch.long)


def all_go_on(rows: Tensor) -> None:
    raise AssertionError(f"rows {rows} were to go on alone")


class Chain:
    """A language model whose next word depends on the last one; it counts its calls."""

    def __init__(self, scores: list[list[float]]) -> None:
        self.logs = torch.tensor(scores).log()
        self.calls = 0

    def step(self, new_RT: Tensor) -> Tensor:
        self.calls += 1
        return self.logs[new_RT[:, -1]]

    def mean_log(self, text: list[int]) -> float:
        path = [0, *text, EOS]
        return sum(float(self.logs[a, b]) for a, b in itertools.pairwise(path)) / (len(path) - 1)


# From the start (0) word 1 is likeliest, but it leads nowhere; word 2 leads to a sure end.
TRAP = [[0.01, 0.5, 0.45, 0.04], [0.1, 0.3, 0.3, 0.3], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]]


def test_greedy_takes_the_likeliest_word_and_stops_at_eos() -> None:
    chain = Chain([[0.1, 0.1, 0.8, 0.0], [0.7, 0.1, 0.1, 0.1], [0.1, 0.8, 0.05, 0.05], [0.25] * 4])
    assert decode(chain.step, all_go_on, PROMPT, DecodingConfig(), 9, EOS) == [[2, 1]]
    assert chain.calls == 3


def test_rows_that_have_ended_are_no_longer_computed() -> None:
    """Row n of five ends after n words; the state of each row must follow it."""
    lengths, computed, kept = torch.tensor([4, 0, 2, 1, 3]), [], []

    def step(new_RT: Tensor) -> Tensor:
        nonlocal lengths
        computed.append(len(new_RT))
        words = (lengths > 0).long()  # 0 is EOS
        lengths = lengths - 1
        return torch.nn.functional.one_hot(words, WORDS).float()

    def keep(rows: Tensor) -> None:
        nonlocal lengths
        kept.append(rows.tolist())
        lengths = lengths[rows]

    assert decode(step, keep, PROMPT.expand(5, 1), DecodingConfig(), 9, EOS) == [[1] * 4, [], [1] * 2, [1], [1] * 3]
    assert computed == [5, 5, 3, 2, 1]  # one of five is not worth it
    assert kept == [[0, 2, 4], [0, 2], [0]]


def test_a_text_without_end_is_cut_at_the_longest() -> None:
    chain = Chain([[0.0, 1.0, 0.0, 0.0]] * WORDS)
    assert decode(chain.step, all_go_on, PROMPT, DecodingConfig(), 5, EOS) == [[1] * 5]
    assert beam_search(chain.step, lambda rows: None, all_go_on, PROMPT, DecodingConfig(num_beams=2), 5, EOS) == [[1] * 5]


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_find_the_likeliest_text_where_greedy_walks_into_a_trap(beams: int) -> None:
    chain = Chain(TRAP)
    (greedy,) = decode(chain.step, all_go_on, PROMPT, DecodingConfig(), 4, EOS)
    (best,) = beam_search(chain.step, lambda rows: None, all_go_on, PROMPT, DecodingConfig(num_beams=beams), 4, EOS)
    candidates = [list(text) for n in range(1, 4) for text in itertools.product(range(1, WORDS), repeat=n)]
    assert best == [2] == max(candidates, key=chain.mean_log)
    assert greedy[0] == 1


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beams_of_a_batch_find_what_each_row_finds_alone_and_rows_that_are_over_are_left_out(beams: int) -> None:
    """Each row has a chain of its own, which `keep` must follow, and a state that counts its steps, which `reorder` must."""
    count, words, longest = 12, 14, 9
    torch.manual_seed(beams)
    logs = (3 * torch.randn(count, words, words)).log_softmax(-1)
    logs[:4, :, EOS] += 4  # these end early

    def search(rows: list[int]) -> tuple[list[list[int]], list[int]]:
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
        return beam_search(step, reorder, keep, prompt, DecodingConfig(num_beams=beams), longest, EOS), computed

    together, computed = search(list(range(count)))
    assert together == [search([row])[0][0] for row in range(count)]
    assert computed == sorted(computed, reverse=True) and computed[-1] < computed[0]
    assert len({len(text) for text in together}) > 2


def test_sampling_keeps_to_the_words_that_hold_the_probability() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    counts = torch.bincount(sample_token(scores, DecodingConfig(temperature=1.0, top_p=0.7)), minlength=4) / 4000
    assert counts[2:].tolist() == [0.0, 0.0]
    assert counts[0].item() == pytest.approx(0.5 / 0.8, abs=0.03)


@pytest.mark.parametrize("bad", [{"num_beams": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"num_beams": 2, "temperature": 1.0}])
def test_what_cannot_be_searched_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="cannot decode so"):
        DecodingConfig(**bad)  # type: ignore[arg-type]
    assert math.isfinite(DecodingConfig().top_p)
