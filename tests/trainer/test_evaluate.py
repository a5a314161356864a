"""Evaluation: the choice of references, shuffled images, VQA accuracy and CLIPScore."""

import random
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from examples.scenes.train_clip import build_model, build_processor, train_tokenizer
from pipeline.cli.output import print_scores
from pipeline.errors import EngineError, TrainError
from pipeline.images.clip import ClipScorer
from pipeline.scenes.scene import draw, sample_scene
from pipeline.scenes.text import caption
from tests.trainer.tiny_models import save_clip
from trainer.data import Example, Question
from trainer.evaluate import choose_references, clip_scores, is_own_encoder, vqa_accuracy
from trainer.metrics import bootstrap, derangement, score_each
from trainer.tokenizer import TargetText, scored_prompt


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_derangement_moves_every_image(count: int) -> None:
    names = [f"image {number}" for number in range(count)]
    order = derangement(names)
    assert sorted(order) == list(range(count))
    assert all(image != index for index, image in enumerate(order))
    reversed_names = names[::-1]
    reversed_order = derangement(reversed_names)
    partners = {name: names[other] for name, other in zip(names, order, strict=True)}
    assert partners == {reversed_names[n]: reversed_names[other] for n, other in enumerate(reversed_order)}


def example(references: tuple[str, ...], style: str = "brief") -> Example:
    texts = (TargetText("synthetic", "A ring.", style=style),)
    return Example(sample_id="x", image=b"", texts=texts, references=references)


def test_teacher_captions_become_references_only_if_there_are_no_human_references() -> None:
    examples = [example(("A circle.", "One circle.")), example(())]
    human = ("references of the source", examples[:1], [["A circle.", "One circle."]])
    assert choose_references(examples, "brief") == human
    bare = [example(()), example((), style="detailed"), example(())]
    teacher = ("captions of the teacher", [bare[0], bare[2]], [["A ring."], ["A ring."]])
    assert choose_references(bare, "brief") == teacher
    with pytest.raises(TrainError, match="no held-out image has a reference or a brief caption"):
        choose_references(bare[1:2], "brief")


def test_human_brief_captions_are_scored_if_the_captioner_was_trained_on_them() -> None:
    both = [("human", "brief"), ("synthetic", "brief"), ("synthetic", "detailed")]
    assert scored_prompt(both) == ("human", "brief")
    assert scored_prompt(both, "detailed") == ("synthetic", "detailed")
    assert scored_prompt([("synthetic", "detailed")]) == ("synthetic", "detailed")
    assert scored_prompt([("synthetic", "detailed"), ("synthetic", "plain")]) == ("synthetic", "plain")


@pytest.mark.parametrize(("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_follows_the_official_rule(agree: int, score: float) -> None:
    """The score is a mean: if 3 of 10 annotators agree, it is (7 x 1 + 3 x 2/3) / 10."""
    truth = Question("?", ("a red cat",) * agree + ("dog",) * (10 - agree), "other")
    assert vqa_accuracy("Red cat.", truth) == pytest.approx(score)


@pytest.mark.parametrize(("differs", "is_told"), [(True, False), (False, True)])
def test_captioner_that_ignores_its_images_is_reported(
    *, differs: bool, is_told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"thing{n} stands near wall{n}".split() for n in range(40)]
    captions = words if differs else [words[0]] * 40
    shuffled = [captions[index] for index in derangement([*map(str, range(40))])]
    references = [[text] for text in words]
    own, other = score_each(captions, references), score_each(shuffled, references)
    gains = [a - b for a, b in zip(own["cider_d"], other["cider_d"], strict=True)]
    gain = bootstrap({"cider_d": gains})
    metrics = {"split": "test", "images": 40, "style": "brief", "against": "references", "num_beams": 1}
    print_scores(metrics | {"scores": {}, "intervals": {}, "shuffled_scores": {}, "gain": gain})
    assert ("this captioner ignores its images" in capsys.readouterr().err) == is_told
    assert (gain["cider_d"][0] > 0) == differs


SCENES = [sample_scene(random.Random(seed)) for seed in range(5)]
TEXTS = [caption(scene, "detailed") for scene in SCENES]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, tokenizer = tmp_path_factory.mktemp("clip"), train_tokenizer(TEXTS)
    torch.manual_seed(0)
    build_model(tokenizer).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return str(folder)


def test_clip_score_is_the_clipped_cosine_times_2_5(clip: str) -> None:
    images = [draw(scene, random.Random(0)) for scene in SCENES]
    backwards = [4, 3, 2, 1, 0]
    scores, shuffled = clip_scores(clip, iter(images), TEXTS, range(5), backwards)
    model = CLIPModel.from_pretrained(clip).eval()
    from transformers import CLIPProcessor

    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    inputs = CLIPProcessor.from_pretrained(clip)(text=TEXTS, images=images, **options)
    with torch.inference_mode():
        out = model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")})
    texts = (out.text_embeds, out.text_embeds[backwards])
    expected, expected_shuffled = (2.5 * (out.image_embeds * text).sum(-1) for text in texts)
    assert scores == pytest.approx(expected.clamp(min=0).tolist(), abs=1e-5)
    assert shuffled == pytest.approx(expected_shuffled.clamp(min=0).tolist(), abs=1e-5) and shuffled != scores
    assert min(scores) >= 0


def test_encoder_of_the_captioner_is_recognized_by_name_id_and_folder(clip: str) -> None:
    assert is_own_encoder("clip", {"name": "clip"})
    assert is_own_encoder("openai/clip-vit-base-patch32", {"name": "openai/clip-vit-base-patch32"})
    assert is_own_encoder(clip, {"name": Path(clip).name})
    assert not is_own_encoder("metaclip", {"name": "clip"})


def test_clip_needs_its_tokenizer_and_cuts_long_texts(clip: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="it has no tokenizer"):
        ClipScorer(save_clip(tmp_path / "clip"))
    assert len(ClipScorer(clip).text_states(["word " * 500])) == 1
