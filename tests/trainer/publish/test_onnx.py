"""An exported captioner runs without torch, and writes the tokens that it writes here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, Qwen3Config, Qwen3ForCausalLM

from pipeline.errors import TrainError
from pipeline.images.decode import prepare_image
from pipeline.progress import NullProgress
from tests.hostile import LONG
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
PROMPTS = [("human", "brief"), ("synthetic", "brief"), ("synthetic", "detailed"), ("synthetic", "")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("models") / "c", layer=-2, states="2x2", seed=6)


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
    packages = ":".join(path for path in sys.path if path.endswith("site-packages"))
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
        return loaded.captioner.generate(states, torch.tensor(loaded.tokenizer.prompt(prompt)).expand(count, -1), GREEDY)

    source = "human" if ("human", "brief") in [tuple(prompt) for prompt in loaded.captioner.config.prompts] else "synthetic"
    assert found["heavy"] == []
    assert found["tokens"] == ours("brief", len(photos), source=source)
    assert len({tuple(row) for row in found["tokens"]}) >= different
    assert found["detailed"] == ours("detailed", 8)
    assert found["answers"] == ours("", 8, QUESTION)
    assert found["texts"] == [loaded.tokenizer.decode(ids) for ids in ours("brief", 3, source=source)]


def test_the_tokens_of_100_images_are_those_of_pytorch_and_torch_is_not_needed(
    checkpoint: Path, exported: Path, photos: list[Path]
) -> None:
    found = run_exported(exported, photos, int8=True)
    require_same(found, checkpoint, photos, different=IMAGES // 4)
    first = [row[:1] for row in found["tokens"]]
    same = sum(one[:1] == other for one, other in zip(found["int8"], first, strict=True))
    assert same > IMAGES / 2 and found["int8"] != found["tokens"]  # nearly the same model, and not the same


def test_photos_that_lie_sideways_or_have_no_background_are_seen_as_in_training(
    checkpoint: Path, exported: Path, photos: list[Path], tmp_path: Path
) -> None:
    turned, clear = Image.open(photos[0]), Image.open(photos[1]).convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(tmp_path / "clear.png")
    odd = [tmp_path / "turned.png", tmp_path / "clear.png", *photos[2:8]]
    expected = run_exported(exported, odd)
    require_same(expected, checkpoint, odd, different=2)
    as_they_lie = run_exported(exported, photos[:8])["tokens"]
    assert [one == other for one, other in zip(expected["tokens"], as_they_lie, strict=True)] == [False] * 2 + [True] * 6


@pytest.mark.parametrize("size", [(277, 277), (107, 300), (500, 110), (640, 480)])
def test_a_size_in_proportion_is_the_one_that_transformers_takes(size: tuple[int, int]) -> None:
    """A pixel less, and a black line would be cut into the image."""
    processor = CLIPImageProcessor(size={"shortest_edge": 224}, do_center_crop=False, do_rescale=False, do_normalize=False)
    seen = processor(Image.new("RGB", size), return_tensors="np")["pixel_values"].shape[2:]
    assert run_onnx._size(Image.new("RGB", size), {"shortest_edge": 224}) == seen[::-1]


def test_an_export_names_no_path_of_the_machine_that_wrote_it(exported: Path) -> None:
    for path in exported.rglob("*.onnx"):
        data = path.read_bytes()
        assert not [name for name in (b"trainer/", b"site-packages", str(Path.home()).encode() + b"/") if name in data], path


def save_prefix_captioner(root: Path, decoder: PretrainedDecoder, tokenizer: CaptionTokenizer) -> Path:
    """Save a captioner whose images are a prefix of a language model with random weights."""
    encoder = load_encoder(save_vit(root / "vit"))
    captioner = build_captioner(encoder, decoder, prompts=PROMPTS, eos_id=tokenizer.eos_id, max_caption_tokens=8, data={})
    strengthen(captioner, 8)
    (root / "c").mkdir()
    Checkpoint(captioner, tokenizer).save(root / "c")
    return root / "c"


def test_a_language_model_reads_the_image_as_its_prefix_and_ends_where_it_has_no_more_positions(
    photos: list[Path], tmp_path: Path
) -> None:
    _, tokenizer = load_decoder(save_language_model(tmp_path / "lm", "llama"))
    prompts = [TargetText("synthetic", "", style="detailed"), TargetText("synthetic", "", question=QUESTION)]
    longest, num_states = max(len(tokenizer.prompt(prompt)) for prompt in prompts), 5
    sizes: dict[str, Any] = FAMILIES["qwen3"][0] | {"vocab_size": 258, "max_position_embeddings": longest + num_states + 3}
    sizes["num_hidden_layers"] = 2 if LONG else 1  # a second layer takes ten seconds; the captioner above has two
    torch.manual_seed(0)
    decoder = PretrainedDecoder({"model_type": "qwen3", **sizes}, Qwen3ForCausalLM(Qwen3Config(**sizes)))
    checkpoint = save_prefix_captioner(tmp_path, decoder, tokenizer)
    export_onnx(checkpoint, tmp_path / "out", NullProgress())
    found = run_exported(tmp_path / "out", photos[:40])
    require_same(found, checkpoint, photos[:40], different=10)
    assert max(map(len, found["detailed"])) <= 3 < max(map(len, found["tokens"]))


def test_a_language_model_that_keeps_more_than_keys_and_values_is_refused(tmp_path: Path) -> None:
    decoder = PretrainedDecoder({"model_type": "lfm2", **FAMILIES["lfm2"][0], "vocab_size": 258})
    _, tokenizer = load_decoder(save_language_model(tmp_path / "lm", "llama"))
    with pytest.raises(TrainError, match="is not exported"):
        export_onnx(save_prefix_captioner(tmp_path, decoder, tokenizer), tmp_path / "out", NullProgress())
    assert not (tmp_path / "out").exists()


def test_an_export_that_cannot_be_is_one_error_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainError, match="is there already"):
        export_onnx(checkpoint, tmp_path, NullProgress())
    monkeypatch.setattr(onnx_export, "MAX_DIFFERENCE", -1.0)
    with pytest.raises(TrainError, match=r"encoder_model\.onnx gives other values of last_hidden_state"):
        export_onnx(checkpoint, tmp_path / "out", NullProgress())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(TrainError, match="the export needs the package onnxscript"):
        export_onnx(checkpoint, tmp_path / "out", NullProgress())
    assert list(tmp_path.iterdir()) == []
