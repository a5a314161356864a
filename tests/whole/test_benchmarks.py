"""The benchmark of training runs where there is no GPU, too: whoever has one can trust that it starts."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from trainer.devices import multiplies_bfloat16

ROOT = Path(__file__).parents[2]


def test_the_training_benchmark_measures_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/train_gpu.py"), "--cpu", "--rounds", "1", "--images", "2"]
    done = subprocess.run([*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    precisions = ("fp32", "bf16") if multiplies_bfloat16(torch.device("cpu")) else ("fp32",)
    assert [(row["decoder"], row["precision"], row["texts"]) for row in figures["steps"]] == [
        *product(("192 x 3", "512 x 6"), precisions, ("packed", "apart"))
    ]
    assert all(row["captions_per_s"] > 0 and row["of_the_floor"] > 0 for row in figures["steps"])
    assert len(figures["captions_per_s"]) == 4 and all(min(pair) > 0 for pair in figures["captions_per_s"].values())
    assert figures["read_images_per_s"] > figures["stored_images_per_s"] > 0


def test_without_a_gpu_it_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("NOT RUN: there is a GPU")
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/train_gpu.py")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--cpu measures a little on the CPU" in done.stderr
