"""Run the whole workflow as a user would type it, without a network: `make demo`.

Each step is a separate process. The Hub is the test server of tests/hub, on loopback; the clients are the real ones.
"""

import json
import os
import shlex
import subprocess
import sys
import time
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


class Demo:
    """Run steps in one folder, and record the duration and the output location of each."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self.steps: list[tuple[str, float, str]] = []

    def step(self, name: str, *command: str) -> str:
        """Run a command, show it, and return the last line of its stdout."""
        command_line = shlex.join(argument if len(argument) < 60 else "..." for argument in command)
        print(f"\n$ {command_line}", flush=True)
        started = time.monotonic()
        done = subprocess.run(command, cwd=HERE, env=self.env, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            sys.exit(f"demo: {name} failed with exit code {done.returncode}")
        lines = done.stdout.strip().splitlines()
        self.steps.append((name, time.monotonic() - started, ""))
        return lines[-1] if lines else ""

    def record_location(self, location: str) -> None:
        """Record where the last step wrote its result."""
        name, seconds, _ = self.steps[-1]
        self.steps[-1] = (name, seconds, location)


def main() -> None:
    """Run all steps and print a summary."""
    HERE.mkdir(exist_ok=True)
    synth = str(Path(sys.executable).with_name("synth"))
    with running_hub(HERE / "hub") as hub:
        demo = Demo(hub.env((HERE / "cache").absolute()) | {"HF_HUB_OFFLINE": "0"})
        generated = json.loads(demo.step("generate", synth, "generate", "--source", "scenes", "--limit", str(SCENES), "--json"))
        demo.record_location(str(HERE / generated["path"]))
        url = demo.step("push", synth, "push", "--repo", REPO)
        demo.record_location(f"{url} (gone when the demo ends)")
        demo.step("load back", sys.executable, "-c", LOAD.replace("TAG", generated["version"]))
        demo.record_location(f"the tag {generated['version']} of {REPO}")
        checkpoint = demo.step("train and score", synth, "train", "--encoder", ENCODER, "--steps", str(TRAIN_STEPS))
        demo.record_location(str(HERE / checkpoint))
        image = "example.png"
        (HERE / image).write_bytes(draw_sample(seed=123, index=0).images[0])  # a scene of another seed is in no split
        demo.step("caption it", synth, "caption", checkpoint, image)
        report = demo.step("report", synth, "report")
        demo.record_location(str(HERE / report))
    metrics = json.loads((HERE / checkpoint / "metrics.json").read_text(encoding="utf-8"))
    print(f"\n{'step':<16} {'seconds':>8}   where")
    for name, seconds, location in demo.steps:
        print(f"{name:<16} {seconds:8.1f}   {location}")
    print(f"{'in all':<16} {sum(seconds for _, seconds, _ in demo.steps):8.1f}")
    own, shuffled = (metrics[name]["cider_d"] for name in ("scores", "shuffled_scores"))
    print(f"\nCIDEr-D on {metrics['images']} held-out scenes: {own:.2f}; with shuffled images: {shuffled:.2f}")


if __name__ == "__main__":
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    main()
