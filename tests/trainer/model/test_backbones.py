"""Backbones of many families with random weights: trained, saved, loaded, and run by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from tests.pipeline.images.test_similarity import photo
from tests.trainer.model.test_transformers_model import load_with_transformers
from trainer.captioner import Captioner
from trainer.config import resolve
from trainer.model.encoder import load_encoder
from trainer.training import train_captioner

IMAGES = 12
HIERARCHY: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48]}
# The model types of transformers with the settings of a small model, the side of its images, and its states.
TRANSFORMERS: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    "resnet": (HIERARCHY | {"embedding_size": 16, "layer_type": "basic"}, 96, (9, 48)),
    "convnext": (HIERARCHY, 96, (9, 48)),
    "mobilenet_v2": ({"depth_multiplier": 0.35, "tf_padding": False}, 96, (9, 1280)),
    "efficientnet": ({"width_coefficient": 0.3, "depth_coefficient": 0.3, "hidden_dim": 384}, 96, (9, 384)),
    "regnet": (HIERARCHY | {"embedding_size": 16, "groups_width": 8}, 96, (9, 48)),
    "swin": ({"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "image_size": 64,
              "window_size": 2}, 64, (4, 96)),
}  # fmt: skip
TIMM = {
    "resnet10t": (9, 512),
    "convnext_atto": (9, 320),
    "mobilenetv3_small_050": (9, 288),
    "tf_efficientnet_lite0": (9, 1280),
    "regnetx_002": (9, 368),
    "test_vit": (101, 64),
}


def save_transformers_model(kind: str, folder: Path) -> None:
    settings, side_px, _ = TRANSFORMERS[kind]
    config = transformers.AutoConfig.for_model(kind, **settings)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    size = {"height": side_px, "width": side_px}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)


def save_timm_model(architecture: str, folder: Path) -> None:
    """Save a model as timm does, with images of 96 x 96 pixels."""
    model: Any = timm.create_model(architecture, pretrained=False)
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    size = model.default_cfg["input_size"] if architecture == "test_vit" else (3, 96, 96)
    settings = model.default_cfg | {"input_size": size}
    config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(config, default=str))


@pytest.mark.parametrize("name", [*TRANSFORMERS, *(f"timm/{name}" for name in TIMM)])
def test_backbone_is_trained_saved_and_loaded_with_the_same_tokens(
    name: str, version: Version, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "encoder"
    if architecture := name.partition("timm/")[2]:
        save_timm_model(architecture, folder)
        states = TIMM[architecture]
    else:
        save_transformers_model(name, folder)
        states = TRANSFORMERS[name][2]
    small = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "vocab_size": 400}
    options: dict[str, Any] = {"steps": 20, "batch_size": 4, "evaluations": 1, "evaluate_images": 4, **small}
    config = resolve(encoder=str(folder), text_source="mixed", **options)
    out = tmp_path / "captioner"
    metrics = train_captioner(version, config, out)
    assert metrics["settings"]["steps"] == 20

    captioner = Captioner.from_pretrained(out, "cpu")
    images = [photo(number).resize((90 + 8 * number, 80)) for number in range(IMAGES)]
    pixels_BCHW = torch.stack([captioner.prepare(image) for image in images])  # type: ignore[misc]
    encoder = captioner.checkpoint.captioner.encoder
    assert encoder(pixels_BCHW[:2]).shape == (2, *states)
    torch.testing.assert_close(encoder(pixels_BCHW), load_encoder(str(folder))(pixels_BCHW))
    decoding = captioner.decoding(captioner.usual_beams)
    rows = captioner.write(pixels_BCHW, [captioner.prompt()] * len(images), decoding)
    assert any(rows)
    model, processor = load_with_transformers(out)
    inputs = processor(images=images, text="", return_tensors="pt")
    tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    eos_id = captioner.checkpoint.captioner.config.eos_id
    assert [row[: row.index(eos_id)] if eos_id in row else row for row in tokens] == rows


@pytest.mark.parametrize("architecture", ["hf-hub:someone/model", "local-dir:/tmp/model"])
def test_timm_name_that_is_no_architecture_is_refused(architecture: str, tmp_path: Path) -> None:
    """Such names make timm download a model, or read another folder."""
    save_timm_model("resnet10t", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    changes = {"model_type": "timm_wrapper", "architecture": architecture}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(TrainError, match="timm has no model architecture"):
        load_encoder(str(tmp_path))


def test_argument_of_a_timm_model_that_names_a_file_is_ignored(tmp_path: Path) -> None:
    save_timm_model("resnet10t", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    arguments = {"checkpoint_path": str(tmp_path / "other.pth"), "pretrained": "yes"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": arguments}))
    assert load_encoder(str(tmp_path)).config.model["model_args"] == {}
