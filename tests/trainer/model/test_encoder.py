"""Encoders: hidden states of the requested layer, with the image preprocessing of the checkpoint."""

import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from pipeline.errors import TrainError
from tests.trainer.tiny_models import SIDE_PX, TOWER, save_clip, save_vit
from trainer.model.encoder import choose_states, load_encoder, patch_grid


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vit(tmp_path_factory.mktemp("vit"))


def test_encoder_states_equal_transformers_states(clip: str, vit: str) -> None:
    for folder, model_class in ((clip, transformers.CLIPVisionModel), (vit, transformers.ViTModel)):
        reference = model_class.from_pretrained(folder)
        encoder = load_encoder(folder, frozen=False)
        pixels = encoder.pixels([picture(1), picture(2)])
        assert pixels.shape == (2, 3, SIDE_PX, SIDE_PX)
        reference.train(mode=False)
        expected = reference(pixels, output_hidden_states=True)
        torch.testing.assert_close(encoder.eval()(pixels), expected.last_hidden_state)


def test_frozen_encoder_has_no_dropout_in_training_mode(tmp_path: Path) -> None:
    folder = save_vit(tmp_path, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    frozen, learning = load_encoder(folder), load_encoder(folder, frozen=False)
    pixels = frozen.pixels([Image.new("RGB", (40, 30), "green")])
    with torch.no_grad():
        fresh, trained = frozen(pixels), frozen.train()(pixels)
        assert torch.equal(fresh, trained) and not frozen.tower.training
        assert not torch.equal(learning.train()(pixels), learning(pixels))


def test_encoder_that_masks_patches_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(**TOWER, image_size=112, patch_size=14, mask_ratio=0.5)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 112, "width": 112}).save_pretrained(tmp_path)
    with pytest.raises(TrainError, match="returns different states for the same image"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize(("folder", "name"), [("clip", "clip/"), ("mine", "mine")])
def test_config_has_the_name_of_a_folder_but_no_path(folder: str, name: str, tmp_path: Path) -> None:
    """A folder that is named like a known encoder is recorded with a slash."""
    config = load_encoder(save_clip(tmp_path / folder)).config
    assert config.made_from["name"] == name and str(tmp_path) not in str(asdict(config))


def test_error_about_a_model_without_images_states_the_reason(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**TOWER, vocab_size=9)).save_pretrained(tmp_path / "bert")
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "bert")
    with pytest.raises(TrainError, match=r"cannot load encoder .*bert: ") as caught:
        load_encoder(str(tmp_path / "bert"))
    assert caught.value.hint.endswith("a folder or Hub id of a transformers or timm model")


def test_encoder_with_varying_image_sizes_is_refused(tmp_path: Path) -> None:
    """Otherwise, storing states would fail at the first photo that is not square."""
    folder = save_clip(tmp_path)
    size = {"shortest_edge": SIDE_PX}
    transformers.CLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(folder)
    with pytest.raises(TrainError, match="cannot be used as an encoder"):
        load_encoder(folder)


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (7, 7), (4, 6), (3, 9)])
def test_patches_are_averaged_2x2_and_other_tokens_stay(before: int, rows: int, columns: int) -> None:
    patches = torch.arange(rows * columns, dtype=torch.float32).view(1, -1, 1)
    tokens = torch.full((1, before, 1), -1.0)
    pixels = torch.zeros(1, 3, 16 * rows, 16 * columns)
    pooled = choose_states(torch.cat([tokens, patches], 1), "2x2", 1, pixels)
    starts = [(row, column) for row in range(0, rows, 2) for column in range(0, columns, 2)]
    assert pooled.shape == (1, before + len(starts), 1)
    assert pooled[0, :before].eq(-1).all()
    grid = patches.view(rows, columns)
    expected = [grid[row : row + 2, column : column + 2].mean() for row, column in starts]
    torch.testing.assert_close(pooled[0, before:, 0], torch.stack(expected))


@pytest.mark.parametrize("which", ["all", "2x2"])
def test_feature_maps_become_sequences(which: str) -> None:
    """Channels may come first, as in ResNet, or last, as in Swin of timm."""
    map_BVRC, pixels = torch.randn(2, 8, 4, 6), torch.zeros(2, 3, 128, 192)
    states_BNV = choose_states(map_BVRC, which, 8, pixels)
    assert torch.equal(states_BNV, choose_states(map_BVRC.permute(0, 2, 3, 1), which, 8, pixels))
    as_sequence = choose_states(map_BVRC.flatten(2).transpose(1, 2), which, 8, pixels)
    torch.testing.assert_close(states_BNV, as_sequence)
    torch.testing.assert_close(states_BNV.mean(1), map_BVRC.mean((2, 3)))
    with pytest.raises(ValueError, match=r"of shape \[2, 8, 4, 6\], not of width 5"):
        choose_states(map_BVRC, which, 5, pixels)


GRIDS = {
    (197, 224, 224): (1, 14, 14), (50, 224, 224): (1, 7, 7), (576, 336, 336): (0, 24, 24),
    (577, 336, 336): (1, 24, 24), (261, 256, 256): (5, 16, 16), (198, 224, 224): (2, 14, 14),
    (24, 256, 384): (0, 4, 6), (289, 384, 192): (1, 24, 12),
}  # fmt: skip


@pytest.mark.parametrize(("given", "grid"), GRIDS.items())
def test_patch_grid_follows_from_the_number_of_states(
    given: tuple[int, int, int], grid: tuple[int, int, int]
) -> None:
    assert patch_grid(*given) == grid
    with pytest.raises(ValueError, match="12 states do not form a grid"):
        patch_grid(12, 224, 224)
