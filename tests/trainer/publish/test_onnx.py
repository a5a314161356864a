"""An exported captioner runs without torch, and generates the tokens of the original."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.export import Dim
from transformers import CLIPImageProcessor

from pipeline.errors import TrainError
from pipeline.images.decode import prepare_image
from pipeline.progress import NullProgress
from tests.pipeline.images.test_similarity import photo
from tests.trainer.model.test_language_model import FAMILIES
from tests.trainer.test_captioner import save_captioner
from tests.trainer.tiny_models import save_language_model, save_vit, strengthen
from trainer.model.caption_model import build_captioner
from trainer.model.checkpoint import Checkpoint, load_checkpoint
from trainer.model.decoding import GREEDY
from trainer.model.encoder import load_encoder
from trainer.model.language_model import PretrainedDecoder, load_decoder
from trainer.publish import onnx_export, run_onnx
from trainer.publish.onnx_export import export_onnx
from trainer.tokenizer import CaptionTokenizer, TargetText

IMAGES = 100
QUESTION = "How many?"
SCRIPT = """
import json, sys
sys.path += [*sys.argv[1].split(":"), sys.argv[2]]
from pathlib import Path
from caption import OnnxCaptioner

folder, photos = Path(sys.argv[2]), sys.argv[3:]
captioner = OnnxCaptioner(folder)
pixels = captioner.prepare(photos)
outputs = {
    "tokens": captioner.tokens(pixels, captioner.prompt("")),
    "detailed": captioner.tokens(pixels[:8], captioner.prompt("detailed")),
    "answers": captioner.tokens(pixels[:8], captioner.prompt("How many?")),
    "texts": captioner.caption(photos[:3]),
    "heavy": [name for name in ("torch", "transformers", "trainer") if name in sys.modules],
}
json.dump(outputs, sys.stdout)
"""
PROMPTS = [("human", "brief"), ("synthetic", "brief"), ("synthetic", "detailed"), ("synthetic", "")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("models") / "c", layer=-2, states="2x2", seed=6)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "c"
    files = export_onnx(checkpoint, out, NullProgress())
    assert files.keys() == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return photos in the size of the encoder, because libraries resize differently.

    The last two are copies of the first two, one with an EXIF orientation, one with transparency.
    """
    folder = tmp_path_factory.mktemp("photos")
    images = [photo(number).convert("RGB").resize((28, 28)) for number in range(IMAGES)]
    transparent, exif = images[1].convert("RGBA"), Image.Exif()
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    exif[0x0112] = 6
    for number, image in enumerate([*images, images[0], transparent]):
        image.save(folder / f"{number:03}.png", exif=exif if number == IMAGES else Image.Exif())
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def outputs(exported: Path, photos: list[Path]) -> dict[str, Any]:
    return run_exported(exported, photos)


def run_exported(exported: Path, photos: list[Path]) -> dict[str, Any]:
    """Return the outputs of an exported captioner in a process without this package and torch."""
    packages = ":".join(path for path in sys.path if path.endswith("site-packages"))
    arguments = [packages, str(exported), *map(str, photos)]
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    outputs: dict[str, Any] = json.loads(done.stdout)
    return outputs


def require_same(outputs: dict[str, Any], checkpoint: Path, photos: list[Path], distinct: int) -> None:
    """Require the tokens of PyTorch, and a number of distinct texts, so that the images matter."""
    loaded = load_checkpoint(checkpoint, torch.device("cpu"))

    def generate(
        count: int, style: str = "", question: str = "", source: str = "synthetic"
    ) -> list[list[int]]:
        prompt = loaded.tokenizer.prompt(TargetText(source, "", style=style, question=question))
        with torch.inference_mode():
            images = [prepare_image(path.read_bytes()) for path in photos[:count]]
            states = loaded.captioner.encoder(loaded.captioner.encoder.pixels(images))
        return loaded.captioner.generate(states, torch.tensor(prompt).expand(count, -1), GREEDY)

    prompts = [tuple(prompt) for prompt in loaded.captioner.config.prompts]
    source = "human" if ("human", "brief") in prompts else "synthetic"
    brief = generate(len(photos), "brief", source=source)
    assert outputs["heavy"] == []
    assert outputs["tokens"] == brief
    assert len({tuple(row) for row in brief}) >= distinct
    assert outputs["detailed"] == generate(8, "detailed")
    assert outputs["answers"] == generate(8, question=QUESTION)
    assert outputs["texts"] == [loaded.tokenizer.decode(ids) for ids in brief[:3]]


