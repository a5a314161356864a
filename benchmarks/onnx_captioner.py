"""Compare a captioner in PyTorch with its export to ONNX, in floats and with weights of 8 bits, on one core.

    python benchmarks/onnx_captioner.py CHECKPOINT DATASET [--images 200]

Prints images a second of captioning files, CIDEr-D against the references of the test split, how many captions are the same,
seconds from the start of a process to its first caption, and megabytes of the parts. Each runs in a process of its own that
may use one core.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUNS = ("torch", "onnx", "int8")
BATCH = 16


def caption(run: str, model: Path, photos: list[str]) -> dict[str, Any]:
    """Caption photos after the first one; return the captions, and seconds."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if run == "torch":
        from trainer import Captioner

        captioner = Captioner.from_pretrained(model, device="cpu")
        write: Callable[[list[str]], list[str]] = lambda paths: captioner.caption(paths, batch_size=BATCH, num_beams=1)  # noqa: E731
    else:
        sys.path.append(str(model))
        from caption import OnnxCaptioner  # type: ignore[import-not-found]  # beside the export

        exported: Any = OnnxCaptioner(model, int8=run == "int8")
        write = lambda paths: [one for n in range(0, len(paths), BATCH) for one in exported.caption(paths[n : n + BATCH])]  # noqa: E731
    write(photos[:1])
    first_s = time.clock_gettime(time.CLOCK_BOOTTIME) - _started_s()
    start = time.monotonic()
    texts = write(photos)
    return {"texts": texts, "seconds": time.monotonic() - start, "first_s": first_s}


def _started_s() -> float:
    """Return when this process began, in seconds since the machine's start."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Export, measure each run in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        run, model = arguments.measure
        print(json.dumps(caption(run, Path(model), sys.stdin.read().split("\n"))))
        return
    from pipeline.dataset.directory import open_dataset
    from pipeline.progress import NullProgress
    from trainer.metrics import cider_d, tokenize
    from trainer.publish.onnx_export import export_onnx

    version = open_dataset(arguments.dataset)
    rows = version.read("test", ["sample_id", "image", "references"]).slice(0, arguments.images).to_pylist()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for row in rows:
            (root / f"{row['sample_id']}.png").write_bytes(row["image"]["bytes"])
        photos = "\n".join(str(root / f"{row['sample_id']}.png") for row in rows)
        exported = root / "exported"
        sizes = export_onnx(arguments.checkpoint, exported, NullProgress(), int8=True)
        results = {}
        for run in RUNS:
            model = arguments.checkpoint if run == "torch" else exported
            command = [
                sys.executable,
                __file__,
                str(arguments.checkpoint),
                str(arguments.dataset),
                "--measure",
                run,
                str(model),
            ]
            done = subprocess.run(command, input=photos, capture_output=True, text=True, check=True)
            results[run] = json.loads(done.stdout.splitlines()[-1])
    references = [[tokenize(text) for text in row["references"]] for row in rows]
    megabytes = {
        "torch": (arguments.checkpoint / "model.safetensors").stat().st_size,
        "onnx": sum(size for name, size in sizes.items() if name.endswith(".onnx") and "quantized" not in name),
        "int8": sum(size for name, size in sizes.items() if "quantized" in name),
    }
    print("| run | images/s | first caption | CIDEr-D | same captions | MB |\n|---|---|---|---|---|---|")
    for run, found in results.items():
        score = sum(cider_d([tokenize(text) for text in found["texts"]], references)) / len(rows)
        same = sum(one == other for one, other in zip(found["texts"], results["torch"]["texts"], strict=True))
        speed = len(rows) / found["seconds"]
        first = f"{found['first_s']:.2f} s"
        print(f"| {run} | {speed:.1f} | {first} | {score:.3f} | {same}/{len(rows)} | {megabytes[run] / 1e6:.1f} |")


if __name__ == "__main__":
    main()
