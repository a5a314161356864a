"""Audit Python while it reads untrusted input: it may not run code, connect, or open other files."""

import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import SynthError

_RUNS = {
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system",
    "pty.spawn", "subprocess.Popen", "ctypes.dlopen", "webbrowser.open",
}  # fmt: skip
_FETCHES = {
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request",
    "ftplib.connect",
}  # fmt: skip
_UNPICKLES = {"pickle.find_class"}
_PYTHON = (*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, *sys.path)
_TRUSTED = tuple(map(os.path.realpath, (*_PYTHON, str(Path(__file__).parents[2]), "/usr", "/lib")))
_OPENED = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/localtime", "/etc/mime.types", "/dev/shm/")


class Watch:
    """Records violations outside of the `allowed` folders."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        self.violations: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in _RUNS or event in _FETCHES:
            self.violations.append(f"{event} {arguments[:2]!r}"[:200])
        elif event == "open":
            self._opened(arguments)
        elif event in _UNPICKLES and not str(arguments[0]).startswith(
            ("torch", "collections", "numpy", "builtins", "_codecs")
        ):
            self.violations.append(f"{event} {arguments!r}"[:200])

    def _opened(self, arguments: tuple[Any, ...]) -> None:
        path, mode, flags = arguments
        if not isinstance(path, str | bytes | os.PathLike):
            return
        allowed, self.allowed = self.allowed, None  # pause the audit during realpath
        real = os.path.realpath(os.fsdecode(path))
        opens_to_write = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or opens_to_write
        is_own = real.startswith(allowed or ())
        if (
            not is_own
            and (writes or not real.startswith((*_TRUSTED, *_OPENED)))
            and not real.endswith(".pyc")
        ):
            self.violations.append(f"open {real} {mode} {flags}")
        self.allowed = allowed

    @contextmanager
    def reading(self, *folders: Path) -> Iterator[None]:
        """Allow reading and writing of these folders only, and record violations."""
        self.allowed = tuple(os.path.realpath(folder) for folder in folders)
        try:
            yield
        finally:
            self.allowed = None


def attempt(act: Callable[[], Any]) -> tuple[str, Any]:
    """Call a function, and return its outcome in words and its result."""
    try:
        return "done", act()
    except SynthError as error:
        return f"error: {error}", None
    except BaseException as error:  # noqa: BLE001  # what no user should see
        return f"TRACEBACK {type(error).__name__}: {error}", None
