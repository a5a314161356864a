"""Build what a training consists of: the captioner with its tokenizer, and the trainer at its first step."""

from collections.abc import Callable
from typing import Any

import httpx2
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from pipeline.dataset.card import has_unknown_license, language_of
from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from pipeline.images.clip import CLIP_MODELS, TINY_CLIP
from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig
from trainer.data import Example, texts_of
from trainer.loop.batch_loader import BatchLoader
from trainer.loop.self_critical import SelfCritic
from trainer.loop.steps import Trainer
from trainer.loop.validation import Validation
from trainer.model.captioner import build_captioner
from trainer.model.decoder import DecoderConfig
from trainer.model.encoder import load_encoder, weights_digest
from trainer.model.language_model import load_decoder, new_decoder
from trainer.optimizer import WeightAverage
from trainer.presets import PREFIX
from trainer.tokenizer import train_tokenizer

CLIP = CLIP_MODELS["clip"]


def build_checkpoint(version: Version, config: TrainConfig, train_set: list[Example]) -> Checkpoint:
    """Return an untrained captioner and its tokenizer. Raises TrainError if a model is missing, or cannot do what is set."""
    chosen: dict[str, Any] = {"layer": config.encoder_layer, "states": config.encoder_states}
    encoder = load_encoder(config.encoder, frozen=config.encoder_lr == 0, **chosen)
    texts = texts_of(train_set)
    sizes = {name: getattr(config, f"decoder_{name}") for name in ("width", "depth", "heads")}
    decoder: Any
    if config.decoder == PREFIX:
        decoder, tokenizer = new_decoder(train_tokenizer(texts, config.vocab_size), **sizes)
    elif config.is_scratch:
        tokenizer = train_tokenizer(texts, config.vocab_size)
        vocab_size = tokenizer.backend.get_vocab_size()
        decoder = DecoderConfig(vocab_size=vocab_size, dropout=config.dropout, **sizes)
    else:
        decoder, tokenizer = load_decoder(config.decoder)
        if config.lora_rank:
            decoder.adapt(config.lora_rank, config.lora_dropout)
        if config.checkpoint_blocks:
            decoder.keep_no_states()
        if config.num_beams > 1:
            decoder.require_beams(config.num_beams)
    captioner = build_captioner(
        encoder,
        decoder,
        prompts=sorted({(text.source, text.style) for text in texts}),
        eos_id=tokenizer.eos_id,
        max_caption_tokens=config.max_caption_tokens,
        contrast_width=config.contrast_width if config.contrastive_weight else 0,
        data={
            "version": version.name,
            "digest": version.manifest["digest"],
            "source": version.manifest["source"],
            "texts": config.text_source,
            "language": language_of(version.manifest),
            "has_unknown_license": has_unknown_license(version.manifest),
            "num_beams": config.num_beams,
            **({"repo": version.repo} if version.repo else {}),
        },
    )
    return Checkpoint(captioner, tokenizer)


def build_trainer(
    checkpoint: Checkpoint, config: TrainConfig, loader: BatchLoader, validation_set: list[Example], device: torch.device
) -> Trainer:
    """Return a trainer of one of several processes at its first step."""
    validation = Validation(checkpoint, config, validation_set, loader, device)
    trainer = Trainer(checkpoint, config, loader, validation, device)
    if config.average_decay:
        trainer.average = WeightAverage(config.average_decay, {})
    if config.scst_steps:
        trainer.critic = SelfCritic(checkpoint, loader.examples, config.scst_samples)
    weights = checkpoint.captioner.state_dict()
    trainer.frozen_key = weights_digest(b"", {name: weights[name] for name in trainer.frozen_names()})
    return trainer


def choose_encoder(message: Callable[[str], None], *, is_drawn: bool) -> str:
    """Return CLIP if its config is cached or can be downloaded, else for drawn scenes the shipped tiny encoder, with a message.

    Raises TrainError for other images: an encoder that knows drawn scenes only would train for hours and learn nothing.
    """
    try:
        snapshot_download(CLIP, allow_patterns=["config.json"], etag_timeout=3)
    except (OSError, HfHubHTTPError, httpx2.TransportError):
        if not is_drawn:
            hint = f"name a folder that holds one: --encoder FOLDER; {TINY_CLIP} knows drawn scenes only"
            raise TrainError(f"{CLIP} cannot be had here, and these images need an encoder of photographs", hint=hint) from None
        message(f"{CLIP} cannot be had here: the encoder is {TINY_CLIP}, which knows drawn scenes only")
        return TINY_CLIP
    return "clip"
