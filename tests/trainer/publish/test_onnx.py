"""An exported captioner runs without torch, and writes the tokens that it writes here."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from pipeline.errors import TrainError
from pipeline.images.decode import prepare_image
from pipeline.progress import NullProgress
from tests.pipeline.images.test_similarity import photo
from tests.trainer.test_captioning import save_captioner
from tests.trainer.tiny_models import save_language_model, save_vit
from trainer.checkpoint import Checkpoint, load_checkpoint
from trainer.model.captioner import build_captioner
from trainer.model.decoding import GREEDY
from trainer.model.encoder import load_encoder
from trainer.model.language_model import load_decoder
from trainer.publish import onnx
from trainer.publish.onnx import export_onnx
from trainer.tokenizer import TargetText

IMAGES = 100
QUESTION = "How many?"
SCRIPT = """
import json, sys
sys.path += [sys.argv[1], sys.argv[2]]
from pathlib import Path
from caption import OnnxCaptioner

folder, photos = Path(sys.argv[2]), sys.argv[3:]
captioner, small = OnnxCaptioner(folder), OnnxCaptioner(folder, int8=True)
pixels = captioner.prepare(photos)
json.dump({
    "tokens": captioner.tokens(pixels, captioner.prompt("")),
    "detailed": captioner.tokens(pixels[:8], captioner.prompt("detailed")),
    "answers": captioner.tokens(pixels[:8], captioner.prompt("How many?")),
    "texts": captioner.caption(photos[:3]),
    "int8": small.tokens(pixels, small.prompt("")),
    "heavy": [name for name in ("torch", "transformers", "trainer") if name in sys.modules],
}, sys.stdout)
"""


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


def test_the_tokens_of_100_images_are_those_of_pytorch_and_torch_is_not_needed(
    checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    photos = [tmp_path / f"{number:03}.png" for number in range(IMAGES)]
    for number, path in enumerate(photos):
        photo(number).convert("RGB").resize((28, 28)).save(path)  # as the encoder wants them: resizing is another library's
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, sysconfig.get_paths()["purelib"], str(exported), *map(str, photos)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found, loaded = json.loads(done.stdout), load_checkpoint(checkpoint, torch.device("cpu"))

    def ours(style: str, count: int, question: str = "") -> list[list[int]]:
        prompt = TargetText("synthetic", "", style=style, question=question)
        with torch.inference_mode():
            images = [prepare_image(path.read_bytes()) for path in photos[:count]]
            states = loaded.captioner.encoder(loaded.captioner.encoder.pixels(images))
        return loaded.captioner.generate(states, torch.tensor(loaded.words.prompt(prompt)).expand(count, -1), GREEDY)

    assert found["heavy"] == []
    assert found["tokens"] == ours("brief", IMAGES)
    assert len({tuple(row) for row in found["tokens"]}) > IMAGES / 4  # the images matter
    assert found["detailed"] == ours("detailed", 8)
    assert found["answers"] == ours("", 8, QUESTION)
    assert found["texts"] == [loaded.words.decode(ids) for ids in ours("brief", 3)]
    first = [row[:1] for row in found["tokens"]]
    same = sum(one[:1] == other for one, other in zip(found["int8"], first, strict=True))
    assert same > IMAGES / 2 and found["int8"] != found["tokens"]  # nearly the same model, and not the same


def test_an_export_that_cannot_be_is_one_error_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainError, match="is there already"):
        export_onnx(checkpoint, tmp_path, NullProgress())
    decoder, words = load_decoder(save_language_model(tmp_path / "lm", "llama"))
    encoder = load_encoder(save_vit(tmp_path / "vit"))
    prompts = [("human", "brief")]
    captioner = build_captioner(encoder, decoder, prompts=prompts, eos_id=words.eos_id, max_caption_tokens=8, data={})
    (tmp_path / "c").mkdir()
    Checkpoint(captioner, words).save(tmp_path / "c")
    with pytest.raises(TrainError, match="whose decoder is a language model is not exported"):
        export_onnx(tmp_path / "c", tmp_path / "out", NullProgress())
    monkeypatch.setattr(onnx, "MAX_DIFFERENCE", -1.0)
    with pytest.raises(TrainError, match=r"encoder_model\.onnx gives other values of encoder_hidden_states"):
        export_onnx(checkpoint, tmp_path / "out", NullProgress())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(TrainError, match="the export needs the package onnxscript"):
        export_onnx(checkpoint, tmp_path / "out", NullProgress())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "lm", "vit"]
