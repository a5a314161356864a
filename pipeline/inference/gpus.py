"""The GPUs that a process on this machine may use, without torch: what nvidia-smi lists, as CUDA_VISIBLE_DEVICES selects it."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

# Of `nvidia-smi -L`: a GPU, or an instance of one that is split (MIG), which stands below it.
_LISTED = re.compile(r"^(?:GPU \d+|\s+MIG \S+\s+Device\s+\d+): ?.*?\(UUID: ((?:GPU|MIG)-[^)]+)\)", re.MULTILINE)
BFLOAT16_CAPABILITY = 8.0  # NVIDIA's compute capability, from Ampere on; a T4 has 7.5
_KINDS = ("GPU-", "MIG-")
_PARALLEL = {  # flags of vLLM by which one server uses several GPUs
    "--tensor-parallel-size": "tensor", "-tp": "tensor",
    "--pipeline-parallel-size": "pipeline", "-pp": "pipeline",
    "--data-parallel-size": "data", "-dp": "data",
}  # fmt: skip


@cache
def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that are visible here, each as a value of CUDA_VISIBLE_DEVICES; none without a driver."""
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)  # noqa: S607
    except (OSError, subprocess.SubprocessError):
        return ()
    return select_gpus(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


@cache
def has_bfloat16() -> bool:
    """Return whether all GPUs of this machine multiply in bfloat16; vLLM refuses it on others. True where nobody can tell."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return all(float(line) >= BFLOAT16_CAPABILITY for line in done.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return True


def select_gpus(listing: str, visible: str | None) -> tuple[str, ...]:
    """Return the GPUs of a listing of `nvidia-smi -L` that CUDA_VISIBLE_DEVICES selects; all if it is not set.

    As the driver does: names are numbers or UUIDs, of the kind of the first one; all after an invalid one are ignored; a GPU
    named twice hides all. Instances of split GPUs are visible one by one.
    """
    uuids: list[str] = _LISTED.findall(listing)
    gpus, instances = ([uuid for uuid in uuids if uuid.startswith(kind)] for kind in _KINDS)
    if visible is None:
        split = {uuid for uuid, after in pairwise(uuids) if uuid in gpus and after in instances}
        return (*(uuid for uuid in gpus if uuid not in split), *instances) if split else tuple(map(str, range(len(gpus))))
    kind = visible.strip()[:4]
    chosen: dict[str, str] = {}
    for name in (part.strip() for part in visible.split(",")):
        if kind in _KINDS:
            matching = [uuid for uuid in uuids if name.startswith(kind) and uuid.startswith(name)]
            value = matching[0] if matching else ""  # in full: vLLM knows no abbreviated UUID
        else:
            number = re.match(r"\+?(\d+)", name)
            matching = gpus[int(number[1]) :][:1] if number else []
            value = str(int(number[1])) if number else ""
        if len(matching) != 1:
            break
        if matching[0] in chosen:
            return ()
        chosen[matching[0]] = value
    return tuple(chosen.values())


def split_flag(flag: str) -> list[str]:
    """Return `--name=value` as name and value; vLLM takes underscores in names for hyphens."""
    name, equals, value = flag.partition("=")
    return [name.replace("_", "-") if name.startswith("-") else name, *([value] if equals else [])]


def group_gpus(gpus: Sequence[str], flags: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the GPUs of each server: one each, or as many as the user's flags give to one; () is a server without a GPU."""
    words = [word for flag in flags for word in split_flag(flag)]
    sizes = {_PARALLEL[word]: value for word, value in pairwise(words) if word in _PARALLEL}
    if not gpus or "data" in sizes or not all(value.isdigit() and int(value) for value in sizes.values()):
        return [tuple(gpus)]
    size = int(sizes.get("tensor", "1")) * int(sizes.get("pipeline", "1"))
    whole = [tuple(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)]
    return whole or [tuple(gpus)]
