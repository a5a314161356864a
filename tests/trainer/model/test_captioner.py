"""Captioner: its loss is over real tokens only, captions share an image without mixing, and it stops at EOS."""

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.model.captioner import EOS_ID, PAD_ID, Captioner, CaptionerConfig

VIT: dict[str, Any] = {
    "image_size": 28,
    "patch_size": 14,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.fixture
def captioner() -> Captioner:
    torch.manual_seed(0)
    decoder = {"vocab_size": 20, "width": 32, "depth": 2, "heads": 4, "dropout": 0.0}
    config = CaptionerConfig(encoder=VIT, decoder=decoder, styles=["brief"], max_caption_tokens=12)
    return Captioner(config).eval()


def test_padding_costs_nothing(captioner: Captioner) -> None:
    pixels, of = torch.randn(1, 3, 28, 28), torch.tensor([0])
    ids = torch.tensor([[2, 7, 8, EOS_ID]])
    padded = torch.tensor([[2, 7, 8, EOS_ID, PAD_ID, PAD_ID]])
    assert captioner.loss(pixels, of, padded).item() == pytest.approx(captioner.loss(pixels, of, ids).item(), abs=1e-6)


def test_the_loss_of_captions_that_share_an_image_is_that_of_captions_apart(captioner: Captioner) -> None:
    pixels = torch.randn(2, 3, 28, 28)
    ids = torch.tensor([[2, 7, 8, EOS_ID], [2, 9, 4, EOS_ID], [2, 5, 6, EOS_ID]])
    together = captioner.loss(pixels, torch.tensor([0, 0, 1]), ids)
    apart = captioner.loss(pixels[[0, 0, 1]], torch.tensor([0, 1, 2]), ids)
    torch.testing.assert_close(together, apart)


def test_a_token_is_learned_from_those_before_it_and_not_from_itself(captioner: Captioner) -> None:
    """Catches a label that is shifted twice or not at all."""
    pixels, ids = torch.randn(1, 3, 28, 28), torch.tensor([[2, 7, 8, 9]])
    states = captioner.decoder(ids, captioner.encode(pixels))
    expected = torch.nn.functional.cross_entropy(captioner.decoder.head(states[0, :-1]), ids[0, 1:])
    torch.testing.assert_close(captioner.loss(pixels, torch.tensor([0]), ids), expected)


def test_greedy_writing_equals_recomputing_everything_for_each_token(captioner: Captioner) -> None:
    pixels = torch.randn(3, 3, 28, 28)
    written = captioner.generate(pixels, start_id=2)
    for row, image in enumerate(pixels):
        ids, memory = [2], captioner.encode(image[None])
        while len(ids) <= 12:
            states = captioner.decoder(torch.tensor([ids]), memory)
            token = int(captioner.decoder.head(states[:, -1]).argmax())
            if token == EOS_ID:
                break
            ids.append(token)
        assert written[row] == ids[1:]


def test_writing_stops_as_soon_as_all_captions_have_ended(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    captioner.decoder.register_forward_hook(lambda *_: calls.append(1))
    always_eos = torch.nn.functional.one_hot(torch.tensor(EOS_ID), 20).float()
    monkeypatch.setattr(captioner.decoder, "head", lambda states: always_eos.expand(len(states), -1))
    assert captioner.generate(torch.randn(4, 3, 28, 28), start_id=2) == [[], [], [], []]
    assert len(calls) == 1


def test_a_saved_captioner_is_the_same_when_it_is_loaded(captioner: Captioner, tmp_path: Path) -> None:
    captioner.save_pretrained(tmp_path)
    loaded = Captioner.from_pretrained(str(tmp_path)).eval()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".md") == ["config.json", "model.safetensors"]
    assert loaded.config == captioner.config
    pixels, ids = torch.randn(2, 3, 28, 28), torch.randint(2, 20, (2, 6))
    assert torch.equal(loaded.loss(pixels, torch.arange(2), ids), captioner.loss(pixels, torch.arange(2), ids))
