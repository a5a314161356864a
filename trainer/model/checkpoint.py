"""Build a captioner with its tokenizer, and save and load it as a checkpoint folder.

Checkpoints may be untrusted, so loading checks them: unknown keys of config.json are ignored, weights must
be safetensors files, and their shapes are compared with the config before memory is allocated.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields, replace
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import constants
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers.initialization import no_init_weights

from pipeline.dataset.card import has_unknown_license, language_of
from pipeline.dataset.version import Version
from pipeline.digests import without_folders
from pipeline.errors import TrainError, one_line
from pipeline.storage.files import flush_file, flush_folder, scratch_folder
from pipeline.storage.untrusted import read_regular
from trainer.config import MAX_CAPTION_TOKENS, PREFIX, EncoderStates, TrainConfig
from trainer.data import Example, texts_of
from trainer.model.caption_model import CaptionerConfig, CaptionerModel, build_captioner
from trainer.model.decoder import DecoderConfig, ScratchDecoder
from trainer.model.encoder import Encoder, load_encoder
from trainer.model.language_model import load_decoder, new_decoder
from trainer.model.pretrained import require_few_layers
from trainer.model.transformers_files import transformers_files
from trainer.runtime.checkpoint_folder import (
    CAPTIONER_FILES,
    MAX_CONFIG_BYTES,
    find_captioner,
    no_captioner,
    require_checkpoint,
)
from trainer.runtime.devices import best_device
from trainer.tokenizer import (
    CaptionTokenizer,
    TargetText,
    require_known_tokens,
    scored_prompt,
    train_tokenizer,
)

MAX_TOKENIZER_BYTES = 100_000_000
DECODING_SETTINGS = ("num_beams", "length_penalty", "min_new_tokens", "no_repeat_ngram_size")
# Tied weights are stored once, so a model may have up to this many times the weights of its file.
MAX_SHARED = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A captioner with its tokenizer."""

    captioner: CaptionerModel
    tokenizer: CaptionTokenizer

    def save(self, folder: Path) -> None:
        """Write CAPTIONER_FILES and the files for transformers. Each file is replaced atomically."""
        with scratch_folder(folder) as draft:
            try:
                self.captioner.without_adapters().save_pretrained(draft)
            except SafetensorError as error:
                hint = "free some disk space, then continue with --resume"
                raise TrainError(f"cannot write the weights to {folder}: {error}", hint=hint) from None
            # safetensors makes the weights file readable only for its owner.
            (draft / "model.safetensors").chmod((draft / "config.json").stat().st_mode)
            self.tokenizer.backend.save(str(draft / "tokenizer.json"))
            added = transformers_files(draft)
            for name, data in added.items():
                (draft / name).write_bytes(data)
            for name in dict.fromkeys([*CAPTIONER_FILES, *added]):
                flush_file(draft / name)
                (draft / name).replace(folder / name)
            flush_folder(folder)


def load_checkpoint(folder: Path | str, device: torch.device | None = None) -> Checkpoint:
    """Load a captioner in evaluation mode. Raises TrainError if the folder holds no valid captioner."""
    folder = Path(folder)
    require_checkpoint(folder)
    try:
        # huggingface_hub prints to stdout, which commands use for data only.
        with without_network(), redirect_stdout(StringIO()), no_init_weights():
            config = read_config(folder)
            require_shapes(config, folder / "model.safetensors")
            tokenizer = read_tokenizer(folder / "tokenizer.json", config)
            captioner = CaptionerModel.from_pretrained(str(folder), strict=True).eval()
    except TrainError:
        raise
    except Exception as error:  # noqa: BLE001  # transformers raises any exception for an unusual config
        raise no_captioner(folder, one_line(error)) from None
    for name, weights in captioner.named_parameters():
        if not torch.isfinite(weights.sum()):
            raise no_captioner(folder, f"{name} has weights that are NaN or infinite")
    return Checkpoint(captioner.to(device or best_device()), tokenizer)


