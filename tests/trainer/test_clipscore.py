"""CLIPScore: scores follow the formula, and the captioner's own CLIP is recognized."""

import random
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from examples.scenes.train_clip import build_model, build_processor, train_tokenizer
from pipeline.errors import EngineError
from pipeline.images.clip import ClipScorer
from pipeline.scenes.scene import draw, sample_scene
from pipeline.scenes.text import caption
from tests.trainer.tiny_models import save_clip
from trainer.clipscore import clip_scores, is_own_encoder

SCENES = [sample_scene(random.Random(seed)) for seed in range(5)]
TEXTS = [caption(scene, "detailed") for scene in SCENES]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, tokenizer = tmp_path_factory.mktemp("clip"), train_tokenizer(TEXTS)
    torch.manual_seed(0)
    build_model(tokenizer).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return str(folder)


def test_a_score_is_two_and_a_half_times_the_cosine_clipped_at_zero(clip: str) -> None:
    images = [draw(scene, random.Random(0)) for scene in SCENES]
    backwards = [4, 3, 2, 1, 0]
    scores, shuffled = clip_scores(clip, iter(images), TEXTS, range(5), backwards)
    model = CLIPModel.from_pretrained(clip).eval()
    from transformers import CLIPProcessor

    inputs = CLIPProcessor.from_pretrained(clip)(text=TEXTS, images=images, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"])
    expected, expected_shuffled = (
        2.5 * (out.image_embeds * texts).sum(-1) for texts in (out.text_embeds, out.text_embeds[backwards])
    )
    assert scores == pytest.approx(expected.clamp(min=0).tolist(), abs=1e-5)
    assert shuffled == pytest.approx(expected_shuffled.clamp(min=0).tolist(), abs=1e-5) and shuffled != scores
    assert min(scores) >= 0


def test_an_encoder_does_not_judge_its_own_captions(clip: str) -> None:
    assert is_own_encoder("clip", {"name": "clip"})
    assert is_own_encoder("openai/clip-vit-base-patch32", {"name": "openai/clip-vit-base-patch32"})
    assert is_own_encoder(clip, {"name": Path(clip).name})
    assert not is_own_encoder("metaclip", {"name": "clip"})


def test_a_folder_without_a_clip_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no CLIP"):
        clip_scores(str(tmp_path), [], [])


def test_a_clip_without_its_tokenizer_is_refused_and_texts_are_cut_to_its_context(clip: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="it lacks its tokenizer"):
        ClipScorer(save_clip(tmp_path / "clip"))
    assert len(ClipScorer(clip).text_states(["word " * 500])) == 1
