"""Estimate the GPU memory that vLLM needs for a model, and choose limits that fit a card.

vLLM uses a share of the card (`--gpu-memory-utilization`). The KV cache gets the memory that the weights,
CUDA graphs and activations leave. All figures are estimates from shapes.
"""

from collections.abc import Mapping
from itertools import count
from math import ceil, floor
from typing import Any, NamedTuple

GIB = 2**30
MAX_UTILIZATION = 0.92
FREE_GIB = 0.5
# CUDA graphs, CUDA's context and the buffers of libraries need this memory.
GRAPHS_GIB = 1.0
MIN_KV_FRAC = 0.75  # the KV cache gets at least this share of the memory left by weights and graphs
BATCHED_TOKENS = (16_384, 8192, 4096, 2048)  # more tokens per step are faster, and need more memory
MIN_SEQS, MAX_SEQS = 16, 512
PROMPT_TOKENS = 512  # assumed for the text of a prompt and its reply
MIN_CONTEXT = 4096
# Model types whose processor accepts `max_pixels`.
QWEN_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class ModelShape(NamedTuple):
    """The sizes of a model that decide how much memory it needs."""

    weights_bytes: int
    hidden: int
    intermediate: int
    kv_token_bytes: int
    vocab: int
    vision_hidden: int
    vision_intermediate: int
    # One image token covers a square with sides of this length.
    token_px: int

    @classmethod
    def of(cls, config: Mapping[str, Any], weights_bytes: int) -> "ModelShape | None":
        """Return the shape from the values of config.json, or None if it is not a model of QWEN_TYPES."""
        if config.get("model_type") not in QWEN_TYPES:
            return None
        text, vision = config.get("text_config") or config, config["vision_config"]
        names = ("hidden_size", "intermediate_size", "num_hidden_layers")
        hidden, intermediate, layers = (text[name] for name in names)
        heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
        head = text.get("head_dim") or hidden // heads
        vision_hidden = vision.get("hidden_size") or vision["embed_dim"]
        vision_intermediate = vision.get("intermediate_size") or 4 * vision_hidden
        return cls(
            weights_bytes, hidden, intermediate, layers * 2 * kv_heads * head * 2, text["vocab_size"],
            vision_hidden, vision_intermediate, vision["patch_size"] * vision.get("spatial_merge_size", 2),
        )  # fmt: skip


QWEN_3B = ModelShape(
    weights_bytes=7_509_245_952, hidden=2048, intermediate=11_008, kv_token_bytes=36_864,
    vocab=151_936, vision_hidden=1280, vision_intermediate=3420, token_px=28,
)  # fmt: skip


class MemoryPlan(NamedTuple):
    """Limits for vLLM, and the number of tokens in the KV cache."""

    utilization: float
    batched_tokens: int
    num_seqs: int
    model_len: int
    kv_tokens: int

    @property
    def fits(self) -> bool:
        """Whether the KV cache holds at least one request."""
        return self.kv_tokens >= MIN_CONTEXT


def choose_utilization(total_gib: float, free_gib: float) -> float:
    """Return the share of a card's memory for vLLM: at most MAX_UTILIZATION, and FREE_GIB stay free."""
    return floor(100 * min(MAX_UTILIZATION, (free_gib - FREE_GIB) / total_gib)) / 100


def plan_memory(
    shape: ModelShape, total_gib: float, free_gib: float, max_pixels: int, context: int
) -> MemoryPlan:
    """Choose the limits of a server on a card. Images have at most `max_pixels`.

    Chooses the most tokens per step that leave MIN_KV_FRAC of the remaining memory to the KV cache.
    """
    utilization = choose_utilization(total_gib, free_gib)
    room_gib = utilization * total_gib - shape.weights_bytes / GIB - GRAPHS_GIB
    image_tokens = ceil(max_pixels / shape.token_px**2)
    sequences = room_gib * MIN_KV_FRAC * GIB / shape.kv_token_bytes / (image_tokens + PROMPT_TOKENS)
    num_seqs = MIN_SEQS
    while 2 * num_seqs <= min(sequences, MAX_SEQS):
        num_seqs *= 2
    for batched_tokens in BATCHED_TOKENS:
        patches = 4 * max(batched_tokens, image_tokens)
        # Activations of the MLP, the largest layer (gate, up and their product), plus attention and
        # residuals.
        vision_gib = 2 * patches * (3 * shape.vision_intermediate + 6 * shape.vision_hidden) / GIB
        text_gib = 2 * batched_tokens * (3 * shape.intermediate + 6 * shape.hidden) / GIB
        # vLLM holds the scores in float32, their sorted copy and their softmax.
        text_gib += 3 * 4 * num_seqs * shape.vocab / GIB
        kv_gib = room_gib - max(vision_gib, text_gib)
        if kv_gib >= MIN_KV_FRAC * room_gib:
            break
    kv_tokens = max(0, int(kv_gib * GIB / shape.kv_token_bytes))
    model_len = min(context, kv_tokens) if kv_tokens >= MIN_CONTEXT else context
    return MemoryPlan(utilization, batched_tokens, num_seqs, model_len, kv_tokens)


def needed_gib(shape: ModelShape, max_pixels: int) -> float:
    """Return the GPU memory that must be free for a model to run, in steps of a quarter GiB."""
    sizes = (number / 4 for number in count(1))
    return next(gib for gib in sizes if plan_memory(shape, gib, gib, max_pixels, MIN_CONTEXT).fits)
