"""Generate texts token by token: greedily, by sampling, or by beam search.

Shapes: B prompts, R unfinished rows, K beams, E = 2K candidates, L generated tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodingConfig:
    """Decoding options with the names and meanings of transformers, greedy by default."""

    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    length_penalty: float = 1.0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0


GREEDY = DecodingConfig()
MIN_ENDED_SHARE = 0.25  # finished rows are removed when they reach this share of the batch
Step = Callable[[Tensor], Tensor]  # new tokens (R, T) -> logits of the next token (R, V)
Reorder = Callable[[Tensor], None]  # receives, for each row, the index of the row it continues: (R,)
Keep = Callable[[Tensor], None]  # receives the indices of remaining rows, or of prompts in beam search


def decode(
    step: Step, keep: Keep, prompt_BT: Tensor, decoding: DecodingConfig, max_tokens: int, eos_id: int
) -> list[list[int]]:
    """Decode greedily or by sampling. Returns the token ids of each prompt's text, without EOS."""
    texts: list[list[int]] = [[] for _ in prompt_BT]
    rows = list(range(len(texts)))  # the prompt index of each unfinished row
    new_RT, ended, written_RL = prompt_BT, [False] * len(rows), prompt_BT[:, :0]
    for _ in range(max_tokens):
        next_R = sample_token(forbid(step(new_RT), written_RL, decoding, eos_id), decoding)
        written_RL = torch.cat([written_RL, next_R[:, None]], 1)
        for index, token in enumerate(next_R.tolist()):
            ended[index] |= token == eos_id
            if not ended[index]:
                texts[rows[index]].append(token)
        if all(ended):
            break
        new_RT = next_R[:, None]
        if sum(ended) >= MIN_ENDED_SHARE * len(ended):
            remaining = [index for index, has_ended in enumerate(ended) if not has_ended]
            rows, ended = [rows[index] for index in remaining], [False] * len(remaining)
            remaining_R = torch.tensor(remaining, device=new_RT.device)
            keep(remaining_R)
            new_RT, written_RL = new_RT[remaining_R], written_RL[remaining_R]
    return texts


def forbid(scores_RV: Tensor, written_RL: Tensor, decoding: DecodingConfig, eos_id: int) -> Tensor:
    """Return scores of -inf for EOS in texts that are too short, and for tokens that repeat an n-gram."""
    n, L = decoding.no_repeat_ngram_size, written_RL.shape[1]
    if decoding.min_new_tokens > L:
        scores_RV = scores_RV.index_fill(1, torch.tensor([eos_id], device=scores_RV.device), -torch.inf)
    if not 0 < n <= L:
        return scores_RV
    grams_RGN = written_RL.unfold(1, n, 1)
    is_repeated_RG = (grams_RGN[..., :-1] == written_RL[:, None, L - n + 1 :]).all(-1)
    # Added as a penalty, because a token may be the last one of several n-grams.
    penalty_RG = torch.zeros_like(is_repeated_RG, dtype=scores_RV.dtype).masked_fill(
        is_repeated_RG, -torch.inf
    )
    return scores_RV.scatter_add(1, grams_RGN[..., -1], penalty_RG)


def sample_token(scores_BV: Tensor, decoding: DecodingConfig) -> Tensor:
    """Return the likeliest token of each row, or a top-p sample (Holtzman et al., 2020)."""
    if decoding.temperature == 0:
        return scores_BV.argmax(-1)
    sorted_BV, order_BV = (scores_BV.float() / decoding.temperature).softmax(-1).sort(descending=True)
    likelier_BV = sorted_BV.cumsum(-1) - sorted_BV  # total probability of all likelier tokens
    sampled_B1 = sorted_BV.masked_fill(likelier_BV >= decoding.top_p, 0.0).multinomial(1)
    return order_BV.gather(1, sampled_B1)[:, 0]


@dataclass(frozen=True, slots=True)
class _SearchStep:
    """The K likeliest candidates for each of R prompts after one step of beam search."""

    rows: list[int]  # the prompt index of each row
    score_RK: Tensor  # scores, -inf for unfinished texts
    texts_RKL: Tensor


