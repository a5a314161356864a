"""Language-model loss for packed texts, with logits computed in parts.

Packing: all texts about an image share one row, so the decoder reads the image once. Positions restart with
each text, and a token attends only to its own text, so the loss is the same as for separate texts.

Parts: with a vocabulary of 150,000 tokens, `cross_entropy` would hold the logits and gradients of all tokens
at once. Here, the forward pass computes loss and gradient for one part of the tokens at a time, and frees its
logits before the next part.

Shapes: B images, C texts, T tokens per text, S tokens per packed row, K target tokens, D width, V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.tokenizer import TextBatch


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """The input tokens of a batch, in one right-padded row per image, without the last token of each text.

    A place is an index into the flattened rows: b * S + s.
    """

    ids_BS: Tensor
    positions_BS: Tensor  # within the text
    segments_BS: Tensor  # index of the text within its row, -1 for padding
    place_CT: Tensor  # place of token t of text c, 0 for padding
    origin_BS: Tensor  # inverse of `place_CT`: c * T + t for each place, 0 for padding
    learned_K: Tensor  # places whose next token is a target
    labels_K: Tensor  # the target tokens
    weight_K: Tensor  # the weight of each target token

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
    # The texts of an image form one row. A text starts after the earlier texts of its image.
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
    """Return a causal mask (B, L, L) with L = prefix_length + S: prefix and own text are visible."""
    prefix = -2
    segments_BL = functional.pad(segments_BS, (prefix_length, 0), value=prefix)
    is_same_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    is_causal_LL = torch.ones(is_same_BLL.shape[1:], dtype=torch.bool, device=segments_BS.device).tril()
    return (is_same_BLL | (segments_BL == prefix)[:, None, :]) & is_causal_LL


def _sums_before(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


# Maximum number of float32 logits per part. The minimum number of tokens takes precedence, because each part
# reads the whole head.
MAX_LOGITS_PER_PART, MIN_TOKENS_PER_PART = {"cpu": 1 << 23, "cuda": 1 << 27}, 256


class LogitTransform(NamedTuple):
    """A model's change to the logits of its head: scaling, then soft-capping by cap * tanh(logits / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, logits_KV: Tensor) -> Tensor:
        """Transform logits of the head into logits of the model."""
        logits_KV = logits_KV if self.scale == 1 else logits_KV * self.scale
        return logits_KV if self.cap is None else self.cap * torch.tanh(logits_KV / self.cap)

    def gradient(self, error_KV: Tensor, logits_KV: Tensor) -> Tensor:
        """Return the gradient of the input of `apply`, given the output `logits_KV` and its gradient."""
        error_KV = error_KV if self.cap is None else error_KV * (1 - (logits_KV / self.cap) ** 2)
        return error_KV if self.scale == 1 else error_KV * self.scale


IDENTITY = LogitTransform()


def token_loss(
    states_KD: Tensor,
    head: nn.Embedding | nn.Linear,
    labels_K: Tensor,
    weight_K: Tensor,
    label_smoothing: float = 0,
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """Return the weighted sum of the tokens' negative log-likelihoods. Supports one backward pass.

    With label smoothing e (Szegedy et al., 2016), the target probability is 1 - e for the label, plus e / V
    for every token.
    """
    bias_V = head.bias if isinstance(head, nn.Linear) else None
    needs_gradient = torch.is_grad_enabled()
    loss: Tensor = _TokenLoss.apply(  # type: ignore[no-untyped-call]
        states_KD, head.weight, bias_V, labels_K, weight_K, label_smoothing, transform, needs_gradient
    )
    return loss


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_KD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_K: Tensor,
        weight_K: Tensor,
        label_smoothing: float,
        transform: LogitTransform,
        needs_gradient: bool,  # noqa: FBT001
    ) -> Tensor:
        device, V = states_KD.device.type, len(weight_VD)
        # Cast the head once. Autocast would cast it again for each part.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        cast_KD, cast_VD = states_KD.to(dtype), weight_VD.to(dtype)
        cast_V = None if bias_V is None else bias_V.to(dtype)
        states_need, weight_needs, bias_needs = (n and needs_gradient for n in ctx.needs_input_grad[:3])
        grad_KD = torch.empty_like(states_KD) if states_need else None
        grad_VD = torch.zeros_like(weight_VD) if weight_needs else None
        grad_V = torch.zeros_like(bias_V) if bias_needs and bias_V is not None else None
        total = torch.zeros((), device=states_KD.device)
        size = max(MIN_TOKENS_PER_PART, MAX_LOGITS_PER_PART.get(device, MAX_LOGITS_PER_PART["cpu"]) // V)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(labels_K), size):
                part = slice(start, start + size)
                label_K1, weight_K1 = labels_K[part, None], weight_K[part, None]
                logits_KV = transform.apply(nn.functional.linear(cast_KD[part], cast_VD, cast_V))
                log_probs_KV = torch.log_softmax(logits_KV, -1, dtype=torch.float32)
                losses_K = (label_smoothing - 1) * log_probs_KV.gather(1, label_K1)[:, 0]
                if label_smoothing:
                    losses_K -= label_smoothing * log_probs_KV.mean(-1)
                total += (losses_K * weight_K[part]).sum()
                if not (states_need or weight_needs or bias_needs):
                    continue
                # The gradient of the logits is softmax - target.
                error_KV = log_probs_KV.exp_()
                if label_smoothing:
                    error_KV -= label_smoothing / V
                minus_target = torch.full_like(label_K1, label_smoothing - 1, dtype=torch.float32)
                error_KV.scatter_add_(1, label_K1, minus_target)
                error_KV = transform.gradient(error_KV, logits_KV).to(dtype)
                # Weigh the narrow factors of the products, not the wide error.
                if grad_KD is not None:
                    grad_KD[part] = (error_KV @ cast_VD) * weight_K1
                weighted_KD = (cast_KD[part] * weight_K1).to(dtype)
                if grad_VD is not None and grad_VD.dtype == dtype:
                    grad_VD.addmm_(error_KV.T, weighted_KD)
                elif grad_VD is not None:
                    grad_VD += error_KV.T @ weighted_KD
                if grad_V is not None:
                    grad_V += (error_KV * weight_K1).sum(0)
        ctx.save_for_backward(grad_KD, grad_VD, grad_V)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Scale in place, because the gradient of the head may be large. Autograd therefore rejects a second
        # backward pass.
        scaled = (None if gradient is None else gradient.mul_(grads[0]) for gradient in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)