@contextmanager
def without_network() -> Iterator[None]:
    """Block downloads by huggingface_hub. Some model configs would download other configs."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_config(folder: Path) -> CaptionerConfig:
    """Read config.json of a checkpoint. Raises ValueError or UnsafeFileError if it is invalid."""
    values = json.loads(read_regular(folder / "config.json", max_bytes=MAX_CONFIG_BYTES))
    known = {field.name for field in fields(CaptionerConfig)}
    # The other keys are for transformers.
    values = {name: value for name, value in values.items() if name in known}
    config = TypeAdapter(CaptionerConfig).validate_python(values)
    if not config.prompts:
        raise ValueError("config.json has no prompts")
    if not 0 < config.max_caption_tokens <= MAX_CAPTION_TOKENS:
        raise ValueError(f"invalid max_caption_tokens: {config.max_caption_tokens}")
    TrainConfig.model_validate(config.data.get("decoding", {}), strict=True)
    # This raises TypeError for unknown options.
    config.decoding()
    require_few_layers(config.decoder)
    return config


def require_shapes(config: CaptionerConfig, weights: Path) -> None:
    """Raise ValueError if the tensors in a weights file do not match the config. Allocates no tensors."""
    with safe_open(weights, "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    with torch.device("meta"):
        captioner = CaptionerModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in captioner.state_dict().items()}
    if (states := captioner.encoder.config.states) not in get_args(EncoderStates):
        raise ValueError(f"{states!r} is no known value of the encoder's `states`")
    # Tied tensors, such as embedding and head, are stored once, so names may be missing from `stored`.
    if wrong := [name for name, shape in stored.items() if expected.get(name) != shape]:
        raise ValueError(f"the weights do not match the config: {wrong[0]}")
    num_expected, num_stored = sum(map(math.prod, expected.values())), sum(map(math.prod, stored.values()))
    if num_expected > MAX_SHARED * num_stored + 1:
        raise ValueError(f"the config has {num_expected:,} weights, but the file has {num_stored:,}")


def read_tokenizer(path: Path, config: CaptionerConfig) -> CaptionTokenizer:
    """Read the tokenizer of a checkpoint. Raises ValueError if a token has no embedding in the decoder."""
    backend = Tokenizer.from_str(read_regular(path, max_bytes=MAX_TOKENIZER_BYTES).decode("utf-8"))
    vocab_size = config.decoder.get("language_model", config.decoder)["vocab_size"]
    if not 0 <= config.eos_id < vocab_size:
        raise ValueError(f"the end-of-text token {config.eos_id} is not one of {vocab_size:,} tokens")
    require_known_tokens(backend, vocab_size)
    # If a caption contains the name of a special token, encode it as plain text.
    backend.encode_special_tokens = True
    is_pretrained = "language_model" in config.decoder
    tokenizer = CaptionTokenizer(backend, "pretrained" if is_pretrained else "scratch", config.eos_id)
    for source, style in config.prompts:
        ids = tokenizer.prompt(TargetText(source, "", style=style, question="" if style else "?"))
        if max(ids) >= vocab_size:
            raise ValueError(f"the decoder lacks tokens that are in the prompt for {style or 'answers'}")
    return tokenizer


def build_checkpoint(
    version: Version, config: TrainConfig, train_set: list[Example], init_digest: str = ""
) -> Checkpoint:
    """Build a captioner to train. If `config.init` names a captioner, its training continues.

    `init_digest` is the hash of that captioner's weights. Raises TrainError if a model is missing or does not
    support a setting.
    """
    texts = texts_of(train_set)
    prompts = {(text.source, text.style) for text in texts}
    data = _describe_data(version, config)
    start: Checkpoint | None = None
    if config.init:
        start = load_checkpoint(find_captioner(config.init), torch.device("cpu"))
        before = start.captioner.config
        encoder, decoder, tokenizer = _continued_parts(start, config, texts)
        # Keep the other prompts that `start` has learned, unless they would replace the default prompt.
        default = scored_prompt([*prompts])
        prompts |= {prompt for prompt in before.prompts if scored_prompt([*prompts, prompt]) == default}
        data["init"] = {"digest": init_digest, "data": before.data}
        data["has_unknown_license"] |= bool(before.data.get("has_unknown_license"))
    else:
        encoder, decoder, tokenizer = _new_parts(config, texts)
    if config.decoder == PREFIX:
        decoder.add_dropout(config.dropout)
    if config.lora_rank:
        decoder.add_adapters(config.lora_rank, config.lora_dropout)
    max_tokens = config.max_caption_tokens or tokenizer.choose_max_tokens(texts)
    if start and config.max_caption_tokens is None:
        max_tokens = max(max_tokens, start.captioner.config.max_caption_tokens)
    fields = {"prompts": sorted(prompts), "eos_id": tokenizer.eos_id, "max_caption_tokens": max_tokens}
    captioner = build_captioner(encoder, decoder, data=data, **fields)
    if start:
        _copy_weights(start.captioner, captioner)
    return Checkpoint(captioner, tokenizer)


def _describe_data(version: Version, config: TrainConfig) -> dict[str, Any]:
    """Return the value of `data` in the config of a captioner."""
    return {
        "version": version.name,
        "digest": version.manifest["digest"],
        "source": version.manifest["source"],
        "texts": config.text_source,
        "language": language_of(version.manifest),
        "has_unknown_license": has_unknown_license(version.manifest),
        "decoder": without_folders(config.decoder),
        "decoding": {name: getattr(config, name) for name in DECODING_SETTINGS},
        **({"repo": version.repo} if version.repo else {}),
    }


def _new_parts(config: TrainConfig, texts: list[TargetText]) -> tuple[Encoder, Any, CaptionTokenizer]:
    """Return an encoder, a decoder or its settings, and a tokenizer."""
    encoder = load_encoder(config.encoder, states=config.encoder_states, frozen=config.encoder_lr == 0)
    if not config.is_scratch:
        return encoder, *load_decoder(config.decoder)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    sizes = {name: getattr(config, f"decoder_{name}") for name in ("width", "depth", "heads")}
    if config.decoder == PREFIX:
        return encoder, *new_decoder(tokenizer, **sizes)
    vocab_size = tokenizer.backend.get_vocab_size()
    return encoder, DecoderConfig(vocab_size=vocab_size, dropout=config.dropout, **sizes), tokenizer


def _continued_parts(
    start: Checkpoint, config: TrainConfig, texts: list[TargetText]
) -> tuple[Encoder, Any, CaptionTokenizer]:
    """Return the parts of `start`, with new tokens for the prompts of `texts`."""
    captioner, tokenizer = start.captioner, start.tokenizer.with_prompts(texts)
    encoder = Encoder(replace(captioner.encoder.config, frozen=config.encoder_lr == 0))
    encoder.load_state_dict(captioner.encoder.state_dict())
    if not isinstance(captioner.decoder, ScratchDecoder):
        return encoder, captioner.decoder, tokenizer
    settings = captioner.config.decoder
    vocab_size = max(settings["vocab_size"], tokenizer.backend.get_vocab_size())
    decoder = DecoderConfig(**settings | {"vocab_size": vocab_size, "dropout": config.dropout})
    return encoder, decoder, tokenizer


def _copy_weights(source: CaptionerModel, target: CaptionerModel) -> None:
    """Copy all weights. Embeddings of new tokens keep their random values."""
    target.connector.load_state_dict(source.connector.state_dict())
    if isinstance(source.decoder, ScratchDecoder):
        weights, embedding = source.decoder.state_dict(), target.decoder.embedding.weight.detach()
        known = weights["embedding.weight"]
        weights["embedding.weight"] = torch.cat([known, embedding[len(known) :]])
        target.decoder.load_state_dict(weights)
