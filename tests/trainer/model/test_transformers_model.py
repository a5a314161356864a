"""The folder of a captioner needs only transformers, and generates the tokens of the original."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.errors import TrainError
from pipeline.images.decode import prepare_image
from tests.pipeline.images.test_similarity import photo
from tests.trainer.model.test_language_model import FAMILIES
from tests.trainer.test_captioner import save_captioner
from tests.trainer.tiny_models import (
    IMAGE,
    SIDE_PX,
    TOWER,
    save_clip,
    save_language_model,
    save_vit,
    strengthen,
)
from trainer.captioner import Captioner
from trainer.model.caption_model import CaptionerModel, build_captioner
from trainer.model.checkpoint import Checkpoint, load_checkpoint
from trainer.model.decoding import DecodingConfig
from trainer.model.encoder import load_encoder
from trainer.model.language_model import PretrainedDecoder, load_decoder
from trainer.model.transformers_files import transformers_files
from trainer.model.transformers_model import SynthCaptioner, SynthCaptionerConfig
from trainer.tokenizer import CaptionTokenizer, TargetText

IMAGES = 100
DECODERS = ("scratch", "prefix", "llama")
BRIEF = TargetText("human", "", style="brief")
QUESTIONS = ("How many?", "What is it?", "Is the one on the left red?")
PROMPTS = [("human", "brief"), ("synthetic", "brief"), ("synthetic", "detailed"), ("synthetic", "")]
# Runs without `site`, so that the tested package cannot be imported.
SCRIPT = """
import json, sys
sys.path += sys.argv[1].split(":")
try:
    import trainer
    raise SystemExit("the package can be imported")
except ImportError:
    pass
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

folders, photos, questions = map(json.loads, sys.argv[2:])
opened = [Image.open(path) for path in photos]

def talk(photos, text):
    def ask(photo, text):
        parts = [{"type": "image", "path": photo}, {"type": "text", "text": text}]
        return {"role": "user", "content": parts}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}
    return [ask(photos[1], "What is this?"), reply, ask(photos[0], text)]

def write_all(folder):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()

    def write(images, text, **options):
        inputs = processor(images=images, text=text, return_tensors="pt")
        eos = model.generation_config.eos_token_id
        rows = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1]:].tolist()
        return [row[: row.index(eos)] if eos in row else row for row in rows]

    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    outputs = pipe(images=photos[:3], text=["", "", ""], batch_size=2)
    return {
        "greedy": write(photos, ""),
        "beams": write(opened[:40], "", num_beams=3),
        "detailed": write(opened[:8], "detailed"),
        "questions": [write(photos[:8], question) for question in questions],
        "padded": write(photos[: len(questions)], questions),
        "pipeline": [output["generated_text"] for output in outputs],
        "chat": [
            pipe(text=talk(photos, text), return_full_text=False)[0]["generated_text"]
            for text in ("Describe this image.", questions[0] + " Answer the question using a single word.")
        ],
        "answer": pipe(images=photos[0], text=questions[0], return_full_text=False)[0]["generated_text"],
        "texts": processor.batch_decode(write(photos[:3], ""), skip_special_tokens=True),
        "sampled": len(write(photos[:2], "", do_sample=True, temperature=0.7)),
        "classes": [type(model).__name__, type(processor).__name__],
        "auto_model": type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__,
    }

