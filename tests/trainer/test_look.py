"""What a captioner looks at: shares of the image for each word, whatever the decoder, and a picture of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import TrainError
from tests.pipeline.images.test_similarity import photo
from tests.trainer.test_captioning import save_captioner
from tests.trainer.tiny_models import save_clip, save_language_model
from trainer import Captioner
from trainer.checkpoint import Checkpoint
from trainer.look import LABEL_PX, TILE_PX, TILES_IN_ROW, Look, draw, look, spans
from trainer.model.captioner import build_captioner
from trainer.model.encoder import load_encoder
from trainer.model.language_model import load_decoder

PATCHES = 2  # in a row, of the tiny encoders


@pytest.fixture(scope="module", params=["scratch", "qwen3", "llama"])
def captioner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    root = tmp_path_factory.mktemp("models")
    if request.param == "scratch":
        return Captioner.from_pretrained(save_captioner(root / "c"), device="cpu")
    decoder, tokenizer = load_decoder(save_language_model(root / "lm", request.param))
    fields: dict[str, Any] = {"prompts": [("human", "brief")], "eos_id": tokenizer.eos_id, "max_caption_tokens": 6}
    return Captioner(Checkpoint(build_captioner(load_encoder(save_clip(root / "clip")), decoder, **fields).eval(), tokenizer))


def test_each_word_has_its_shares_of_the_image(captioner: Captioner) -> None:
    seen = look(captioner, photo(3))
    assert seen.text == captioner.caption(photo(3))[0]
    assert seen.words
    assert " ".join(" ".join(one.word for one in seen.words).split()) == " ".join(seen.text.split())
    for one in seen.words:
        assert one.shares.shape == (PATCHES, PATCHES)
        assert (one.shares >= 0).all()
        assert 0 < one.shares.sum() <= 1.0001  # a class token has the rest
    assert seen.seen.size == (28, 28)


def test_a_word_has_the_attention_with_which_it_was_chosen(captioner: Captioner) -> None:
    """The token at position t was chosen by the state before it."""
    seen, model = look(captioner, photo(3)), captioner.checkpoint.captioner
    prompt = captioner.prompt()
    (written,) = captioner.write(captioner.prepare(photo(3))[None], [prompt])  # type: ignore[index]  # it is readable
    with torch.inference_mode():
        memory = model.connector(model.encoder(captioner.prepare(photo(3))[None]))  # type: ignore[index]
        shares = model.decoder.attention_to_image(torch.tensor([[*prompt, *written]]), memory)
    _, _, last = spans(captioner.checkpoint.tokenizer, written)[0]
    expected = shares[len(prompt) - 1 : len(prompt) - 1 + last].mean(0)[1:].view(PATCHES, PATCHES)
    np.testing.assert_allclose(seen.words[0].shares, expected.numpy(), rtol=1e-4)


def test_the_other_texts_are_those_of_a_beam_search(captioner: Captioner) -> None:
    seen = look(captioner, photo(3), beams=3)
    (best,) = captioner.caption(photo(3), num_beams=3)
    assert seen.alternatives[0][0] == best
    scores = [score for _, score in seen.alternatives]
    assert scores == sorted(scores, reverse=True) and len({text for text, _ in seen.alternatives}) == len(scores) <= 3


def test_attention_follows_the_states(captioner: Captioner) -> None:
    model = captioner.checkpoint.captioner
    torch.manual_seed(0)
    memory = torch.randn(1, 5, model.decoder.width)
    ids = torch.tensor([captioner.prompt()])
    with torch.inference_mode():
        shares = model.decoder.attention_to_image(ids, memory)
        swapped = model.decoder.attention_to_image(ids, memory[:, [1, 0, 2, 3, 4]])
    assert shares.shape == (len(ids[0]), 5)
    torch.testing.assert_close(shares.sum(-1), torch.ones(len(ids[0])))
    assert shares.std() > 1e-4
    if model.decoder.__class__.__name__ == "ScratchDecoder":  # a prefix has positions, cross-attention has none
        torch.testing.assert_close(swapped, shares[:, [1, 0, 2, 3, 4]], rtol=1e-4, atol=1e-5)
    assert not model.decoder.training


def test_writing_is_as_it_was_after_a_look(captioner: Captioner) -> None:
    before = captioner.caption(photo(5))
    look(captioner, photo(3))
    assert captioner.caption(photo(5)) == before


def test_the_picture_has_a_tile_for_each_word() -> None:
    shares = np.zeros((4, 4), dtype=np.float32)
    shares[0, 0] = 1.0
    words = [type("Word", (), {"word": f"w{n}", "shares": shares})() for n in range(TILES_IN_ROW)]
    gray = Image.new("RGB", (28, 28), (120, 120, 120))
    sheet = draw(Look("text", words, gray, []))
    assert sheet.size == (TILES_IN_ROW * TILE_PX, 2 * (TILE_PX + LABEL_PX))
    assert sheet.getpixel((5, 5)) == (120, 120, 120)  # the first tile is the image
    looked_at, elsewhere = (np.asarray(sheet.getpixel((TILE_PX + at, at))) for at in (5, TILE_PX - 5))
    assert looked_at.sum() > 2 * elsewhere.sum()


def test_words_are_made_of_their_tokens(captioner: Captioner) -> None:
    tokenizer = captioner.checkpoint.tokenizer
    ids = tokenizer.backend.encode(" A dog, two dogs.", add_special_tokens=False).ids
    parts = spans(tokenizer, ids)
    assert [word for word, *_ in parts] == ["A", "dog,", "two", "dogs."]
    assert [first for _, first, _ in parts][1:] == [last for *_, last in parts][:-1]
    assert (parts[0][1], parts[-1][2]) == (0, len(ids))
    assert spans(tokenizer, []) == []


def test_a_character_of_several_tokens_stays_whole(captioner: Captioner) -> None:
    tokenizer = captioner.checkpoint.tokenizer
    ids = tokenizer.backend.encode(" Ein schöner Käse 🧀 da", add_special_tokens=False).ids
    parts = spans(tokenizer, ids)
    assert [word for word, *_ in parts] == ["Ein", "schöner", "Käse", "🧀", "da"]
    assert [first for _, first, _ in parts][1:] == [last for *_, last in parts][:-1]


def test_what_cannot_be_looked_at_is_one_error(captioner: Captioner, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="cannot read the image"):
        look(captioner, tmp_path / "none.png")
    with pytest.raises(TrainError, match="knows no style"):
        look(captioner, photo(1), style="poem")
