"""Other readers: `datasets` by config name, and TRL's trainer without conversion."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

from pipeline.inference.engines import TINY_WEIGHTS
from tests.commands import require_success, run_python, run_synth
from tests.hub.server import running_hub
from tests.whole.conftest import ROOT
from tests.whole.test_import import COUNT, generate_json, photos

__all__ = ["photos"]
TRL = ROOT / ".venv-trl"
LOAD = """
import datasets, pickle, sys
repo = "me/photos"
plain, messages = datasets.load_dataset(repo), datasets.load_dataset(repo, "messages")
streamed = list(datasets.load_dataset(repo, "messages", streaming=True)["train"])
shown = [row["image"].size for row in streamed]
def content(splits):
    texts = {name: part.remove_columns(["image"]).to_list() for name, part in splits.items()}
    return {name: (part.column_names, texts[name]) for name, part in splits.items()}
pickle.dump((content(plain), content(messages), shown), sys.stdout.buffer)
"""
TRAIN = """
import sys
import trl
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

kind, weights, *data = sys.argv[1:]
trainer = getattr(trl, f"{kind}Trainer")(
    model=AutoModelForImageTextToText.from_pretrained(weights),
    args=getattr(trl, f"{kind}Config")(
        output_dir="out", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", max_length=None,
    ),
    train_dataset=load_dataset(*data, split="train"),
    processing_class=AutoProcessor.from_pretrained(weights),
)
before = {name: value.clone() for name, value in trainer.model.named_parameters()}
loss = trainer.train().training_loss
moved = [name for name, value in trainer.model.named_parameters() if not value.equal(before[name])]
print(loss, any("visual" in name for name in moved), any("layers" in name for name in moved))
"""


def train_by_trl(kind: str, *data: str, cwd: Path, env: dict[str, str]) -> None:
    """Train the tiny teacher with a trainer of TRL. Assert that vision and language weights change."""
    assert (TRL / "trl").is_dir(), "TRL is set up by: make .stamps/trl"
    env = env | {"PYTHONPATH": f"{TRL}:{os.environ.get('PYTHONPATH', '')}"}
    done = run_python("-c", TRAIN, kind, TINY_WEIGHTS, *data, cwd=cwd, env=env)
    loss, *moved = done.stdout.split()[-3:]
    assert 0 < float(loss) < 100 and moved == ["True", "True"]


def test_each_config_of_a_pushed_version_loads_and_trl_trains_on_the_version(photos: Path) -> None:
    generate_json(photos, "generate", "--no-model", "--captions", "vqa.jsonl")
    with running_hub(photos / "hub") as hub:
        env = hub.env(photos / "home")
        require_success(run_synth("push", "d", "--repo", "me/photos", cwd=photos, env=env))
        command = [sys.executable, "-c", LOAD]
        loaded = subprocess.run(command, capture_output=True, env=env, timeout=600, cwd=photos)
        assert loaded.returncode == 0, loaded.stderr
        plain, messages, shown = pickle.loads(loaded.stdout)
        train_by_trl("SFT", "me/photos", "messages", cwd=photos, env=env)
    for splits in (plain, messages):
        assert sum(len(rows) for _, rows in splits.values()) == COUNT // 2
    assert len(shown) == len(messages["train"][1]) and all(min(size) > 0 for size in shown)
    for split, (columns, rows) in plain.items():
        assert columns[-1] == "text" and "messages" not in columns
        assert messages[split][0] == ["image", "messages"]
        for row, conversation in zip(rows, messages[split][1], strict=True):
            turns = [turn["content"] for turn in conversation["messages"] if turn["role"] == "assistant"]
            texts = [caption["text"] for caption in row["captions"]] + [pair["answer"] for pair in row["qa"]]
            assert [part["text"] for content in turns for part in content] == texts
            assert row["text"] == row["captions"][0]["text"]