json.dump({name: write_all(folder) for name, folder in folders.items()}, sys.stdout)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        photo(number).save(folder / f"{number:03}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_kind(name, tmp_path_factory.mktemp(name)) for name in DECODERS}


@pytest.fixture(params=DECODERS)
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[request.param]


def save_kind(name: str, root: Path) -> Path:
    if name != "llama":
        return save_captioner(root / "c", PROMPTS, decoder=name, strength=8, max_caption_tokens=12)
    decoder, tokenizer = load_decoder(save_language_model(root / "lm", name))
    encoder = load_encoder(save_clip(root / "clip"), states="2x2")
    options: dict[str, Any] = {"max_caption_tokens": 12, "data": {}}
    captioner = build_captioner(encoder, decoder, prompts=PROMPTS, eos_id=tokenizer.eos_id, **options)
    return save(captioner, tokenizer, root / "checkpoint")


def save(captioner: CaptionerModel, tokenizer: CaptionTokenizer, folder: Path) -> Path:
    strengthen(captioner, 8)
    folder.mkdir()
    Checkpoint(captioner, tokenizer).save(folder)
    return folder


def load_with_transformers(folder: Path, **options: Any) -> tuple[Any, Any]:
    auto: Any = transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(folder, trust_remote_code=True, **options)
    return model, transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def generate(loaded: Checkpoint, photos: list[Path], prompt: TargetText, beams: int = 1) -> list[list[int]]:
    encoder = loaded.captioner.encoder
    with torch.inference_mode():
        states = encoder(encoder.pixels([prepare_image(path.read_bytes()) for path in photos]))
    ids = torch.tensor(loaded.tokenizer.prompt(prompt)).expand(len(photos), -1)
    return loaded.captioner.generate(states, ids, DecodingConfig(num_beams=beams))


@pytest.fixture(scope="module")
def written(
    checkpoints: dict[str, Path], photos: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return the outputs of captioner folders by decoder, from one process with transformers only."""
    folders = {name: str(checkpoint) for name, checkpoint in checkpoints.items()}
    arguments = [json.dumps(value) for value in (folders, list(map(str, photos)), QUESTIONS)]
    packages = ":".join(path for path in sys.path if path.endswith("site-packages"))
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, packages, *arguments]
    home = str(tmp_path_factory.mktemp("home"))
    env = {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    outputs: dict[str, Any] = json.loads(done.stdout)
    return outputs


@pytest.mark.parametrize("name", DECODERS)
def test_saved_captioner_generates_the_same_tokens_without_this_package(
    name: str, checkpoints: dict[str, Path], written: dict[str, Any], photos: list[Path]
) -> None:
    written, loaded = written[name], load_checkpoint(checkpoints[name])
    brief, detailed = TargetText("human", "", style="brief"), TargetText("synthetic", "", style="detailed")
    assert written["classes"] == ["SynthCaptioner", "SynthCaptionerProcessor"]
    assert written["auto_model"] == "SynthCaptioner"
    assert written["greedy"] == generate(loaded, photos, brief)
    assert len({tuple(row) for row in written["greedy"]}) > IMAGES / 4
    assert written["beams"] == generate(loaded, photos[:40], brief, beams=3)
    assert written["detailed"] == generate(loaded, photos[:8], detailed)
    questions = [TargetText("synthetic", "", question=question) for question in QUESTIONS]
    assert written["questions"] == [generate(loaded, photos[:8], question) for question in questions]
    pairs = zip(photos, questions, strict=False)
    assert written["padded"] == [generate(loaded, [path], question)[0] for path, question in pairs]
    texts = [loaded.tokenizer.decode(ids) for ids in generate(loaded, photos[:3], brief)]
    for shown in (written["pipeline"], written["texts"]):
        assert [text.strip() for text in shown] == texts
    assert written["answer"].strip() == loaded.tokenizer.decode(generate(loaded, photos[:1], questions[0])[0])
    assert [text.strip() for text in written["chat"]] == [texts[0], written["answer"].strip()]
    assert written["sampled"] == 2


def test_captioner_saved_again_by_transformers_generates_the_same_tokens(
    checkpoint: Path, photos: list[Path], tmp_path: Path
) -> None:
    for part in load_with_transformers(checkpoint):
        part.save_pretrained(tmp_path / "saved")
    tokens = [generate(load_checkpoint(path), photos[:8], BRIEF) for path in (checkpoint, tmp_path / "saved")]
    assert tokens[0] == tokens[1]


def test_embedding_grows_for_new_tokens_and_old_tokens_keep_their_logits(
    checkpoint: Path, photos: list[Path]
) -> None:
    model, processor = load_with_transformers(checkpoint)
    inputs = processor(images=photos[:1], text="")
    with torch.no_grad():
        before = model(**inputs).logits
        size = before.shape[-1]
        model.resize_token_embeddings(size + 3)
        after = model(**inputs).logits
    assert after.shape[-1] == size + 3 == model.get_input_embeddings().num_embeddings
    torch.testing.assert_close(after[..., :size], before)


def test_half_precision_runs_and_image_is_required(checkpoints: dict[str, Path], photos: list[Path]) -> None:
    folder = checkpoints["scratch"]
    for dtype in (torch.bfloat16, torch.float16):
        model, processor = load_with_transformers(folder, dtype=dtype)
        assert model.generate(**processor(images=photos[:2], text="").to(dtype)).shape[0] == 2
    with pytest.raises(ValueError, match="a captioner needs an image"):
        model.generate(input_ids=torch.tensor([[1, 2]]))
    with pytest.raises(
        ValueError, match=r'a captioner needs an image: pass images=\.\.\., and in a pipeline also text=""'
    ):
        processor(text="a photo")


def test_folder_without_captioner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no captioner in"):
        transformers_files(tmp_path)


@pytest.mark.parametrize("family", ["gemma3_text", "mamba", "lfm2", "qwen3_5_text", "granitemoehybrid"])
def test_padded_prompt_gives_the_same_tokens_and_logits_as_an_unpadded_prompt(family: str) -> None:
    """The families have a narrow attention window, recurrent layers, or several kinds of layers."""
    torch.manual_seed(1)
    narrow = {"sliding_window": 12} if family == "gemma3_text" else {}
    model = {"model_type": family, **FAMILIES[family][0], **narrow}
    vit = {"model_type": "vit", **TOWER}
    config = SynthCaptionerConfig(
        {"model": vit, "width": 32}, {"language_model": model}, [("human", "brief")], eos_id=1
    )
    captioner = SynthCaptioner(config)
    captioner.eval()  # type: ignore[no-untyped-call]
    rows = [[5, 6], [7, 8, 9, 10, 11, 12, 13], [14, 15, 16]]
    longest = max(map(len, rows))
    ids = torch.tensor([[2] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    states = torch.randn(3, 5, 32)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "output_logits": True}
    options["return_dict_in_generate"] = True
    together = captioner.generate(ids, image_states=states, attention_mask=mask, **options)
    for number, row in enumerate(rows):
        alone = captioner.generate(torch.tensor([row]), image_states=states[number : number + 1], **options)
        assert together.sequences[number, longest:].tolist() == alone.sequences[0, len(row) :].tolist()
        for logits, logits_alone in zip(together.logits, alone.logits, strict=True):
            assert torch.allclose(logits[number], logits_alone[0], atol=1e-5)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_later_generation_step_gets_only_the_last_token(name: str, tmp_path: Path) -> None:
    """transformers 5.24 renamed the argument `past_key_values` to `cache`."""
    model, _ = load_with_transformers(save_kind("scratch", tmp_path))
    cache, keys = transformers.DynamicCache(), torch.zeros(1, 1, 3, 4)
    cache.update(keys, keys, 0)
    inputs = model.prepare_inputs_for_generation(torch.tensor([[5, 6, 7, 8]]), **{name: cache})
    assert inputs["input_ids"].tolist() == [[8]] and inputs["past_key_values"] is cache


def test_saved_captioner_stops_at_last_position_of_its_model(photos: list[Path], tmp_path: Path) -> None:
    _, tokenizer = load_decoder(save_language_model(tmp_path / "lm", "llama"))
    question = TargetText("synthetic", "", question=QUESTIONS[0])
    num_states, prompt_tokens = 5, len(tokenizer.prompt(question))
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 258}
    sizes["n_positions"] = num_states + prompt_tokens + 3
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    decoder = PretrainedDecoder({"model_type": "gpt2", **sizes}, model)
    encoder = load_encoder(save_vit(tmp_path / "vit"))
    captioner = build_captioner(encoder, decoder, prompts=PROMPTS, eos_id=257, max_caption_tokens=12, data={})
    model, processor = load_with_transformers(save(captioner, tokenizer, tmp_path / "c"))
    inputs = processor(images=photos[:4], text=QUESTIONS[0])
    tokens = {"eos_token_id": 257, "pad_token_id": 257}
    calls: list[dict[str, Any]] = [{}, {"max_new_tokens": 12}, {"num_beams": 2}]
    limits = ({"num_beams": 2}, {"max_length": 90})
    calls += [{"generation_config": transformers.GenerationConfig(**limit, **tokens)} for limit in limits]
    for options in calls:
        assert model.generate(**inputs, **options).shape[1] <= prompt_tokens + 3
    assert model.generate(**inputs, max_new_tokens=2).shape[1] <= prompt_tokens + 2
    expected = generate(load_checkpoint(tmp_path / "c", torch.device("cpu")), photos[:4], question)
    rows = model.generate(**inputs)[:, prompt_tokens:].tolist()
    assert [row[: row.index(257)] if 257 in row else row for row in rows] == expected
    with pytest.raises(ValueError, match="leaves no room for the output: ask a shorter question"):
        model.generate(**processor(images=photos[0], text="What is " * 9 + "?"))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_saved_decoding_settings_give_the_same_tokens_in_transformers(num_beams: int, tmp_path: Path) -> None:
    folder = save_kind("scratch", tmp_path)
    settings = {"num_beams": num_beams, "min_new_tokens": 5, "no_repeat_ngram_size": 2, "length_penalty": 0.3}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"data": {"decoding": settings}}))
    for file, data in transformers_files(folder).items():
        (folder / file).write_bytes(data)
    captioner = Captioner.from_pretrained(folder, "cpu")
    decoding = captioner.decoding(captioner.usual_beams)
    assert decoding == DecodingConfig(**settings)  # type: ignore[arg-type]
    images = [photo(number) for number in range(12)]
    pixels_BCHW = torch.stack([captioner.prepare(image) for image in images])  # type: ignore[misc]
    rows = captioner.write(pixels_BCHW, [captioner.prompt()] * len(images), decoding)
    model, processor = load_with_transformers(folder)
    inputs = processor(images=images, text="", return_tensors="pt")
    tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    eos_id = captioner.checkpoint.captioner.config.eos_id
    tokens = [row[: row.index(eos_id)] if eos_id in row else row for row in tokens]
    assert tokens == rows
    assert min(map(len, rows)) >= 5
    assert all(len({*itertools.pairwise(row)}) == len(row) - 1 for row in rows)
    greedy = captioner.write(pixels_BCHW, [captioner.prompt()] * len(images))
    assert rows != greedy


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = pad_sequence([row["ids"] for row in rows], batch_first=True)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    pixels = torch.stack([row["pixels"] for row in rows])
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "attention_mask": (ids > 0).long()}


def test_gradient_accumulation_changes_neither_loss_nor_gradient(tmp_path: Path) -> None:
    """Texts differ in length, so a mean of means would differ from the mean over all tokens."""
    decoder = {"vocab_size": 50, "width": 32, "depth": 1, "heads": 2}
    encoder = {"model": {"model_type": "vit", **TOWER, **IMAGE}, "width": 32}
    config = SynthCaptionerConfig(encoder, decoder, eos_id=1)
    random, rows = torch.Generator().manual_seed(0), []
    for number in range(8):
        ids = torch.randint(1, 50, (4 + 3 * number,), generator=random)
        labels = torch.cat([torch.tensor([-100, -100]), ids[2:]])
        pixels = torch.randn(3, SIDE_PX, SIDE_PX, generator=random)
        rows.append({"ids": ids, "labels": labels, "pixels": pixels})
    logged: list[dict[str, Any]] = []
    for size, parts in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = SynthCaptioner(config)
        options: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "report_to": "none"}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        arguments = transformers.TrainingArguments(
            str(tmp_path), remove_unused_columns=False, save_strategy="no", disable_tqdm=True, **options
        )
        trainer = transformers.Trainer(model, arguments, data_collator=collate, train_dataset=rows)
        trainer.train()
        logged.append(trainer.state.log_history[0])
    for name in ("loss", "grad_norm"):
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-4)
