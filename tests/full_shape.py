"""Write a model folder of the shape of Qwen2.5-VL-3B-Instruct with random weights.

The tokenizer is the real one: its ranks come from the PyPI package `dashscope`. The configuration has the
published values. With all layers, the weights have the published size. Some rows of the embedding are scaled,
so that a reply ends after some ten tokens.
"""

import base64
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

Entries = list[tuple[str, tuple[int, ...]]]  # names and shapes of tensors

RANKS_PACKAGE, RANKS_FILE, NUM_RANKS = "dashscope==2.0.2", "dashscope/resources/qwen.tiktoken", 151_643
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [  # tokens after the ranks, in the order of their ids
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>",
    "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip
LAYERS, VISION_LAYERS, WEIGHTS_BYTES = 36, 32, 7_509_245_952
TEXT = {
    "hidden_size": 2048, "intermediate_size": 11_008, "num_attention_heads": 16, "num_key_value_heads": 2,
    "vocab_size": 151_936, "max_position_embeddings": 128_000, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "hidden_act": "silu",
    "sliding_window": 32_768, "use_sliding_window": False, "max_window_layers": 70,
    "tie_word_embeddings": True,
}  # fmt: skip
VISION = {
    "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
    "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
    "window_size": 112, "tokens_per_second": 2, "temporal_patch_size": 2,
}  # fmt: skip
IDS = {
    "bos_token_id": 151_643, "eos_token_id": 151_645, "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653, "vision_token_id": 151_654, "image_token_id": 151_655,
    "video_token_id": 151_656,
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
ENDINGS = ('"', '"}', '."}', '?"', '","', '"},', '"}]', '."')  # tokens that end a JSON string
ENDING_FACTOR = 2.8


def write_model(folder: Path, layers: int = LAYERS, vision_layers: int = VISION_LAYERS) -> int:
    """Write the folder, and return the number of bytes of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(_download_ranks(folder.parent))
    tokenizer.save(str(folder / "tokenizer.json"))
    full_attention = [layer for layer in (7, 15, 23, 31) if layer < vision_layers] or [vision_layers - 1]
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16", "num_hidden_layers": layers, **TEXT, **IDS,
        "vision_config": {**VISION, "depth": vision_layers, "fullatt_block_indexes": full_attention},
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "bos_token": None, "unk_token": None, "model_max_length": 131_072, "chat_template": TEMPLATE,
        "additional_special_tokens": SPECIAL[1:14], "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    files: dict[str, Any] = {
        "config.json": config, "preprocessor_config.json": PROCESSOR, "generation_config.json": GENERATION,
        "tokenizer_config.json": tokenizer_config, "chat_template.json": {"chat_template": TEMPLATE},
    }  # fmt: skip
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
    ids = [token for word in ENDINGS if (token := tokenizer.token_to_id(word)) is not None]
    return _write_weights(folder / "model.safetensors", _tensors(layers, vision_layers), ids)


def build_tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    """Return the fast tokenizer with these ranks of byte sequences."""
    shown = _byte_characters()

    def text(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    ordered = sorted(ranks.items(), key=lambda pair: pair[1])
    merges = [
        (text(left), text(right))
        for token, rank in ordered
        if len(token) > 1
        for left, right in [_split_in_two(token, ranks, rank)]
    ]
    tokenizer = Tokenizer(BPE({text(token): rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for word in SPECIAL:
        token = AddedToken(word, special=word.startswith("<|") and "fim" not in word, normalized=False)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    assert tokenizer.token_to_id(SPECIAL[-1]) == NUM_RANKS + len(SPECIAL) - 1
    return tokenizer


def _download_ranks(folder: Path) -> dict[bytes, int]:
    """Return the ranks of the tokens, from the package that holds them."""
    wheel = next(folder.glob("dashscope-*.whl"), None)
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        subprocess.run([*command, RANKS_PACKAGE], check=True)
        wheel = next(folder.glob("dashscope-*.whl"))
    lines = zipfile.ZipFile(wheel).read(RANKS_FILE).splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    assert len(ranks) == NUM_RANKS
    return ranks


def _byte_characters() -> dict[int, str]:
    """Return the characters by which byte-level tokenizers show bytes (as in GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _split_in_two(token: bytes, ranks: dict[bytes, int], limit: int) -> tuple[bytes, bytes]:
    """Return the two parts that the last merge joins to a token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        merged = [ranks.get(parts[n] + parts[n + 1], limit) for n in range(len(parts) - 1)]
        at = merged.index(min(merged))
        assert merged[at] < limit, token
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _tensors(layers: int, vision_layers: int) -> Entries:
    return [
        ("model.embed_tokens.weight", (151_936, 2048)),
        *_text_tensors(layers),
        *_vision_tensors(vision_layers),
    ]


def _text_tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate = 2048, 11_008
    for layer in range(layers):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (hidden,)
        yield f"{name}.post_attention_layernorm.weight", (hidden,)
        for part, shape in (("gate", (intermediate, hidden)), ("up", (intermediate, hidden))):
            yield f"{name}.mlp.{part}_proj.weight", shape
        yield f"{name}.mlp.down_proj.weight", (hidden, intermediate)
        for part, width in (("q", hidden), ("k", 256), ("v", 256)):
            yield f"{name}.self_attn.{part}_proj.weight", (width, hidden)
            yield f"{name}.self_attn.{part}_proj.bias", (width,)
        yield f"{name}.self_attn.o_proj.weight", (hidden, hidden)
    yield "model.norm.weight", (hidden,)


def _vision_tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate = 1280, 3420
    for layer in range(layers):
        name = f"visual.blocks.{layer}"
        for norm in ("norm1", "norm2"):
            yield f"{name}.{norm}.weight", (hidden,)
        linears = {
            "attn.qkv": (3 * hidden, hidden), "attn.proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }  # fmt: skip
        for part, shape in linears.items():
            yield f"{name}.{part}.weight", shape
            yield f"{name}.{part}.bias", shape[:1]
    yield "visual.merger.ln_q.weight", (hidden,)
    for part, shape in (("0", (4 * hidden, 4 * hidden)), ("2", (2048, 4 * hidden))):
        yield f"visual.merger.mlp.{part}.weight", shape
        yield f"visual.merger.mlp.{part}.bias", shape[:1]
    yield "visual.patch_embed.proj.weight", (hidden, 3, 2, 14, 14)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _write_weights(path: Path, entries: Entries, ending_ids: list[int]) -> int:
    """Write random bfloat16 weights tensor by tensor, and return their number of bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in entries:
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    pool = _bfloat16(rng.standard_normal(1 << 24, dtype=np.float32) * np.float32(0.02))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in entries:
            size = int(np.prod(shape))
            if "norm" in name or "ln_q" in name:
                file.write(_bfloat16(np.ones(size, np.float32)).tobytes())
                continue
            for left in range(size, 0, -(len(pool) // 2)):
                start = int(rng.integers(len(pool) // 2))
                file.write(pool[start : start + min(left, len(pool) // 2)].tobytes())
    embedding = np.memmap(path, np.uint16, "r+", offset=8 + len(text), shape=entries[0][1])
    for token in ending_ids:
        row = (embedding[token].astype(np.uint32) << 16).view(np.float32) * np.float32(ENDING_FACTOR)
        embedding[token] = _bfloat16(row)
    embedding.flush()
    return end
