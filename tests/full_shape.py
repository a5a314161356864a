"""Write a model folder with the shapes of Qwen2.5-VL-3B-Instruct and random weights.

The tokenizer and the configuration are the published ones. A reply ends after about ten tokens.
"""

import base64
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
from transformers.convert_slow_tokenizer import TikTokenConverter

RANKS_PACKAGE, RANKS_FILE, NUM_RANKS = "dashscope==2.0.2", "dashscope/resources/qwen.tiktoken", 151_643
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [  # the ids of these tokens follow the BPE ranks, in this order
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
LAYERS, VISION_LAYERS, WEIGHTS_BYTES = 36, 32, 7_509_245_952
TEXT = {
    "hidden_size": 2048, "intermediate_size": 11_008, "num_attention_heads": 16, "num_key_value_heads": 2,
    "vocab_size": 151_936, "max_position_embeddings": 128_000, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "hidden_act": "silu",
    "sliding_window": 32_768, "use_sliding_window": False, "max_window_layers": 70,
    "tie_word_embeddings": True, "bos_token_id": 151_643, "eos_token_id": 151_645,
}  # fmt: skip
VISION = {
    "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
    "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
    "window_size": 112, "tokens_per_second": 2, "temporal_patch_size": 2,
}  # fmt: skip
IDS = {
    "vision_start_token_id": 151_652, "vision_end_token_id": 151_653, "vision_token_id": 151_654,
    "image_token_id": 151_655, "video_token_id": 151_656,
}  # fmt: skip
PROCESSOR = {
    "min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip
GENERATION = {
    "bos_token_id": 151_643, "pad_token_id": 151_643, "do_sample": True, "eos_token_id": [151_645, 151_643],
    "repetition_penalty": 1.05, "temperature": 1e-6,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] in ('image', 'image_url') or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The embeddings of tokens that end a text are scaled by these factors, so that replies are short.
ENDINGS = dict.fromkeys(('"', '"}', '."}', '?"', '","', '"},', '"}]', '."'), 2.8) | {"<|im_end|>": 5.0}


def write_model(folder: Path, layers: int = LAYERS, vision_layers: int = VISION_LAYERS) -> int:
    """Write the folder, and return the number of bytes of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(download_ranks(folder.parent))
    full_attention = [layer for layer in (7, 15, 23, 31) if layer < vision_layers] or [vision_layers - 1]
    vision = {**VISION, "depth": vision_layers, "fullatt_block_indexes": full_attention}
    sections: dict[str, Any] = {"text_config": TEXT | {"num_hidden_layers": layers}, "vision_config": vision}
    config = Qwen2_5_VLConfig(**sections | IDS)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for word, factor in ENDINGS.items():
            if (token := tokenizer.token_to_id(word)) is not None:
                model.get_input_embeddings().weight[token] *= factor
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "bos_token": None, "unk_token": None, "model_max_length": 131_072, "chat_template": TEMPLATE,
        "additional_special_tokens": SPECIAL[1:], "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    files: dict[str, Any] = {
        "preprocessor_config.json": PROCESSOR, "generation_config.json": GENERATION,
        "tokenizer_config.json": tokenizer_config, "chat_template.json": {"chat_template": TEMPLATE},
    }  # fmt: skip
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
    return sum(weights.numel() * weights.element_size() for weights in model.parameters())


def build_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """Return the fast tokenizer with these BPE ranks."""

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:  # called by `converted`
            return ranks

    options: dict[str, Any] = {"pattern": PATTERN, "extra_special_tokens": SPECIAL}
    tokenizer = Converter(**options).converted()  # type: ignore[no-untyped-call]
    tokenizer.normalizer = normalizers.NFC()
    assert tokenizer.token_to_id(SPECIAL[-1]) == NUM_RANKS + len(SPECIAL) - 1
    return tokenizer


def download_ranks(folder: Path) -> dict[bytes, int]:
    """Download the package RANKS_PACKAGE, and return its BPE ranks by token."""
    wheel = next(folder.glob("dashscope-*.whl"), None)
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        subprocess.run([*command, RANKS_PACKAGE], check=True)
        wheel = next(folder.glob("dashscope-*.whl"))
    lines = zipfile.ZipFile(wheel).read(RANKS_FILE).splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    assert len(ranks) == NUM_RANKS
    return ranks
