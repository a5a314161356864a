"""Checkpoints: loading an untrusted one runs no code, fetches nothing, and needs little memory."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hostile import Damage, link, outcomes_of, pipe, require_harmless_outcome
from tests.trainer.test_captioner import save_captioner


def config(*path: str, **values: Any) -> Damage:
    """Return a function that changes values in config.json."""

    def damage(folder: Path) -> None:
        whole = json.loads((folder / "config.json").read_text())
        reduce(getitem, path, whole).update(values)
        (folder / "config.json").write_text(json.dumps(whole))

    return damage


def file(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


ENCODER = ("encoder", "model")  # a path in config.json


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/synth-was-here",)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Runs()))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))


def remote_code(folder: Path) -> None:
    (folder / "evil.py").write_text("import os; os.system('touch /tmp/synth-was-here')\n")
    evil = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    config(*ENCODER, auto_map=evil)(folder)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def lying_header(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


PIPELINE = {"image_processor_type": "pipeline", "model": "me/evil", "trust_remote_code": True}
PIPELINE["task"] = "text-generation"
KERNEL = {"model_type": "qwen3", "attn_implementation": "me/evil", "vocab_size": 99}
WORDS = {"type": "WordLevel", "vocab": {"a": 4_000_000_000, "<unk>": 0}, "unk_token": "<unk>"}
TOKENIZER = json.dumps({"version": "1.0", "model": WORDS})
DAMAGES: dict[str, Damage] = {
    "processor that is a pipeline": config("encoder", processor=PIPELINE),
    "processor with other methods": config("encoder", "processor", preprocess="x", __call__="y", resize=1),
    "processor of giant images": config("encoder", "processor", size={"height": 10**9, "width": 10**9}),
    "remote code": remote_code,
    "a kernel of the Hub": config(*ENCODER, attn_implementation="me/evil-kernel"),
    "a kernel for the decoder": config(decoder={"language_model": KERNEL}),
    "a backbone of the Hub": config(
        "encoder",
        model={"model_type": "timm_wrapper", "architecture": "resnet18", "use_pretrained_backbone": True},
    ),
    "a model that fetches another": config("encoder", model={"model_type": "edgetam"}),
    "twenty thousand steps": config(
        "encoder", model={"model_type": "regnet", "depths": [1] * 20_000, "hidden_sizes": [1] * 20_000}
    ),
    "a setting in place of a method": config(*ENCODER, to_dict=1, get_text_config="x"),
    "a model type that is a path": config(*ENCODER, model_type="../../evil"),
    "a billion layers": config(*ENCODER, num_hidden_layers=10**9),
    "layers without weights": config(*ENCODER, num_hidden_layers=900),
    "a layer of a terabyte": config(*ENCODER, intermediate_size=10**9),
    "a width that is negative": config("decoder", width=-192),
    "an unknown key": config(evil=1),
    "no prompts": config(prompts=[]),
    "prompts of an unknown source": config(prompts=[["a stranger", "x"]]),
    "an end token outside of the vocabulary": config(eos_id=10**9),
    "endless captions": config(max_caption_tokens=10**9),
    "100,000 beams": config(data={"decoding": {"num_beams": 100_000}}),
    "a penalty that overflows": config(data={"decoding": {"length_penalty": 2000}}),
    "n-grams of 2.5 tokens": config(data={"decoding": {"no_repeat_ngram_size": 2.5}}),
    "config that is deep": file("config.json", b"[" * 100_000 + b"]" * 100_000),
    "config that is not JSON": file("config.json", b"\x80\x04K\x01."),
    "config that is a pipe": pipe("config.json"),
    "weights that are a pickle": pickled,
    "weights that are an endless device": link("model.safetensors", "/dev/zero"),
    "weights that are cut off": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "weights with a giant header": huge_header,
    "weights with a lying header": lying_header,
    "a missing tensor": tensors(lambda w: w.pop(sorted(w)[0])),
    "an additional tensor": tensors(lambda w: w.update(evil=torch.zeros(1))),
    "a tensor of another shape": tensors(lambda w: w.update({sorted(w)[0]: torch.zeros(3, 3)})),
    "tensors that are not numbers": tensors(lambda w: w.update({n: t * float("nan") for n, t in w.items()})),
    "a tokenizer of other tokens": file("tokenizer.json", TOKENIZER.encode()),
    "an empty tokenizer": file("tokenizer.json", b"{}"),
    "a tokenizer that is a pipe": pipe("tokenizer.json"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    good = save_captioner(tmp_path_factory.mktemp("made") / "c")
    for name, damage in {"good": lambda folder: None, **DAMAGES}.items():
        shutil.copytree(good, folder / name)
        damage(folder / name)
    Path("/tmp/synth-was-here").unlink(missing_ok=True)
    return outcomes_of("checkpoints", folder, tmp_path_factory.mktemp("out"))


@pytest.mark.parametrize("name", ["good", *DAMAGES])
def test_hostile_checkpoint_gives_one_error_or_is_harmless(name: str, outcomes: dict[str, Any]) -> None:
    require_harmless_outcome(name, outcomes[name], max_s=30)
    assert not Path("/tmp/synth-was-here").exists()
