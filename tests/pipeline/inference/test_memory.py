"""Memory plan: the limits of vLLM on each card, from the shape of a model."""

from typing import Any

import pytest

from pipeline.inference.memory import QWEN_3B, ModelShape, needed_gib, plan_memory
from pipeline.tasks.base import MAX_PIXELS

# The published values of Qwen2.5-VL-3B-Instruct that decide its memory.
CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151_936,
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14, "spatial_merge_size": 2,
    },
}  # fmt: skip


def test_model_shape_is_read_from_the_config_of_a_supported_model_type() -> None:
    assert ModelShape.of(CONFIG, 7_509_245_952) == QWEN_3B
    text = {name: value for name, value in CONFIG.items() if name not in ("vision_config", "model_type")}
    nested = {"model_type": "qwen3_vl", "text_config": text | {"head_dim": 128}}
    vision = CONFIG["vision_config"] | {"patch_size": 16}
    shape = ModelShape.of(nested | {"vision_config": vision}, 1)
    assert shape and shape.token_px == 32 and shape.kv_token_bytes == QWEN_3B.kv_token_bytes
    assert ModelShape.of({"model_type": "llava"}, 1) is None


@pytest.mark.parametrize(
    ("card_gib", "fits", "batched_tokens", "num_seqs"),
    [
        (8, False, 2048, 16),
        (12, True, 4096, 32),
        (16, True, 8192, 64),
        (24, True, 16_384, 128),
        (40, True, 16_384, 256),
        (80, True, 16_384, 512),
    ],
)
def test_memory_plan_of_the_default_model_grows_with_gpu_memory(
    card_gib: int, batched_tokens: int, num_seqs: int, *, fits: bool
) -> None:
    plan = plan_memory(QWEN_3B, card_gib, card_gib, MAX_PIXELS, 8192)
    assert (plan.fits, plan.batched_tokens, plan.num_seqs) == (fits, batched_tokens, num_seqs)
    used_gib = plan.weights_gib + max(plan.vision_gib, plan.text_gib) + plan.kv_gib
    assert used_gib < 0.92 * card_gib
    assert not fits or plan.model_len == 8192
    assert fits == (card_gib > needed_gib(QWEN_3B, MAX_PIXELS))


def test_memory_plan_leaves_memory_for_other_programs_and_shortens_the_context_to_the_kv_cache() -> None:
    plan = plan_memory(QWEN_3B, 24, 14, MAX_PIXELS, 8192)
    assert plan.utilization == 0.56 and plan.fits
    assert not plan_memory(QWEN_3B, 24, 8, MAX_PIXELS, 8192).fits
    plan = plan_memory(QWEN_3B, 10, 10, MAX_PIXELS, 128_000)
    assert 4096 <= plan.model_len == plan.kv_tokens < 128_000
