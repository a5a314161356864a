"""Resolve all extras together with vLLM, for the table of docs/install.md: `make resolve`."""

import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
UV = str(Path(sys.executable).with_name("uv"))
PYTHONS = ("3.11", "3.12", "3.13")
RESOLUTIONS = ("highest", "lowest-direct")
# Combinations: no extras, extras without vLLM, and all extras.
EXTRAS = ("", "embedded,train", "gpu,ray,timm,heic,pdf,video,s3,serve")
SHOWN = ("vllm", "torch", "transformers", "numpy", "pillow", "pyarrow", "huggingface-hub", "ray")
PLATFORM = "x86_64-manylinux_2_31"  # llguidance has wheels for this platform


@dataclass(frozen=True, slots=True)
class Resolved:
    """The versions that a set of extras resolves to, or an error."""

    extras: str
    python: str
    resolution: str
    versions: dict[str, str]
    error: str = ""


def resolve(extras: str, python: str, resolution: str) -> Resolved:
    """Resolve this project with some extras, as uv does."""
    requirement = f"synth-captioner{f'[{extras}]' if extras else ''} @ {ROOT.as_uri()}"
    options = ["--quiet", "--no-header", "--no-annotate", "--python-version", python]
    options += ["--python-platform", PLATFORM, "--resolution", resolution]
    command = [UV, "pip", "compile", *options, "-"]
    done = subprocess.run(command, input=requirement, capture_output=True, text=True, cwd=ROOT.parent)
    versions = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", done.stdout, re.MULTILINE))
    return Resolved(extras, python, resolution, versions, done.stderr.strip() if done.returncode else "")


def main() -> None:
    """Print a Markdown table. Exit with 1 if a combination does not resolve."""
    print("| extras | resolution | Python |", " | ".join(SHOWN), "|")
    print("|---|---|---|" + "---|" * len(SHOWN))
    failed = []
    for extras, resolution, python in product(EXTRAS, RESOLUTIONS, PYTHONS):
        result = resolve(extras, python, resolution)
        missing = "**none**" if result.error else "-"
        cells = [result.extras or "core", result.resolution, result.python]
        cells += [result.versions.get(name, missing) for name in SHOWN]
        print("|", " | ".join(cells), "|", flush=True)
        failed += [result] if result.error else []
    for result in failed:
        name = f"{result.extras or 'core'}, {result.resolution}, Python {result.python}"
        print(f"\n{name}:\n{result.error}", file=sys.stderr)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
