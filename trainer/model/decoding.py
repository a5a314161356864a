"""Decode texts token by token: greedy, sampling, or beam search."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodingConfig:
    """One beam at temperature 0 is greedy. `top_p` limits sampling to the likeliest tokens with this total probability."""

    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if (
            self.num_beams < 1
            or self.temperature < 0
            or not 0 < self.top_p <= 1
            or (self.num_beams > 1 and self.temperature > 0)
        ):
            raise ValueError(f"cannot decode so: {self}")


GREEDY = DecodingConfig()
LEFT_OUT = 0.25  # of the rows have ended when they are no longer computed
Step = Callable[[Tensor], Tensor]  # new tokens (R, T) -> logits of the next token (R, V)
Reorder = Callable[[Tensor], None]  # for each row, the index of the row that it continues: (R,)
Keep = Callable[[Tensor], None]  # the indices of the rows, or groups of beams, that go on


def decode(
    step: Step, keep: Keep, prompt_BT: Tensor, decoding: DecodingConfig, max_tokens: int, eos_id: int
) -> list[list[int]]:
    """Decode greedily or by sampling; return ids without EOS. Rows that have ended are left out, a few at a time."""
    written: list[list[int]] = [[] for _ in prompt_BT]
    rows, new_RT = list(range(len(written))), prompt_BT  # the row of the prompt that each computed row goes on with
    ended = [False] * len(rows)
    for _ in range(max_tokens):
        next_R = sample_token(step(new_RT), decoding)
        for index, token in enumerate(next_R.tolist()):
            ended[index] |= token == eos_id
            if not ended[index]:
                written[rows[index]].append(token)
        if all(ended):
            break
        new_RT = next_R[:, None]
        if sum(ended) >= LEFT_OUT * len(ended):
            going_on = [index for index, is_over in enumerate(ended) if not is_over]
            rows, ended = [rows[index] for index in going_on], [False] * len(going_on)
            going_on_R = torch.tensor(going_on, device=new_RT.device)
            keep(going_on_R)
            new_RT = new_RT[going_on_R]
    return written


def sample_token(scores_BV: Tensor, decoding: DecodingConfig) -> Tensor:
    """Return one token per row: the likeliest, or a top-p sample (Holtzman et al., 2020)."""
    if decoding.temperature == 0:
        return scores_BV.argmax(-1)
    sorted_BV, order_BV = (scores_BV.float() / decoding.temperature).softmax(-1).sort(descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV  # probability of all likelier tokens
    drawn_B1 = sorted_BV.masked_fill(before_BV >= decoding.top_p, 0.0).multinomial(1)
    return order_BV.gather(1, drawn_B1)[:, 0]


@dataclass(frozen=True, slots=True)
class _Finished:
    """What ended at one step of a beam search, for B rows of the prompt with K candidates each."""

    rows: list[int]  # of the prompt: (B,)
    mean_BK: Tensor  # log-probability of each text, per token; of a candidate that did not end, -inf
    texts_BKL: Tensor  # of ids; EOS is the last one of those that ended so


def beam_search(
    step: Step, reorder: Reorder, keep: Keep, prompt_BT: Tensor, decoding: DecodingConfig, max_tokens: int, eos_id: int
) -> list[list[int]]:
    """Keep the `beams` likeliest prefixes of each row; return the finished text with the best mean log-probability.

    `step` gets rows in groups of `beams`; `reorder` is called with their origins before each step but the first, and after it
    `keep` with the groups that go on, where some do not. Besides what `step` does, the device is waited for once a step.
    """
    K, device = decoding.num_beams, prompt_BT.device
    rows = list(range(len(prompt_BT)))  # of the prompt, that are still searched
    total_BK = torch.full((len(rows), K), -torch.inf, device=device)
    total_BK[:, 0] = 0.0  # all beams are the same at first: only one of them counts
    best_B = torch.full((len(rows),), -torch.inf, device=device)
    written_BKL = prompt_BT.new_empty(len(rows), K, 0)
    new_RT, steps = prompt_BT.repeat_interleave(K, 0), list[_Finished]()
    for length in range(1, max_tokens + 1):
        scores_RV = step(new_RT).float().log_softmax(-1)
        B, V = len(rows), scores_RV.shape[-1]
        # Twice the number of beams: each beam has at most one EOS, so that at least K candidates go on.
        value_BE, index_BE = (total_BK[:, :, None] + scores_RV.view(B, K, V)).flatten(1).topk(2 * K)
        beam_BE, token_BE = index_BE // V, index_BE % V
        is_end_BE = token_BE == eos_id
        # An end that is none of the likeliest candidates ends nothing, as in transformers and fairseq.
        ends_BK = is_end_BE[:, :K] if length < max_tokens else torch.ones_like(is_end_BE[:, :K])
        mean_BK = (value_BE[:, :K] / length).masked_fill(~ends_BK, -torch.inf)
        texts_BEL = torch.cat([_of_beams(written_BKL, beam_BE), token_BE[:, :, None]], 2)
        steps.append(_Finished(rows, mean_BK, texts_BEL[:, :K]))
        best_B = torch.maximum(best_B, mean_BK.amax(1))
        onward_BK = is_end_BE.to(torch.uint8).argsort(dim=1, stable=True)[:, :K]
        total_BK, origin_BK = value_BE.gather(1, onward_BK), beam_BE.gather(1, onward_BK)
        written_BKL = _of_beams(texts_BEL, onward_BK)
        # The final mean of an unfinished text is at most its sum so far divided by the maximum length.
        is_over = (total_BK.amax(1) / max_tokens <= best_B).tolist()
        if all(is_over) or length == max_tokens:
            break
        first_R = torch.arange(B, device=device)[:, None] * K
        if sum(is_over) >= LEFT_OUT * B:
            going_on = torch.tensor([index for index, over in enumerate(is_over) if not over], device=device)
            rows = [row for row, over in zip(rows, is_over, strict=True) if not over]
            total_BK, origin_BK, best_B = total_BK[going_on], origin_BK[going_on], best_B[going_on]
            written_BKL = written_BKL[going_on]
            reorder((origin_BK + first_R[going_on]).flatten())
            keep(going_on)
        else:
            reorder((origin_BK + first_R).flatten())
        new_RT = written_BKL[:, :, -1].reshape(-1, 1)
    return _best_texts(steps, len(prompt_BT), eos_id)


def _of_beams(texts_BKL: Tensor, beams_BE: Tensor) -> Tensor:
    """Return the texts of these beams: (B, E, L)."""
    return texts_BKL.gather(1, beams_BE[:, :, None].expand(-1, -1, texts_BKL.shape[2]))


def _best_texts(steps: list[_Finished], count: int, eos_id: int) -> list[list[int]]:
    """Return the best finished text of each row of a prompt, without EOS; of equal ones, the shortest."""
    best: list[tuple[float, list[int]]] = [(-math.inf, [])] * count
    for one in steps:
        for row, means_K, texts_KL in zip(one.rows, one.mean_BK.tolist(), one.texts_BKL.tolist(), strict=True):
            best[row] = max(best[row], *zip(means_K, texts_KL, strict=True), key=lambda scored: scored[0])
    return [text[:-1] if text and text[-1] == eos_id else text for _, text in best]