def test_exported_captioner_without_torch_generates_the_tokens_of_pytorch(
    checkpoint: Path, outputs: dict[str, Any], photos: list[Path]
) -> None:
    require_same(outputs, checkpoint, photos, distinct=IMAGES // 4)


def test_rotated_or_transparent_photo_changes_the_caption(outputs: dict[str, Any]) -> None:
    assert outputs["tokens"][IMAGES] != outputs["tokens"][0]
    assert outputs["tokens"][IMAGES + 1] != outputs["tokens"][1]


@pytest.mark.parametrize("size", [(277, 277), (107, 300), (500, 110), (640, 480)])
def test_shortest_edge_resize_matches_transformers(size: tuple[int, int]) -> None:
    """With one pixel less, the crop would contain a black line."""
    steps = {"do_center_crop": False, "do_rescale": False, "do_normalize": False}
    processor = CLIPImageProcessor(size={"shortest_edge": 224}, **steps)
    height, width = processor(Image.new("RGB", size), return_tensors="np")["pixel_values"].shape[2:]
    assert run_onnx._target_size(Image.new("RGB", size), {"shortest_edge": 224}) == (width, height)


def test_exported_files_have_no_local_paths(exported: Path) -> None:
    private = (b"trainer/", b"site-packages", str(Path.home()).encode() + b"/")
    for path in exported.rglob("*.onnx"):
        data = path.read_bytes()
        assert not [name for name in private if name in data], path


def save_prefix_captioner(root: Path, decoder: PretrainedDecoder, tokenizer: CaptionTokenizer) -> Path:
    """Save a captioner with a language model with random weights, which reads the image as a prefix."""
    encoder, eos_id = load_encoder(save_vit(root / "vit")), tokenizer.eos_id
    captioner = build_captioner(
        encoder, decoder, prompts=PROMPTS, eos_id=eos_id, max_caption_tokens=8, data={}
    )
    strengthen(captioner, 8)
    (root / "c").mkdir()
    Checkpoint(captioner, tokenizer).save(root / "c")
    return root / "c"


def test_export_of_language_model_is_refused(tmp_path: Path) -> None:
    decoder = PretrainedDecoder({"model_type": "lfm2", **FAMILIES["lfm2"][0], "vocab_size": 258})
    _, tokenizer = load_decoder(save_language_model(tmp_path / "lm", "llama"))
    checkpoint = save_prefix_captioner(tmp_path, decoder, tokenizer)
    with pytest.raises(TrainError, match="does not support language models"):
        export_onnx(checkpoint, tmp_path / "out", NullProgress())
    assert not (tmp_path / "out").exists()


def test_export_whose_outputs_differ_from_pytorch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "MAX_DIFFERENCE", -1.0)
    part, path, shapes = nn.Linear(2, 3).eval(), tmp_path / "encoder_model", [{0: Dim("batch_size")}]
    with pytest.raises(
        TrainError, match=r"last_hidden_state in encoder_model\.onnx differ from those of PyTorch"
    ):
        onnx_export._export(part, (torch.ones(2, 2),), path, ["pixel_values"], ["last_hidden_state"], shapes)


def test_export_to_existing_folder_or_without_package_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainError, match="already exists"):
        export_onnx(checkpoint, tmp_path, NullProgress())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(TrainError, match="the export needs the package onnxscript"):
        export_onnx(checkpoint, tmp_path / "out", NullProgress())
    assert list(tmp_path.iterdir()) == []
