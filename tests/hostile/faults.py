"""Run a command of `synth` in a forked process in which the N-th write fails or kills the process."""

import builtins
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet as pq

import pipeline.hub.pull
import pipeline.hub.push  # noqa: F401  # before the fork, as it takes a second
from pipeline.cli import main
from pipeline.inference.journal import Journal
from tests.commands import set_environment

KILLED = 137
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    output: str
    writes: int


def opens_to_write(path: Any, mode: str = "r", *more: Any, **options: Any) -> bool:
    return bool(set(mode) & set("wax+"))


class _Faults:
    """Counts writes within a folder, and lets one of them fail or crash."""

    def __init__(self, folder: Path, number: int, mode: str) -> None:
        self.folder, self.number, self.mode, self.count = os.path.realpath(folder), number, mode, 0

    def hit(self, path: Any) -> None:
        if isinstance(path, str | os.PathLike) and not os.path.realpath(path).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.number:
            if self.mode == "crash":
                os._exit(KILLED)
            code = errno.ENOSPC if self.mode == "full" else errno.EIO
            raise OSError(code, "No space left on device", str(path))

    def wrap(
        self, owner: Any, name: str, position: int = 0, is_write: Callable[..., bool] = lambda *a, **k: True
    ) -> None:
        """Count the calls of a function as writes."""
        real = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            if is_write(*arguments, **options):
                self.hit(arguments[position] if len(arguments) > position else None)
            return real(*arguments, **options)

        setattr(owner, name, counted)

    def install(self) -> None:
        for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "fsync", "truncate"):
            self.wrap(os, name)
        self.wrap(os, "link", position=1)
        self.wrap(os, "open", is_write=lambda path, flags, *more, **options: bool(flags & _WRITES))
        for owner in (builtins, io):
            self.wrap(owner, "open", is_write=opens_to_write)
        for name in ("__init__", "write_table", "close"):
            self.wrap(pq.ParquetWriter, name, position=9)
        for name in ("keep", "record_sent"):
            self.wrap(Journal, name, position=9)


def run(
    folder: Path,
    *arguments: str,
    number: int = 0,
    mode: str = "crash",
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run a command in a folder, with a crash or a disk error at write `number`."""
    log, counted = folder.with_name(f"{folder.name}.log"), folder.with_name(f"{folder.name}.count")
    counted.write_text("0")
    child = os.fork()
    if child == 0:
        _run_here(folder, number, mode, arguments, environment or dict(os.environ))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Outcome(code, log.read_text(errors="replace"), int(counted.read_text()))


def _run_here(
    folder: Path, number: int, mode: str, arguments: Sequence[str], environment: dict[str, str]
) -> NoReturn:
    log, counted = folder.with_name(f"{folder.name}.log"), folder.with_name(f"{folder.name}.count")
    code = 70
    try:
        os.chdir(folder)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(handle, stream)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for stream in (1, 2))
        sys.argv = ["synth", *arguments]
        set_environment(environment)
        faults = _Faults(folder, number, mode)
        faults.install()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001  # what no user should see
            traceback.print_exc()
            code = 71
        os.write(os.open(counted, os.O_WRONLY | os.O_TRUNC), str(faults.count).encode())
    finally:
        os._exit(code)
