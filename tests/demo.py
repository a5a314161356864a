"""Run the whole workflow as a user would type it, without a network: `make demo`."""

import json
import os
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from pipeline.sources.scenes import draw_sample
from tests.hub.server import running_hub

HERE = Path("demo")
SCENES = 1100
TRAIN_STEPS = 200
ENCODER = "tiny-clip"
REPO = "me/scenes"
LOAD = f"""
from datasets import load_dataset
dataset = load_dataset("{REPO}", revision="TAG")
row = dataset["test"][0]
print(dataset)
print(row["image"].size, row["captions"][0]["text"], row["qa"][0]["question"], row["qa"][0]["answer"])
"""


def run_step(name: str, *command: str, env: dict[str, str], seconds: dict[str, float]) -> str:
    """Run a command, print it, and return the last line of its stdout."""
    print(f"\n$ {shlex.join(argument if len(argument) < 60 else '...' for argument in command)}", flush=True)
    started = time.monotonic()
    done = subprocess.run(command, cwd=HERE, env=env, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"demo: {name} failed with exit code {done.returncode}")
    seconds[name] = time.monotonic() - started
    return (done.stdout.strip().splitlines() or [""])[-1]


def main() -> None:
    HERE.mkdir(exist_ok=True)
    synth, seconds = str(Path(sys.executable).with_name("synth")), dict[str, float]()
    with running_hub(HERE / "hub") as hub:
        env = hub.env((HERE / "cache").absolute()) | {
            "HF_HUB_OFFLINE": "0",
            "PYTHONWARNINGS": "ignore:Cannot enable progress bars",
        }
        step = partial(run_step, env=env, seconds=seconds)
        source = ("--source", "scenes", "--limit", str(SCENES))
        generated = json.loads(step("generate", synth, "generate", *source, "--json"))
        step("push", synth, "push", "--repo", REPO)
        step("load back", sys.executable, "-c", LOAD.replace("TAG", generated["version"]))
        training = ("--encoder", ENCODER, "--steps", str(TRAIN_STEPS))
        checkpoint = step("train and score", synth, "train", *training)
        image = "example.png"
        # the dataset has another seed, so this scene is in no split
        (HERE / image).write_bytes(draw_sample(seed=123, index=0).images[0])
        step("caption it", synth, "caption", checkpoint, image)
        report = step("report", synth, "report")
    metrics = json.loads((HERE / checkpoint / "metrics.json").read_text(encoding="utf-8"))
    for name, duration in (seconds | {"in all": sum(seconds.values())}).items():
        print(f"{name:<16} {duration:8.1f} s")
    print(f"\ndataset {HERE / generated['path']}, captioner {HERE / checkpoint}, report {HERE / report}")
    own, shuffled = (metrics[name]["cider_d"] for name in ("scores", "shuffled_scores"))
    print(f"CIDEr-D on {metrics['images']} held-out scenes: {own:.2f}; with shuffled images: {shuffled:.2f}")


if __name__ == "__main__":
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    main()
