"""`Captioner` writes equal captions for files, bytes and PIL images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageSequence

import trainer
from pipeline.errors import ImageError, TrainError
from pipeline.tables import HUMAN
from pipeline.tasks import prompts as built_in
from tests.pipeline.images.test_similarity import photo
from tests.trainer.tiny_models import save_vit, strengthen
from trainer import Captioner
from trainer.model.caption_model import build_captioner
from trainer.model.checkpoint import Checkpoint
from trainer.model.decoder import DecoderConfig
from trainer.model.encoder import load_encoder
from trainer.model.language_model import new_decoder
from trainer.prompts import STYLES
from trainer.tokenizer import TargetText, train_tokenizer

PROMPTS = [("synthetic", "brief"), ("synthetic", "detailed"), ("synthetic", "")]


def save_captioner(
    folder: Path,
    prompts: list[tuple[str, str]] = PROMPTS,
    seed: int = 4,
    decoder: str = "scratch",
    strength: float = 6,
    max_caption_tokens: int = 8,
) -> Path:
    """Save a captioner with large random weights, so that captions differ between images."""
    learned = [(source, style) for source, style in prompts if style]
    sentences = [f"A dog, number {n}." for n in range(30)]
    texts = [TargetText(source, text, style=style) for text in sentences for source, style in learned]
    tokenizer = train_tokenizer([*texts, TargetText("synthetic", "two", question="How many?")], 400)
    sizes = {"width": 32, "depth": 2, "heads": 4}
    config: Any = DecoderConfig(vocab_size=tokenizer.backend.get_vocab_size(), **sizes)
    if decoder == "prefix":
        config, tokenizer = new_decoder(tokenizer, **sizes)
    encoder = load_encoder(save_vit(folder.with_name(f"{folder.name}-vit")))
    # Saving the encoder has changed the random state.
    torch.manual_seed(seed)
    settings = {"prompts": prompts, "eos_id": tokenizer.eos_id, "max_caption_tokens": max_caption_tokens}
    captioner = build_captioner(encoder, config, **settings)
    strengthen(captioner, strength)
    folder.mkdir()
    Checkpoint(captioner, tokenizer).save(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    return Captioner.from_pretrained(save_captioner(tmp_path_factory.mktemp("models") / "c"), device="cpu")


def test_pil_image_path_and_bytes_give_the_same_caption(captioner: Captioner, tmp_path: Path) -> None:
    image = photo(3).convert("RGB")
    path = tmp_path / "a.png"
    image.save(path)
    texts = captioner.caption([image, path, str(path), path.read_bytes()])
    assert len({*texts}) == 1 and texts[0]
    assert captioner.caption(image) == texts[:1]
    assert image.size == photo(3).size


def test_text_depends_on_style_and_question_and_beams(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [photo(number) for number in range(6)]
    assert captioner.styles == ["brief", "detailed"]
    assert captioner.usual_style == "brief"
    texts = [captioner.caption(images, style=style) for style in (None, "brief", "detailed")]
    assert texts[0] == texts[1] != texts[2]
    assert captioner.caption(images, question="How many?") != texts[0]
    beams = captioner.caption(images, num_beams=3)
    assert beams != texts[0]
    config = captioner.checkpoint.captioner.config
    monkeypatch.setitem(config.data, "decoding", {"num_beams": 3})
    assert captioner.usual_beams == 3 and captioner.caption(images) == beams
    with pytest.raises(TrainError, match="was not trained on the style poem"):
        captioner.caption(images, style="poem")


def test_rotated_photo_is_captioned_upright(captioner: Captioner, tmp_path: Path) -> None:
    upright, exif = photo(5).convert("RGB").crop((0, 0, 96, 64)), Image.Exif()
    # EXIF orientation 6: rotate by 90 degrees clockwise.
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    texts = captioner.caption([tmp_path / "a.png", Image.open(tmp_path / "a.png")])
    assert texts == captioner.caption(upright) * 2


def test_batch_size_does_not_change_captions_and_few_images_are_read_ahead(captioner: Captioner) -> None:
    read: list[int] = []

    def images() -> Iterator[tuple[int, Image.Image]]:
        for number in range(40):
            read.append(number)
            yield number, photo(number)

    stream = captioner.stream(images(), batch_size=4)
    first = next(stream)
    assert len(read) <= 4
    texts_of = dict([first, *stream])
    assert [*texts_of] == [*range(40)] == read
    captions = captioner.caption([photo(number) for number in range(40)], batch_size=32)
    assert [text for texts in texts_of.values() if isinstance(texts, list) for text in texts] == captions


@pytest.mark.parametrize("bad", [b"no image", "gone.png"])
def test_unreadable_image_does_not_prevent_captions_of_other_images(captioner: Captioner, bad: Any) -> None:
    texts = dict(captioner.stream([(0, photo(0)), (1, bad), (2, photo(1))]))
    assert isinstance(texts[1], ImageError) and isinstance(texts[0], list) and isinstance(texts[2], list)
    assert texts[0] + texts[2] == captioner.caption([photo(0), photo(1)])
    with pytest.raises(TrainError, match="cannot read image 1"):
        captioner.caption([photo(0), bad])


def test_image_may_change_after_it_was_passed(captioner: Captioner, tmp_path: Path) -> None:
    """A generator may close an image, or select the next frame of an animation."""
    images = [photo(number).convert("RGB") for number in range(5)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    texts = captioner.caption(images)
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:])

    def opened() -> Iterator[Image.Image]:
        for number in range(5):
            with Image.open(tmp_path / f"{number}.png") as image:
                yield image

    assert captioner.caption(opened(), batch_size=2) == texts
    with Image.open(tmp_path / "a.png") as animation:
        assert captioner.caption(ImageSequence.Iterator(animation), batch_size=2) == texts


def test_caption_from_a_question_only_captioner_or_batch_size_0_is_refused(
    captioner: Captioner, tmp_path: Path
) -> None:
    asked = Captioner.from_pretrained(save_captioner(tmp_path / "c", [("synthetic", "")]), device="cpu")
    with pytest.raises(TrainError, match="was trained only on questions"):
        asked.caption(photo(1))
    assert len(asked.caption(photo(1), question="How many?")) == 1
    for options in ({"batch_size": 0}, {"num_beams": 0}):
        with pytest.raises(TrainError, match="must be 1 or more"):
            captioner.caption(photo(1), **options)  # type: ignore[arg-type]


def test_missing_captioner_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainError, match="it lacks config"):
        Captioner.from_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    problem = r"me/nope is not a local folder; the Hub .* does not answer, and me/nope is not in the cache"
    with pytest.raises(TrainError, match=problem):
        Captioner.from_pretrained("me/nope")
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = trainer.Nothing


def test_known_caption_styles_equal_built_in_prompt_styles() -> None:
    assert {*STYLES} == {HUMAN, *built_in.STYLES}
