"""Decode texts token by token: greedy, sampling, or beam search."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodingConfig:
    """One beam at temperature 0 is greedy. `top_p` limits sampling to the likeliest tokens with this total probability."""

    beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.beams < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or (self.beams > 1 and self.temperature > 0):
            raise ValueError(f"cannot search so: {self}")


GREEDY = DecodingConfig()
LEFT_OUT = 0.25  # of the rows have ended when they are no longer computed
Step = Callable[[Tensor], Tensor]  # new tokens (R, T) -> logits of the next token (R, V)
Reorder = Callable[[Tensor], None]  # for each row, the index of the row that it continues: (R,)
Keep = Callable[[Tensor], None]  # the indices of the rows that go on


def write(step: Step, keep: Keep, prompt_BT: Tensor, search: DecodingConfig, max_tokens: int, eos_id: int) -> list[list[int]]:
    """Decode greedily or by sampling; return ids without EOS. Rows that have ended are left out, a few at a time."""
    written: list[list[int]] = [[] for _ in prompt_BT]
    rows, new_RT = list(range(len(written))), prompt_BT  # the row of the prompt that each computed row goes on with
    ended = [False] * len(rows)
    for _ in range(max_tokens):
        next_R = choose(step(new_RT), search)
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


def choose(scores_BV: Tensor, search: DecodingConfig) -> Tensor:
    """Return one token per row: the likeliest, or a top-p sample (Holtzman et al., 2020)."""
    if search.temperature == 0:
        return scores_BV.argmax(-1)
    sorted_BV, order_BV = (scores_BV.float() / search.temperature).softmax(-1).sort(descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV  # probability of all likelier tokens
    drawn_B1 = sorted_BV.masked_fill(before_BV >= search.top_p, 0.0).multinomial(1)
    return order_BV.gather(1, drawn_B1)[:, 0]


def beam_search(
    step: Step, reorder: Reorder, prompt_BT: Tensor, search: DecodingConfig, max_tokens: int, eos_id: int
) -> list[list[int]]:
    """Keep the `beams` likeliest prefixes of each row; return the finished text with the best mean log-probability."""
    finished = beam_texts(step, reorder, prompt_BT, search, max_tokens, eos_id)
    return [texts[0][1] if texts else [] for texts in finished]


def beam_texts(
    step: Step, reorder: Reorder, prompt_BT: Tensor, search: DecodingConfig, max_tokens: int, eos_id: int
) -> list[list[tuple[float, list[int]]]]:
    """Return the finished texts of each row with their mean log-probabilities, best first, until none can be better.

    `step` gets rows in groups of `beams`; `reorder` is called with their origins before each step but the first.
    """
    B, K = len(prompt_BT), search.beams
    device = prompt_BT.device
    total_BK = torch.full((B, K), -torch.inf, device=device)
    total_BK[:, 0] = 0.0  # all beams are the same at first: only one of them counts
    written: list[list[list[int]]] = [[[] for _ in range(K)] for _ in range(B)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]
    new_RT = prompt_BT.repeat_interleave(K, 0)
    for length in range(1, max_tokens + 1):
        scores_RV = step(new_RT).float().log_softmax(-1)
        V = scores_RV.shape[-1]
        grown_BE = (total_BK[:, :, None] + scores_RV.view(B, K, V)).flatten(1)
        # Twice the number of beams: each beam has at most one EOS.
        value_BE, index_BE = grown_BE.topk(2 * K)
        total_BK = torch.full((B, K), -torch.inf, device=device)
        origin_BK = torch.zeros(B, K, dtype=torch.long, device=device)
        token_BK = torch.full((B, K), eos_id, device=device)
        for b in range(B):
            kept, texts = 0, []
            for rank, (value, index) in enumerate(zip(value_BE[b].tolist(), index_BE[b].tolist(), strict=True)):
                beam, token = divmod(index, V)
                # An end that is none of the likeliest candidates ends nothing, as in transformers and fairseq.
                if rank < K and (token == eos_id or length == max_tokens):
                    text = written[b][beam] + ([] if token == eos_id else [token])
                    finished[b].append((value / length, text))
                if token != eos_id and kept < K:
                    total_BK[b, kept], origin_BK[b, kept], token_BK[b, kept] = value, beam, token
                    texts.append([*written[b][beam], token])
                    kept += 1
            written[b] = texts + [[]] * (K - kept)
        # The final mean of an unfinished text is at most its sum so far divided by the maximum length.
        bound_B = total_BK.max(1).values / max_tokens
        best_B = [max((score for score, _ in texts), default=-torch.inf) for texts in finished]
        if all(bound <= best for bound, best in zip(bound_B.tolist(), best_B, strict=True)):
            break
        reorder((origin_BK + torch.arange(B, device=device)[:, None] * K).flatten())
        new_RT = token_BK.flatten()[:, None]
    return [sorted(texts, key=lambda scored: -scored[0]) for texts in finished]
