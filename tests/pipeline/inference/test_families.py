"""Families of models: recognized by name, and a run reports boxes that are read in another unit."""

import pytest

from pipeline.config.files import resolve
from pipeline.executors.messages import describe_boxes
from pipeline.inference.engines import find_family


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL"),
        ("qwen2.5vl:3b", "Qwen2.5-VL"),
        ("Qwen2.5-VL-7B-Instruct-AWQ", "Qwen2.5-VL"),
        ("/models/Qwen3-VL-4B/", "Qwen3-VL"),
        ("OpenGVLab/InternVL3-8B-hf", "InternVL3"),
        ("OpenGVLab/InternVL3_5-8B", None),
        ("/data/qwen3-vl-exp/llama", None),
        ("gpt-5", None),
    ],
)
def test_a_family_is_recognized_by_the_name_of_a_model(model: str, family: str | None) -> None:
    found = find_family(model)
    assert (found and found.name) == family


def test_a_run_says_so_if_its_model_writes_boxes_in_another_unit() -> None:
    task = {"name": "things", "kind": "boxes", "prompt": "Find things."}
    config = resolve(source="folder:x", own_tasks=[task])
    (note,) = describe_boxes(config, "Qwen/Qwen3-VL-8B-Instruct")
    assert "Qwen3-VL writes boxes in thousandths, and the task things reads them as pixels" in note
    assert not [*describe_boxes(config, "Qwen/Qwen2.5-VL-3B-Instruct"), *describe_boxes(config, "gpt-5")]
    assert not [*describe_boxes(resolve(source="folder:x"), "Qwen/Qwen3-VL-8B-Instruct")]
    right = resolve(source="folder:x", own_tasks=[task | {"coordinates": "thousandths"}])
    assert not [*describe_boxes(right, "Qwen/Qwen3-VL-8B-Instruct")]
