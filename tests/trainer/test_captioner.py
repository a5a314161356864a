"""`Captioner`: any kind of image gives the same caption, in order, with a few batches in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import trainer
from pipeline.errors import ImageError, TrainError
from pipeline.tables import HUMAN
from pipeline.tasks import prompts as built_in
from tests.pipeline.images.test_similarity import photo
from tests.trainer.tiny_models import save_vit, strengthen
from trainer import Captioner
from trainer.captioner import PREPARED_BATCHES
from trainer.model.caption_model import build_captioner
from trainer.model.checkpoint import Checkpoint
from trainer.model.decoder import DecoderConfig
from trainer.model.encoder import load_encoder
from trainer.tokenizer import STYLES, TargetText, choose_prompt, train_tokenizer

PROMPTS = [("synthetic", "brief"), ("synthetic", "detailed"), ("synthetic", "")]


def save_captioner(folder: Path, prompts: list[tuple[str, str]] = PROMPTS, seed: int = 4, **encoder_options: Any) -> Path:
    """Save a captioner with random weights, strong enough for its texts to differ from image to image."""
    texts = [TargetText(source, f"A dog, number {n}.", style=style) for n in range(30) for source, style in prompts if style]
    tokenizer = train_tokenizer([*texts, TargetText("synthetic", "two", question="How many?")], 400)
    decoder = DecoderConfig(vocab_size=tokenizer.backend.get_vocab_size(), width=32, depth=2, heads=4)
    encoder = load_encoder(save_vit(folder.with_name(f"{folder.name}-vit")), **encoder_options)
    torch.manual_seed(seed)  # saving the encoder has set another
    captioner = build_captioner(encoder, decoder, prompts=prompts, eos_id=tokenizer.eos_id, max_caption_tokens=8, data={})
    strengthen(captioner, 6)
    folder.mkdir()
    Checkpoint(captioner, tokenizer).save(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    return Captioner.from_pretrained(save_captioner(tmp_path_factory.mktemp("models") / "c"), device="cpu")


def test_every_kind_of_image_gives_the_same_caption(captioner: Captioner, tmp_path: Path) -> None:
    image = photo(3).convert("RGB")
    image.save(tmp_path / "a.png")
    texts = captioner.caption([image, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()])
    assert len({*texts}) == 1 and texts[0]
    assert captioner.caption(image) == texts[:1]
    assert image.size == photo(3).size  # what was given is as it was


def test_styles_questions_and_beams_are_those_that_it_has_learned(captioner: Captioner) -> None:
    images = [photo(number) for number in range(6)]
    assert (captioner.styles, captioner.usual_style, captioner.answers) == (["brief", "detailed"], "brief", True)
    texts = [captioner.caption(images, style=style) for style in (None, "brief", "detailed")]
    assert texts[0] == texts[1] != texts[2]
    assert captioner.caption(images, question="How many?") != texts[0]
    assert captioner.caption(images, num_beams=3) != texts[0]
    with pytest.raises(TrainError, match="knows no style poem"):
        captioner.caption(images, style="poem")


def test_a_photo_that_lies_on_its_side_is_captioned_upright(captioner: Captioner, tmp_path: Path) -> None:
    upright, exif = photo(5).convert("RGB").crop((0, 0, 96, 64)), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    assert captioner.caption([tmp_path / "a.png", Image.open(tmp_path / "a.png")]) == captioner.caption(upright) * 2


def test_batches_make_no_difference_and_few_images_are_read_ahead(captioner: Captioner) -> None:
    read: list[int] = []

    def images() -> Iterator[tuple[int, Image.Image]]:
        for number in range(40):
            read.append(number)
            yield number, photo(number)

    stream = captioner.stream(images(), batch_size=4)
    first = next(stream)
    assert len(read) <= 4 * (PREPARED_BATCHES + 1)
    told = dict([first, *stream])
    assert [*told] == [*range(40)] == read
    assert [text for texts in told.values() if isinstance(texts, list) for text in texts] == captioner.caption(
        [photo(number) for number in range(40)], batch_size=32
    )


@pytest.mark.parametrize("bad", [b"no image", "gone.png"])
def test_what_is_no_image_is_named_and_stops_no_other(captioner: Captioner, bad: Any) -> None:
    told = dict(captioner.stream([(0, photo(0)), (1, bad), (2, photo(1))]))
    assert isinstance(told[1], ImageError) and isinstance(told[0], list) and isinstance(told[2], list)
    assert told[0] + told[2] == captioner.caption([photo(0), photo(1)])
    with pytest.raises(TrainError, match="cannot read image 1"):
        captioner.caption([photo(0), bad])


def test_one_opened_image_may_come_several_times(captioner: Captioner, tmp_path: Path) -> None:
    """Pillow reads an image when its pixels are wanted, and two threads must not do that at once."""
    photo(2).convert("RGB").resize((900, 900)).save(tmp_path / "a.jpg")
    texts = captioner.caption([Image.open(tmp_path / "a.jpg")] * 8, batch_size=3)
    opened = Image.open(tmp_path / "a.jpg")
    assert captioner.caption([opened] * 8, batch_size=3) == texts == captioner.caption(tmp_path / "a.jpg") * 8


def test_a_captioner_of_answers_alone_and_odd_numbers_are_one_error(captioner: Captioner, tmp_path: Path) -> None:
    asked = Captioner.from_pretrained(save_captioner(tmp_path / "c", [("synthetic", "")]), device="cpu")
    with pytest.raises(TrainError, match="has learned answers alone"):
        asked.caption(photo(1))
    assert len(asked.caption(photo(1), question="How many?")) == 1
    for options in ({"batch_size": 0}, {"num_beams": 0}):
        with pytest.raises(TrainError, match="are 1 or more"):
            captioner.caption(photo(1), **options)  # type: ignore[arg-type]


def test_a_captioner_that_is_not_there_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainError, match="it lacks config"):
        Captioner.from_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TrainError, match=r"me/nope is not a folder here; the Hub .* does not answer, and me/nope is not in the cache"
    ):
        Captioner.from_pretrained("me/nope")
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = trainer.Nothing


def test_texts_are_searched_as_they_were_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = Captioner.from_pretrained(save_captioner(tmp_path / "c"), device="cpu")
    images = [photo(number) for number in range(6)]
    greedy, searched = captioner.caption(images), captioner.caption(images, num_beams=3)
    assert greedy != searched
    monkeypatch.setitem(captioner.checkpoint.captioner.config.data, "num_beams", 3)
    assert captioner.caption(images) == searched
    assert captioner.caption(images, num_beams=1) == greedy


@pytest.mark.parametrize("prompts", [PROMPTS, [("human", "brief")], [("synthetic", "")]])
def test_the_name_of_a_style_that_was_not_learned_is_no_question(prompts: list[tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match="knows no style tags"):
        choose_prompt(prompts, "tags")
    if ("synthetic", "") in prompts:
        assert choose_prompt(prompts, "tags?") == ("synthetic", "", "tags?")


def test_the_usual_styles_are_those_of_the_built_in_prompts() -> None:
    assert {*STYLES} == {HUMAN, *built_in.STYLES}