def beam_search(
    step: Step,
    reorder: Reorder,
    keep: Keep,
    prompt_BT: Tensor,
    decoding: DecodingConfig,
    max_tokens: int,
    eos_id: int,
) -> list[list[int]]:
    """Keep the likeliest prefixes of each prompt, and return the text with the best score.

    The score is the log-probability divided by the number of tokens to the power of `length_penalty`.

    `step` receives `num_beams` adjacent rows per prompt. Between two steps, `reorder` receives the index of
    the row that each row continues. After finished prompts are removed, `keep` receives the indices of the
    remaining prompts. Each step synchronizes with the device once.
    """
    K, alpha, device = decoding.num_beams, decoding.length_penalty, prompt_BT.device
    rows = list(range(len(prompt_BT)))
    total_BK = torch.full((len(rows), K), -torch.inf, device=device)
    total_BK[:, 0] = 0.0  # all beams are equal at first, so only one is expanded
    best_B = torch.full((len(rows),), -torch.inf, device=device)
    written_BKL = prompt_BT.new_empty(len(rows), K, 0)
    new_RT, steps = prompt_BT.repeat_interleave(K, 0), list[_SearchStep]()
    for length in range(1, max_tokens + 1):
        scores_RV = step(new_RT).float().log_softmax(-1)
        scores_RV = forbid(scores_RV, written_BKL.flatten(0, 1), decoding, eos_id)
        B, V = len(rows), scores_RV.shape[-1]
        # Each beam has at most one EOS, so at least K of 2K candidates do not end.
        value_BE, index_BE = (total_BK[:, :, None] + scores_RV.view(B, K, V)).flatten(1).topk(2 * K)
        beam_BE, token_BE = index_BE // V, index_BE % V
        is_end_BE = token_BE == eos_id
        # A text ends only if its EOS is among the K likeliest candidates, as in transformers and fairseq.
        ends_BK = is_end_BE[:, :K] if length < max_tokens else torch.ones_like(is_end_BE[:, :K])
        score_BK = (value_BE[:, :K] / length**alpha).masked_fill(~ends_BK, -torch.inf)
        texts_BEL = torch.cat([_of_beams(written_BKL, beam_BE), token_BE[:, :, None]], 2)
        steps.append(_SearchStep(rows, score_BK, texts_BEL[:, :K]))
        best_B = torch.maximum(best_B, score_BK.amax(1))
        onward_BK = is_end_BE.to(torch.uint8).argsort(dim=1, stable=True)[:, :K]
        total_BK, origin_BK = value_BE.gather(1, onward_BK), beam_BE.gather(1, onward_BK)
        written_BKL = _of_beams(texts_BEL, onward_BK)
        # Upper bound for the final score of an unfinished text: its current total at the maximum length.
        is_over = (total_BK.amax(1) / max_tokens**alpha <= best_B).tolist()
        if all(is_over) or length == max_tokens:
            break
        origin_BK = origin_BK + torch.arange(B, device=device)[:, None] * K
        if sum(is_over) >= MIN_ENDED_SHARE * B:
            remaining = torch.tensor([index for index, over in enumerate(is_over) if not over], device=device)
            rows = [row for row, over in zip(rows, is_over, strict=True) if not over]
            total_BK, origin_BK, best_B = total_BK[remaining], origin_BK[remaining], best_B[remaining]
            written_BKL = written_BKL[remaining]
            reorder(origin_BK.flatten())
            keep(remaining)
        else:
            reorder(origin_BK.flatten())
        new_RT = written_BKL[:, :, -1].reshape(-1, 1)
    return _best_texts(steps, len(prompt_BT), eos_id)


def _of_beams(texts_BKL: Tensor, beams_BE: Tensor) -> Tensor:
    """Gather texts by beam: (B, K, L), (B, E) -> (B, E, L)."""
    return texts_BKL.gather(1, beams_BE[:, :, None].expand(-1, -1, texts_BKL.shape[2]))


def _best_texts(steps: list[_SearchStep], num_prompts: int, eos_id: int) -> list[list[int]]:
    """Return the best text for each prompt, without EOS. Of texts with equal scores, the shortest wins."""
    best: list[tuple[float, list[int]]] = [(-math.inf, [])] * num_prompts
    for step in steps:
        for row, scores, texts in zip(
            step.rows, step.score_RK.tolist(), step.texts_RKL.tolist(), strict=True
        ):
            best[row] = max(best[row], *zip(scores, texts, strict=True), key=lambda candidate: candidate[0])
    return [text[:-1] if text and text[-1] == eos_id else text for _, text in best]
