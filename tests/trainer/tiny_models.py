"""Tiny transformers models with random weights, saved in folders for `from_pretrained`."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trainer.model.caption_model import CaptionerModel

SIDE_PX = 28
TOWER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
IMAGE: dict[str, Any] = {"image_size": SIDE_PX, "patch_size": 14}


def save_vit(folder: Path, **settings: Any) -> str:
    torch.manual_seed(1)
    transformers.ViTModel(transformers.ViTConfig(**TOWER, **IMAGE, **settings)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX}).save_pretrained(folder)
    return str(folder)


def save_clip(folder: Path) -> str:
    torch.manual_seed(2)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = TOWER | ids | {"vocab_size": 99, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=TOWER | IMAGE, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"height": SIDE_PX, "width": SIDE_PX}
    transformers.CLIPImageProcessor(size={"shortest_edge": SIDE_PX}, crop_size=size).save_pretrained(folder)
    return str(folder)


def save_language_model(folder: Path, kind: str) -> str:
    """Save a causal language model over bytes, of the class of Qwen3 or SmolLM2; return its folder."""
    torch.manual_seed(3)
    sizes: Any = TOWER | {"num_key_value_heads": 1, "head_dim": 16}
    sizes |= {"vocab_size": 258, "max_position_embeddings": 256}
    ids: Any = {"bos_token_id": None, "eos_token_id": 257, "pad_token_id": 256, "tie_word_embeddings": True}
    config = transformers.AutoConfig.for_model(kind, **sizes, **ids)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    bytes_tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_tokenizer.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<end>"})
    tokenizer.save_pretrained(folder)
    return str(folder)


def strengthen(captioner: CaptionerModel, factor: float) -> None:
    """Multiply random weights, so that texts differ between images."""
    with torch.no_grad():
        for weight in [*captioner.connector.parameters(), *captioner.decoder.parameters()]:
            weight.mul_(factor if weight.dim() > 1 else 1)
