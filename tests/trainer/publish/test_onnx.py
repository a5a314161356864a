"""An exported captioner runs without torch, and writes the tokens that it writes here."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import TrainError
from pipeline.images.decode import prepare_image
from pipeline.progress import NullProgress
from tests.hostile import LONG
from tests.pipeline.images.test_similarity import photo
from tests.trainer.model.test_language_model import FAMILIES
from tests.trainer.test_captioning import save_captioner
from tests.trainer.tiny_models import save_language_model, save_vit, strengthen
from trainer.checkpoint import Checkpoint, load_checkpoint
from trainer.model.captioner import build_captioner
from trainer.model.decoding import GREEDY
from trainer.model.encoder import load_encoder
from trainer.model.language_model import PretrainedDecoder, load_decoder, new_decoder
from trainer.publish import onnx
from trainer.publish.onnx import export_onnx
from trainer.tokenizer import CaptionTokenizer, TargetText, train_tokenizer

IMAGES = 100
QUESTION = "How many?"
SCRIPT = """
import json, sys
sys.path += [sys.argv[1], sys.argv[2]]
from pathlib import Path
from caption import OnnxCaptioner

folder, photos = Path(sys.argv[2]), sys.argv[4:]
captioner = OnnxCaptioner(folder)
pixels = captioner.prepare(photos)
found = {
    "tokens": captioner.tokens(pixels, captioner.prompt("")),
    "detailed": captioner.tokens(pixels[:8], captioner.prompt("detailed")),
    "answers": captioner.tokens(pixels[:8], captioner.prompt("How many?")),
    "texts": captioner.caption(photos[:3]),
    "heavy": [name for name in ("torch", "transformers", "trainer") if name in sys.modules],
}
if sys.argv[3] == "int8":
    small = OnnxCaptioner(folder, int8=True)
    found["int8"] = small.tokens(pixels, small.prompt(""))
