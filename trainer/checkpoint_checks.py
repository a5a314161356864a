"""Check a checkpoint, which may be a stranger's: config.json holds known keys only, its weights are safetensors, and no memory
is taken before their shapes are those that the config asks for.
"""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import get_args

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from tokenizers import Tokenizer

from pipeline.storage.untrusted import read_regular
from trainer.config import MAX_CAPTION_TOKENS, MAX_LAYERS
from trainer.model.captioner import CaptionerConfig, CaptionerModel
from trainer.model.hf_config import require_few_layers
from trainer.presets import EncoderStates
from trainer.tokenizer import CaptionTokenizer, TargetText, require_known_tokens

MAX_CONFIG_BYTES = 10_000_000
PUBLISHED_TYPE = "synth_captioner"  # the model type of a captioner for transformers
MAX_BEAMS = 64  # with which a captioner may say that it was scored: a search with more may have no end
MAX_TOKENIZER_BYTES = 100_000_000
MAX_SHARED = 2  # times the stored weights that a model may have: some decoders use their embedding as head, too


def read_config(folder: Path) -> CaptionerConfig:
    """Return the config of a checkpoint. Raises ValueError or UnsafeFileError if it is not one."""
    values = json.loads(read_regular(folder / "config.json", max_bytes=MAX_CONFIG_BYTES))
    known = {field.name for field in fields(CaptionerConfig)}
    if values.get("model_type") == PUBLISHED_TYPE:  # of publish/files.py, or saved by transformers; its keys are not read here
        values = {name: value for name, value in values.items() if name in known}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"config.json has an unknown key {unknown[0]}")
    config = TypeAdapter(CaptionerConfig).validate_python(values)
    if not config.prompts:
        raise ValueError("it has learned no prompt")
    if not 0 < config.max_caption_tokens <= MAX_CAPTION_TOKENS:
        raise ValueError(f"max_caption_tokens is {config.max_caption_tokens}")
    if type(config.num_beams) is not int or not 0 < config.num_beams <= MAX_BEAMS:
        raise ValueError(f"num_beams is {config.num_beams!r}")
    require_few_layers(config.decoder)
    return config


def require_shapes(config: CaptionerConfig, weights: Path) -> None:
    """Raise ValueError unless a file of weights has the tensors that a config asks for. No tensor is allocated."""
    with safe_open(weights, "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    with torch.device("meta"):
        captioner = CaptionerModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in captioner.state_dict().items()}
    encoder = captioner.encoder
    layers = encoder.config.layers
    if len(layers) > MAX_LAYERS or any(layer not in range(-encoder.depth - 1, encoder.depth + 1) for layer in layers):
        raise ValueError(f"the encoder has no layers {layers[: MAX_LAYERS + 1]}")
    if encoder.config.states not in get_args(EncoderStates):
        raise ValueError(f"the encoder has no states {encoder.config.states!r}")
    # Of tensors that share their memory, such as the embedding and the head, the file holds one.
    if wrong := [name for name, shape in stored.items() if expected.get(name) != shape]:
        raise ValueError(f"the weights do not fit the config: {wrong[0]}")
    allocated, held = sum(map(math.prod, expected.values())), sum(map(math.prod, stored.values()))
    if allocated > MAX_SHARED * held + 1:
        raise ValueError(f"the config asks for {allocated:,} weights, and there are {held:,}")


def read_tokenizer(path: Path, config: CaptionerConfig) -> CaptionTokenizer:
    """Return the tokenizer of a checkpoint. Raises ValueError if it has tokens that the decoder has not."""
    backend = Tokenizer.from_str(read_regular(path, max_bytes=MAX_TOKENIZER_BYTES).decode("utf-8"))
    vocab_size = config.decoder.get("language_model", config.decoder)["vocab_size"]
    if not 0 <= config.eos_id < vocab_size:
        raise ValueError(f"the token that ends a text is {config.eos_id}, and the decoder has {vocab_size:,} tokens")
    require_known_tokens(backend, vocab_size)
    tokenizer = CaptionTokenizer(backend, "pretrained" if "language_model" in config.decoder else "scratch", config.eos_id)
    backend.encode_special_tokens = True  # the name of a token in a text is not the token
    for source, style in config.prompts:
        ids = tokenizer.prompt(TargetText(source, "", style=style, question="" if style else "?"))
        if max(ids) >= vocab_size:
            raise ValueError(f"the prompt of the style {style or 'of answers'} has tokens that the decoder has not")
    return tokenizer
