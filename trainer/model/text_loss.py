"""The loss of the texts about images: texts of an image are packed into one sequence, and scores are computed in parts.

A decoder reads the image of packed texts once. Positions begin anew with each text, and a token sees its own text only: the
loss is that of the texts apart.

A vocabulary may have 150,000 words. `cross_entropy` keeps the probabilities of all of them for each token, and their gradient
takes as much again. Here the gradient of a part is computed as soon as its scores are, which are then let go.

Shapes: B images, C texts, T tokens of a text, S tokens of all texts of an image, K tokens that are learned, D width,
V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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


# In a part, whose products read all words once: so many scores (float32), but of no fewer tokens.
SCORES_AT_ONCE, MIN_TOKENS = {"cpu": 1 << 23, "cuda": 1 << 27}, 256


class ScoreForm(NamedTuple):
    """What a model makes of the scores that its head gives: a multiple of them, and at most `cap` (cap * tanh(score / cap))."""

    factor: float = 1.0
    cap: float | None = None

    def apply(self, scores_KV: Tensor) -> Tensor:
        """Return the scores of the model."""
        scores_KV = scores_KV if self.factor == 1 else scores_KV * self.factor
        return scores_KV if self.cap is None else self.cap * torch.tanh(scores_KV / self.cap)

    def gradient(self, error_KV: Tensor, scores_KV: Tensor) -> Tensor:
        """Return the gradient of the head's scores, from that of the model's scores and these."""
        error_KV = error_KV if self.cap is None else error_KV * (1 - (scores_KV / self.cap) ** 2)
        return error_KV if self.factor == 1 else error_KV * self.factor


AS_GIVEN = ScoreForm()


def token_loss(
    states_KD: Tensor,
    words: nn.Embedding | nn.Linear,
    labels_K: Tensor,
    label_smoothing: float = 0.0,
    weight_K: Tensor | None = None,
    form: ScoreForm = AS_GIVEN,
) -> Tensor:
    """Return the sum of the negative log-likelihoods of tokens, each times its weight.

    `words` maps states to scores: an embedding of words (V, D), or a linear layer. With label smoothing e (Szegedy et al.,
    2016), a target is 1 - e for the token and e / V for each word. Its gradient can be taken once, and not differentiated.
    """
    bias_V = words.bias if isinstance(words, nn.Linear) else None
    arguments = (states_KD, words.weight, bias_V, labels_K, label_smoothing, weight_K, form, torch.is_grad_enabled())
    loss: Tensor = _TokenLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_KD: Tensor,
        table_VD: Tensor,
        bias_V: Tensor | None,
        labels_K: Tensor,
        label_smoothing: float,
        weight_K: Tensor | None,
        form: ScoreForm,
        needs_gradient: bool,  # noqa: FBT001  # `apply` takes no names
    ) -> Tensor:
        device, V = states_KD.device.type, len(table_VD)
        # Here autocast would cast all words anew for each part.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table_VD.dtype
        cast_KD, cast_VD = states_KD.to(dtype), table_VD.to(dtype)
        cast_V = None if bias_V is None else bias_V.to(dtype)
        of_states, of_table, of_bias = (needed and needs_gradient for needed in ctx.needs_input_grad[:3])
        grad_KD = torch.empty_like(states_KD) if of_states else None
        grad_VD = torch.zeros_like(table_VD) if of_table else None
        grad_V = torch.zeros_like(bias_V) if of_bias and bias_V is not None else None
        total = torch.zeros((), device=states_KD.device)
        size = max(MIN_TOKENS, SCORES_AT_ONCE.get(device, SCORES_AT_ONCE["cpu"]) // V)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(labels_K), size):
                part = slice(start, start + size)
                label_K1 = labels_K[part, None]
                scores_KV = form.apply(nn.functional.linear(cast_KD[part], cast_VD, cast_V))
                logs_KV = torch.log_softmax(scores_KV, -1, dtype=torch.float32)
                losses_K = (label_smoothing - 1) * logs_KV.gather(1, label_K1)[:, 0]
                if label_smoothing:
                    losses_K -= label_smoothing * logs_KV.mean(-1)
                total += (losses_K if weight_K is None else losses_K * weight_K[part]).sum()
                if not (of_states or of_table or of_bias):
                    continue
                # The gradient of the scores is softmax - target.
                error_KV = logs_KV.exp_()
                if label_smoothing:
                    error_KV -= label_smoothing / V
                error_KV.scatter_add_(1, label_K1, torch.full_like(label_K1, label_smoothing - 1, dtype=torch.float32))
                if weight_K is not None:
                    error_KV *= weight_K[part, None]
                error_KV = form.gradient(error_KV, scores_KV).to(dtype)
                if grad_KD is not None:
                    grad_KD[part] = error_KV @ cast_VD
                if grad_VD is not None and grad_VD.dtype == dtype:
                    grad_VD.addmm_(error_KV.T, cast_KD[part])
                elif grad_VD is not None:
                    grad_VD += error_KV.T @ cast_KD[part]
                if grad_V is not None:
                    grad_V += error_KV.sum(0)
        ctx.save_for_backward(grad_KD, grad_VD, grad_V)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since that of the words may be large: a second time is an error of autograd.
        scaled = (None if gradient is None else gradient.mul_(grads[0]) for gradient in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)