json.dump(found, sys.stdout)
"""
# A window of 128 tokens, recurrent states, a convolution, positions in the scores.
REFUSED = ("gpt_oss", "qwen3_5_text", "qwen3_next", "lfm2", "mamba", "bloom")
PROMPTS = [("human", "brief"), ("synthetic", "brief"), ("synthetic", "detailed"), ("synthetic", "")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("models") / "c", layer=(-1, -2), states="2x2")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "c"
    files = export_onnx(checkpoint, out, NullProgress(), int8=True)
    assert files.keys() == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    for part in ("encoder_model", "decoder_model", "decoder_with_past_model"):
        assert 0 < files[f"onnx/{part}_quantized.onnx"] < files[f"onnx/{part}.onnx"]
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return photos of the size that the encoder wants: resizing is another library's."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        photo(number).convert("RGB").resize((28, 28)).save(folder / f"{number:03}.png")
    return sorted(folder.iterdir())


def run_exported(exported: Path, photos: list[Path], *, int8: bool = False) -> dict[str, Any]:
    """Return what an exported captioner writes in a process that has onnxruntime and not this package."""
    packages = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, packages, str(exported), "int8" if int8 else "", *map(str, photos)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def require_same(found: dict[str, Any], checkpoint: Path, photos: list[Path], different: int) -> None:
    """Require that an exported captioner has written what PyTorch writes, and so many texts: its images matter."""
    loaded = load_checkpoint(checkpoint, torch.device("cpu"))

    def ours(style: str, count: int, question: str = "", source: str = "synthetic") -> list[list[int]]:
        prompt = TargetText(source, "", style=style, question=question)
        with torch.inference_mode():
            images = [prepare_image(path.read_bytes()) for path in photos[:count]]
            states = loaded.captioner.encoder(loaded.captioner.encoder.pixels(images))
        return loaded.captioner.generate(states, torch.tensor(loaded.words.prompt(prompt)).expand(count, -1), GREEDY)

    source = "human" if ("human", "brief") in [tuple(prompt) for prompt in loaded.captioner.config.prompts] else "synthetic"
    assert found["heavy"] == []
    assert found["tokens"] == ours("brief", len(photos), source=source)
    assert len({tuple(row) for row in found["tokens"]}) >= different
    assert found["detailed"] == ours("detailed", 8)
    assert found["answers"] == ours("", 8, QUESTION)
    assert found["texts"] == [loaded.words.decode(ids) for ids in ours("brief", 3, source=source)]


def test_the_tokens_of_100_images_are_those_of_pytorch_and_torch_is_not_needed(
    checkpoint: Path, exported: Path, photos: list[Path]
) -> None:
    found = run_exported(exported, photos, int8=True)
    require_same(found, checkpoint, photos, different=IMAGES // 4)
    first = [row[:1] for row in found["tokens"]]
    same = sum(one[:1] == other for one, other in zip(found["int8"], first, strict=True))
    assert same > IMAGES / 2 and found["int8"] != found["tokens"]  # nearly the same model, and not the same


def save_prefix_captioner(root: Path, decoder: PretrainedDecoder, words: CaptionTokenizer) -> Path:
    """Save a captioner whose images are a prefix of a language model with random weights."""
    encoder = load_encoder(save_vit(root / "vit"))
    captioner = build_captioner(encoder, decoder, prompts=PROMPTS, eos_id=words.eos_id, max_caption_tokens=8, data={})
    strengthen(captioner, 8)
    (root / "c").mkdir()
    Checkpoint(captioner, words).save(root / "c")
    return root / "c"


@pytest.mark.parametrize("name", ["qwen3", "llama", "prefix"] if LONG else ["qwen3"])
def test_a_language_model_is_exported_with_the_image_as_its_prefix(
    name: str, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "qwen3":  # as if it were large: its weights lie beside the parts
        monkeypatch.setattr(onnx, "MAX_BYTES_WITHIN", 0)
    if name == "prefix":
        texts = [
            TargetText(source, f"A dog, number {n}.", style=style) for n in range(30) for source, style in PROMPTS if style
        ]
        words = train_tokenizer([*texts, TargetText("synthetic", "two", question=QUESTION)], 400)
        decoder, words = new_decoder(words, width=32, depth=2, heads=4)
    else:
        decoder, words = load_decoder(save_language_model(tmp_path / "lm", name))
    checkpoint = save_prefix_captioner(tmp_path, decoder, words)
    files = export_onnx(checkpoint, tmp_path / "out", NullProgress(), int8=name == "qwen3")
    assert ("onnx/decoder_model.onnx.data" in files) == (name == "qwen3")
    found = run_exported(tmp_path / "out", photos[:40], int8="onnx/encoder_model_quantized.onnx" in files)
    require_same(found, checkpoint, photos[:40], different=10)


@pytest.mark.parametrize("family", FAMILIES if LONG else ["lfm2"])
def test_a_language_model_is_exported_or_refused_with_one_error(family: str, photos: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = PretrainedDecoder({"model_type": family, **FAMILIES[family][0], "vocab_size": 258})
    _, words = load_decoder(save_language_model(tmp_path / "lm", "llama"))
    checkpoint = save_prefix_captioner(tmp_path, decoder, words)
    if family in REFUSED:
        with pytest.raises(TrainError, match="is not exported"):
            export_onnx(checkpoint, tmp_path / "out", NullProgress())
        assert not (tmp_path / "out").exists()
    else:
        export_onnx(checkpoint, tmp_path / "out", NullProgress())
        require_same(run_exported(tmp_path / "out", photos[:8]), checkpoint, photos[:8], different=2)


def test_an_export_that_cannot_be_is_one_error_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainError, match="is there already"):
        export_onnx(checkpoint, tmp_path, NullProgress())
    monkeypatch.setattr(onnx, "MAX_DIFFERENCE", -1.0)
    with pytest.raises(TrainError, match=r"encoder_model\.onnx gives other values of encoder_hidden_states"):
        export_onnx(checkpoint, tmp_path / "out", NullProgress())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(TrainError, match="the export needs the package onnxscript"):
        export_onnx(checkpoint, tmp_path / "out", NullProgress())
    assert list(tmp_path.iterdir()) == []
