"""Language-model loss for packed texts, with logits computed in parts.

Packing: all texts about an image share one row, so the decoder reads the image once. Positions restart with
each text, and a token attends only to its own text, so the loss is the same as for separate texts.

Parts: with a vocabulary of 150,000 tokens, the logits of all tokens would fill the memory. They are computed
for one part of the tokens at a time, freed, and computed again in the backward pass.

Shapes: B images, C texts, T tokens per text, S tokens per packed row, K target tokens, D width, V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.tokenizer import TextBatch


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """The input tokens of a batch, in one right-padded row per image.

    `segments_BS` numbers the texts of a row, with -1 for padding. `place_CT` holds the index of token t of
    text c in the flattened rows (b * S + s), and `origin_BS` is its inverse (c * T + t). Both are 0 for
    padding. `learned_K` holds the indices whose next token is a target.
    """

    ids_BS: Tensor
    positions_BS: Tensor
    segments_BS: Tensor
    place_CT: Tensor
    origin_BS: Tensor
    learned_K: Tensor
    labels_K: Tensor
    weight_K: Tensor

    def to(self, device: torch.device) -> "PackedTexts":
        """Move all tensors to a device."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return PackedTexts(*(tensor.to(device, non_blocking=True) for tensor in tensors))

    def learned(self, states_BSD: Tensor) -> Tensor:
        """Select the states that predict target tokens: (B, S, D) -> (K, D)."""
        return states_BSD.flatten(0, 1).index_select(0, self.learned_K)


def pack(texts: TextBatch, num_images: int) -> PackedTexts:
    """Pack the texts of each image into one row. `texts.image_of_C` must be sorted."""
    image_of_C, tokens_C = texts.image_of_C, texts.length_C - 1
    device = image_of_C.device
    zeros_B = torch.zeros(num_images, dtype=torch.long, device=device)
    tokens_B = zeros_B.index_add(0, image_of_C, tokens_C)
    texts_B = zeros_B.index_add(0, image_of_C, torch.ones_like(image_of_C))
    S = max(1, int(tokens_B.max()))
    # Each text starts after the earlier texts of its image.
    start_C = _sums_before(tokens_C) - _sums_before(tokens_B)[image_of_C]
    number_C = torch.arange(len(image_of_C), device=device) - _sums_before(texts_B)[image_of_C]
    position_T = torch.arange(texts.ids_CT.shape[1] - 1, device=device)
    is_real_CT = position_T < tokens_C[:, None]
    place_CT = (image_of_C * S + start_C)[:, None] + position_T

    def rows(values_CT: Tensor, padding: int) -> Tensor:
        flat = torch.full((num_images * S,), padding, dtype=torch.long, device=device)
        return flat.index_put((place_CT[is_real_CT],), values_CT[is_real_CT]).view(num_images, S)

    learned_CT = texts.learned_CT
    return PackedTexts(
        ids_BS=rows(texts.ids_CT[:, :-1], 0),
        positions_BS=rows(position_T.expand_as(place_CT), 0),
        segments_BS=rows(number_C[:, None].expand_as(place_CT), -1),
        place_CT=place_CT.where(is_real_CT, 0),
        origin_BS=rows(torch.arange(place_CT.numel(), device=device).view_as(place_CT), 0),
        learned_K=place_CT[learned_CT],
        labels_K=texts.ids_CT[:, 1:][learned_CT],
        weight_K=weight_of_learned(texts),
    )


def weight_of_learned(texts: TextBatch) -> Tensor:
    """Return the weight of each target token: (K,)."""
    learned_CT = texts.learned_CT
    return texts.weight_C[:, None].expand_as(learned_CT)[learned_CT]


def packed_mask(segments_BS: Tensor, prefix_length: int = 0) -> Tensor:
    """Return a causal mask (B, L, L) with L = prefix_length + S. Tokens see the prefix and their own text."""
    prefix = -2
    segments_BL = functional.pad(segments_BS, (prefix_length, 0), value=prefix)
    is_same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    is_causal_LL = torch.ones(is_same_BLL.shape[1:], dtype=torch.bool, device=segments_BS.device).tril()
    return (is_same_BLL | (segments_BL == prefix)[:, None, :]) & is_causal_LL


def _sums_before(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


# There is a minimum, because each part of the tokens reads the whole output matrix from memory.
MAX_LOGITS_PER_PART, MIN_TOKENS_PER_PART = {"cpu": 1 << 23, "cuda": 1 << 27}, 256


class LogitTransform(NamedTuple):
    """A model's change to the logits of its head: scaling, then soft-capping by cap * tanh(logits / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, logits_KV: Tensor) -> Tensor:
        """Transform logits of the head into logits of the model."""
        logits_KV = logits_KV if self.scale == 1 else logits_KV * self.scale
        return logits_KV if self.cap is None else self.cap * torch.tanh(logits_KV / self.cap)


IDENTITY = LogitTransform()


def token_loss(
    states_KD: Tensor,
    head: nn.Embedding | nn.Linear,
    labels_K: Tensor,
    weight_K: Tensor,
    label_smoothing: float = 0,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """Return the weighted sum of the tokens' negative log-likelihoods."""
    bias_V = head.bias if isinstance(head, nn.Linear) else None

    def part_loss(states_KD: Tensor, labels_K: Tensor, weight_K: Tensor) -> Tensor:
        logits_KV = transform.apply(functional.linear(states_KD, head.weight, bias_V)).float()
        losses_K = functional.cross_entropy(
            logits_KV, labels_K, reduction="none", label_smoothing=label_smoothing
        )
        return (losses_K * weight_K).sum()

    max_logits = MAX_LOGITS_PER_PART.get(states_KD.device.type, MAX_LOGITS_PER_PART["cpu"])
    size = max(MIN_TOKENS_PER_PART, max_logits // len(head.weight))
    if len(labels_K) <= size:
        return part_loss(states_KD, labels_K, weight_K)
    parts = zip(*(tensor.split(size) for tensor in (states_KD, labels_K, weight_K)), strict=True)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(part_loss, *part, **options) for part in parts]).sum()
