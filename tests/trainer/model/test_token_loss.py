"""The loss computed in parts has the value and the gradients of `cross_entropy`."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.model import text_loss

TOKENS, WIDTH, VOCABULARY = 7, 4, 11
Words = nn.Embedding | nn.Linear


def words(kind: str) -> Words:
    torch.manual_seed(0)
    if kind == "embedding":
        return nn.Embedding(VOCABULARY, WIDTH)
    return nn.Linear(WIDTH, VOCABULARY, bias=kind == "with a bias")


def gradients(loss: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss / 3, [tensor for tensor in tensors if tensor is not None]))


@pytest.mark.parametrize("scores_at_once", [1, 1000])
@pytest.mark.parametrize("weights", [torch.ones(7), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 1.0, 1.0])])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["embedding", "with a bias"])
@pytest.mark.parametrize("form", [text_loss.IDENTITY, text_loss.LogitTransform(2.0, cap=0.5)])
def test_loss_and_gradients_equal_cross_entropy(
    form: text_loss.LogitTransform,
    kind: str,
    label_smoothing: float,
    weights: Tensor,
    scores_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(text_loss.MAX_LOGITS_PER_PART, "cpu", scores_at_once)
    monkeypatch.setattr(text_loss, "MIN_TOKENS_PER_PART", 1)
    of, states = words(kind), torch.randn(TOKENS, WIDTH, requires_grad=True)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    bias = getattr(of, "bias", None)
    scores = form.scale * functional.linear(states, of.weight, bias)
    scores = scores if form.cap is None else form.cap * torch.tanh(scores / form.cap)
    losses = functional.cross_entropy(scores, labels, reduction="none", label_smoothing=label_smoothing)
    expected = (losses * weights).sum()
    loss = text_loss.token_loss(states, of, labels, weights, label_smoothing, form)
    torch.testing.assert_close(loss, expected)
    tensors = (states, of.weight, bias)
    torch.testing.assert_close(gradients(loss, *tensors), gradients(expected, *tensors))


def test_autocast_rounds_products_but_not_the_loss() -> None:
    of, states = words("linear"), torch.randn(TOKENS, WIDTH, requires_grad=True)
    labels = torch.zeros(TOKENS, dtype=torch.long)
    exact = text_loss.token_loss(states, of, labels, torch.ones(TOKENS))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = text_loss.token_loss(states, of, labels, torch.ones(TOKENS))
        expected = functional.cross_entropy(of(states).float(), labels, reduction="sum")
    assert rounded.dtype == torch.float32
    assert rounded != exact
    torch.testing.assert_close(rounded, expected)
    rough = gradients(rounded, states, of.weight)
    assert {gradient.dtype for gradient in rough} == {torch.float32}
    torch.testing.assert_close(rough, gradients(exact, states, of.weight), rtol=0.05, atol=0.02)
