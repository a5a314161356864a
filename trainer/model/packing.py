"""Pack the texts about an image into one sequence, so that a decoder reads their image once.

Positions begin anew with each text, and a token sees its own text only: the loss is that of the texts apart.

Shapes: B images, C texts, T tokens of a text, S tokens of all texts of an image, K tokens that are learned.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from trainer.tokenizer import TextBatch


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """The texts of a batch of images, one row an image, padded on the right. The last token of a text is no input."""

    ids_BS: Tensor
    positions_BS: Tensor  # within the text
    segments_BS: Tensor  # number of the text within its image; -1: padding
    place_CT: Tensor  # b * S + s of token t of text c; 0 behind its end
    origin_BS: Tensor  # c * T + t of the token at a place; 0: padding
    learned_K: Tensor  # places b * S + s after which the token is learned
    labels_K: Tensor  # those tokens
    text_K: Tensor  # the number of the text that each belongs to

    def to(self, device: torch.device) -> "PackedTexts":
        """Move all tensors to a device."""
        return PackedTexts(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def learned(self, states_BSD: Tensor) -> Tensor:
        """Return the states that predict a learned token: (B, S, D) -> (K, D)."""
        return states_BSD.flatten(0, 1).index_select(0, self.learned_K)


def pack(texts: TextBatch, images: int) -> PackedTexts:
    """Concatenate the texts of each of `images` images, whose numbers in `texts.image_of_C` ascend."""
    image_of_C, tokens_C = texts.image_of_C, texts.length_C - 1
    zeros_B = torch.zeros(images, dtype=torch.long, device=image_of_C.device)
    tokens_B = zeros_B.index_add(0, image_of_C, tokens_C)
    texts_B = zeros_B.index_add(0, image_of_C, torch.ones_like(image_of_C))
    S = max(1, int(tokens_B.max()))
    # Where each text begins in its row, and its number there: sums before it, less those before its image.
    begins_C = _sums_before(tokens_C) - _sums_before(tokens_B)[image_of_C]
    number_C = torch.arange(len(image_of_C), device=image_of_C.device) - _sums_before(texts_B)[image_of_C]
    position_T = torch.arange(texts.ids_CT.shape[1] - 1, device=image_of_C.device)
    is_real_CT = position_T < tokens_C[:, None]
    place_CT = (image_of_C * S + begins_C)[:, None] + position_T

    def rows(values_CT: Tensor, padding: int) -> Tensor:
        flat = torch.full((images * S,), padding, dtype=torch.long, device=values_CT.device)
        return flat.index_put((place_CT[is_real_CT],), values_CT[is_real_CT]).view(images, S)

    learned_CT = texts.learned_CT
    return PackedTexts(
        ids_BS=rows(texts.ids_CT[:, :-1], 0),
        positions_BS=rows(position_T.expand_as(place_CT), 0),
        segments_BS=rows(number_C[:, None].expand_as(place_CT), -1),
        place_CT=place_CT.where(is_real_CT, 0),
        origin_BS=rows(torch.arange(place_CT.numel(), device=image_of_C.device).view_as(place_CT), 0),
        learned_K=place_CT[learned_CT],
        labels_K=texts.ids_CT[:, 1:][learned_CT],
        text_K=torch.arange(len(image_of_C), device=image_of_C.device)[:, None].expand_as(place_CT)[learned_CT],
    )


def visible(segments_BS: Tensor, prefix: int = 0) -> Tensor:
    """Return the attention mask (B, L, L), L = prefix + S: True where a token sees another, of its text or the prefix."""
    order_BL = functional.pad(segments_BS, (prefix, 0), value=-2)  # -2: the prefix, which every text sees
    is_same_BLL = order_BL[:, :, None] == order_BL[:, None, :]
    is_causal_LL = torch.ones(is_same_BLL.shape[1:], dtype=torch.bool, device=segments_BS.device).tril()
    return (is_same_BLL | (order_BL == -2)[:, None, :]) & is_causal_LL


def _sums_before(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts
