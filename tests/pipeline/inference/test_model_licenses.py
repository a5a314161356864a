"""Licenses of models by name."""

import pytest

from pipeline.inference.model_licenses import UNKNOWN_LICENSE, license_of

RESEARCH = "Qwen Research License: no commercial use"


@pytest.mark.parametrize(
    ("model", "stated"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", RESEARCH),
        ("/models/Qwen2.5-VL-3B-Instruct/", RESEARCH),
        ("Qwen2.5-VL-3B-Instruct@c0ffee", RESEARCH),
        ("qwen2.5vl:3b", RESEARCH),
        ("someone/my-Qwen2.5-VL-3B-medical", RESEARCH),
        ("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "Apache-2.0"),
        ("qwen2.5vl:7b-q4_K_M", "Apache-2.0"),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct-FP8", "Apache-2.0"),
        ("tiny", "Apache-2.0"),
        ("Qwen/Qwen2.5-VL-72B-Instruct", UNKNOWN_LICENSE),
        # A fine-tuned copy may have other terms than its base model.
        ("someone/Qwen2.5-VL-7B-medical", UNKNOWN_LICENSE),
        ("/data/qwen3-vl/llama", UNKNOWN_LICENSE),
        ("gpt-5", UNKNOWN_LICENSE),
    ],
)
def test_license_follows_the_name_of_the_model(model: str, stated: str) -> None:
    assert license_of(model) == stated
