"""Attacks: with untrusted input, nothing runs, leaks, hangs or is lost. Each kind of input has a table.

`make test` runs a fixed sample of the long sweeps, `make test-long` (SYNTH_LONG=1) all cases.
"""

import os
import random
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

LONG = bool(os.environ.get("SYNTH_LONG"))
T = TypeVar("T")
Damage = Callable[[Path], object]  # changes a folder


def part_of(cases: Sequence[T], count: int) -> Sequence[T]:
    """Return all cases in a long run, else a fixed sample of `count` cases."""
    return cases if LONG or len(cases) <= count else random.Random(7).sample(cases, count)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with one damage: a flipped bit, a hole, a cut, or a moved piece."""
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
    """Return a damage that replaces a file by a link."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def pipe(name: str) -> Damage:
    """Return a damage that replaces a file by a named pipe."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def memory_bytes(name: str = "VmHWM") -> int:
    """Return memory of this process in bytes: VmHWM (the peak) or VmRSS."""
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
    """Limit the address space of this process."""
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def limit_more_memory(max_bytes: int) -> None:
    """Limit the growth of this process's address space."""
    limit_memory(int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + max_bytes)
