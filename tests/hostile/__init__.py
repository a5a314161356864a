"""Attacks by untrusted input: no code runs, no data leaks or is lost, and nothing hangs.

`make test` runs a fixed sample of the cases. `make test-long` runs 20 times as many.
"""

import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

LONG = bool(os.environ.get("SYNTH_LONG"))
T = TypeVar("T")
Damage = Callable[[Path], object]


def part_of(cases: Sequence[T], count: int) -> Sequence[T]:
    """Return a fixed sample of `count` cases, or of 20 times as many in a long run."""
    count *= 20 if LONG else 1
    return cases if len(cases) <= count else random.Random(7).sample(cases, count)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return a copy of data with one random damage."""
    out, kind = bytearray(data), draw.randrange(4)
    if len(out) < 16:
        return bytes(out[:-1])
    end = min(len(out), 2000)
    place = draw.choice([draw.randrange(len(out)), draw.randrange(end), len(out) - 1 - draw.randrange(end)])
    if kind == 0:
        out[place] ^= 1 << draw.randrange(8)
    elif kind == 1:
        out[place : place + 16] = bytes(len(out[place : place + 16]))
    elif kind == 2:
        out = out[:place]
    else:
        other = draw.randrange(len(out))
        out[place : place + 64] = out[other : other + 64]
    return bytes(out)


def link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def outcomes_of(kind: str, folder: Path, out: Path) -> dict[str, Any]:
    """Read all versions or checkpoints of a folder in an audited process. Return the outcomes by name."""
    command = [sys.executable, "-m", "tests.hostile.read_audited", kind, str(folder), str(out)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes: dict[str, Any] = json.loads(done.stdout)
    return outcomes


def require_harmless_outcome(name: str, outcome: dict[str, Any], max_s: float) -> None:
    """Assert that reading an example was harmless and took less than `max_s` seconds."""
    assert outcome["violations"] == []
    assert not [result for result in outcome["results"].values() if result.startswith("TRACEBACK")], outcome
    assert name != "good" or set(outcome["results"].values()) == {"done"}
    assert outcome["seconds"] < max_s


def memory_bytes(name: str = "VmHWM") -> int:
    """Return the memory of this process in bytes: the peak, or the present value with VmRSS."""
    fields = Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()
    return int(fields[0]) * 1024


@contextmanager
def bounded_memory(max_bytes: int) -> Iterator[None]:
    """Fail if the peak resident memory of this process grows by more than `max_bytes`."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = memory_bytes("VmRSS")
    yield
    grown = memory_bytes() - before
    assert grown <= max_bytes, f"{grown:,} bytes"


def limit_memory(max_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def limit_more_memory(max_bytes: int) -> None:
    limit_memory(int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + max_bytes)
