"""Families of models: what a photo costs is what transformers' own processors make of it, and names are recognized."""

from collections.abc import Callable
from math import ceil
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor

from pipeline.config.files import resolve
from pipeline.executors.messages import describe_boxes
from pipeline.inference.families import FAMILIES, PHOTO_PX, find_family

WIDTH, HEIGHT = PHOTO_PX
PHOTO = Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8))


def grid_tokens(patch_px: int, least: int, most: int) -> int:
    """Return the tokens of Qwen's processor, which merges 2 x 2 patches, with bounds on the area in pixels."""
    size = {"shortest_edge": least, "longest_edge": most}
    processor = transformers.Qwen2VLImageProcessor(patch_size=patch_px, merge_size=2, size=size)
    return int(processor(images=[PHOTO], return_tensors="pt")["image_grid_thw"].prod()) // 4


def tiles(processor: Any, images: Any = None) -> int:
    pixels = processor(images=images or [[PHOTO]], return_tensors="pt")["pixel_values"]
    return int(pixels.shape[1] if pixels.dim() == 5 else pixels.shape[0])


def idefics(longest_px: int, tile_px: int) -> Any:
    return transformers.Idefics3ImageProcessor(size={"longest_edge": longest_px}, max_image_size={"longest_edge": tile_px})


def internvl_tiles() -> int:
    size = {"height": 448, "width": 448}
    processor = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=12)
    return tiles(processor, [PHOTO])


def gemma4_tokens() -> int:
    processor: Any = Gemma4ImageProcessor
    return int(processor()(images=[PHOTO], return_tensors="pt")["num_soft_tokens_per_image"][0])


def onevision_tokens() -> int:
    """Return the tokens of the whole photo, and of its tiles without their padding, with one for each row of these."""
    side = 27  # tokens of a tile
    assert tiles(transformers.LlavaOnevisionImageProcessor(), [PHOTO]) == 1 + 2 * 2
    rows = 2 * side - 2 * ((2 * side - HEIGHT * 2 * side // WIDTH) // 2)
    return side**2 + rows * (2 * side + 1)


TOKENS: dict[str, Callable[[], int]] = {
    "Qwen2.5-VL": lambda: grid_tokens(14, 4 * 28**2, 16_384 * 28**2),
    "Qwen3-VL": lambda: grid_tokens(16, 64 * 32**2, 16_384 * 32**2),
    "InternVL3": lambda: 256 * internvl_tiles(),
    "SmolVLM small": lambda: 64 * tiles(idefics(2048, 512)),
    "SmolVLM 2.2B": lambda: 81 * tiles(idefics(1536, 384)),
    "Idefics3": lambda: 169 * tiles(idefics(1456, 364)),
    "Gemma 3": lambda: transformers.Gemma3Config().mm_tokens_per_image or 0,
    "Gemma 4": gemma4_tokens,
    "LLaVA-OneVision": onevision_tokens,
    "Pixtral": lambda: ceil(HEIGHT / 16) * (ceil(WIDTH / 16) + 1),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_photo_has_as_many_tokens_as_the_processor_makes_of_it(family: Any) -> None:
    assert family.photo_tokens == TOKENS[family.name]()


def test_models_are_known_by_their_names_and_no_other_is() -> None:
    for family in FAMILIES:
        assert {find_family(model) for model in family.models} == {family}
    served = {
        "qwen2.5vl:3b": "Qwen2.5-VL", "Qwen2.5-VL-7B-Instruct-AWQ": "Qwen2.5-VL", "qwen/qwen3-vl-8b-instruct": "Qwen3-VL",
        "models/gemma-3-27b-it": "Gemma 3", "gemma3:4b": "Gemma 3", "unsloth/gemma-4-26B-A4B-it-GGUF": "Gemma 4",
        "/models/Qwen3-VL-4B/": "Qwen3-VL", "gpt-5": None, "tiny": None, "google/gemma-3n-E4B-it": None,
        "google/paligemma-3b-mix-448": None, "google/medgemma-4b-it": None, "google/gemma-3-270m": None,
        "mistralai/Pixtral-Large-Instruct-2411": None, "/data/qwen3-vl-exp/llama": None, "OpenGVLab/InternVL3_5-8B": None,
        "llava-hf/llava-onevision-qwen2-72b-ov-hf": None,
    }  # fmt: skip
    found = {name: find_family(name) for name in served}
    assert {name: family and family.name for name, family in found.items()} == served


def test_a_run_says_so_if_its_model_writes_boxes_in_another_unit() -> None:
    task = {"name": "things", "kind": "boxes", "prompt": "Find things."}
    config = resolve(source="folder:x", own_tasks=[task])
    (note,) = describe_boxes(config, "Qwen/Qwen3-VL-8B-Instruct")
    assert "Qwen3-VL writes boxes in thousandths, and the task things reads them as pixels" in note
    assert not [*describe_boxes(config, "Qwen/Qwen2.5-VL-3B-Instruct"), *describe_boxes(config, "gpt-5")]
    assert not [*describe_boxes(resolve(source="folder:x"), "Qwen/Qwen3-VL-8B-Instruct")]
    right = resolve(source="folder:x", own_tasks=[task | {"coordinates": "thousandths"}])
    assert not [*describe_boxes(right, "Qwen/Qwen3-VL-8B-Instruct")]
