"""Run `synth` commands in this process, which is fast, or in a new process."""

import asyncio
import functools
import gc
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import pytest
import typer
from typer.main import get_command

from pipeline.images import isolation

REPLIES = "SYNTH_TEST_REPLIES"
SYNTH = Path(sys.executable).with_name("synth")
# These caches depend on no environment and no user file, so they stay between commands.
KEPT_CACHES = ("_pool", "_compiled", "_environment", "_template", "code_digest", "dictionary_words", "names")
Done = subprocess.CompletedProcess[str]


def run_process(*arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> Done:
    """Run `synth ARGUMENTS` in a new process."""
    command = [str(SYNTH), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def run_python(*arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> Done:
    """Run `python ARGUMENTS` successfully in a new process."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    return require_success(done)


def run_synth(*arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> Done:
    """Run `synth ARGUMENTS` in this process, with its own folder, environment and streams."""
    command = [str(SYNTH), *map(str, arguments)]
    temporary = tempfile.TemporaryFile
    with temporary("w+") as out, temporary("w+") as errors, Path(os.devnull).open() as nothing:
        with pytest.MonkeyPatch.context() as patch, _streams(nothing, out, errors):
            patch.chdir(cwd)
            patch.setattr(sys, "path", [*sys.path])
            patch.setattr(sys, "argv", command)
            # click derives the program name from __package__
            patch.setattr(sys.modules["__main__"], "__package__", None)
            for name, stream in (("stdin", nothing), ("stdout", out), ("stderr", errors)):
                patch.setattr(sys, name, stream)
            # keep the decoder processes for the next command
            patch.setattr(isolation, "end_workers", lambda: None)
            patch.setattr(typer.main, "get_command", _command_of)
            _remember_replies(patch)
            with _environment(os.environ if env is None else env):
                code = _run_main(cwd)
        out.seek(0), errors.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), errors.read())


def require_success(done: Done) -> Done:
    assert done.returncode == 0, done.stderr
    return done


def read_result(done: Done) -> dict[str, Any]:
    """Return the JSON object that a successful command printed."""
    return dict(json.loads(require_success(done).stdout))


@functools.cache
def _command_of(app: typer.Typer) -> Any:
    """Return the command line of an app, which takes 40 ms to build."""
    return get_command(app)


def _run_main(folder: Path) -> int:
    """Run the command line, restore the global state, and return the exit code."""
    from pipeline.cli import main

    for name, module in [*sys.modules.items()]:
        # a cache may hold the environment or a file of an earlier command
        if name.startswith(("pipeline.", "trainer.")):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper) and value.__name__ not in KEPT_CACHES:
                    value.cache_clear()
    thresholds, modules = gc.get_threshold(), {*sys.modules}
    loop = asyncio._get_running_loop()  # an open test browser runs an event loop
    asyncio._set_running_loop(None)
    try:
        main()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except Exception:  # noqa: BLE001  # as Python prints it
        traceback.print_exc()
        return 1
    finally:
        asyncio._set_running_loop(loop)
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        for name in {*sys.modules} - modules:  # unload modules imported from the user's folder
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                del sys.modules[name]
    return 0


@contextmanager
def _streams(*files: TextIO) -> Iterator[None]:
    """Replace the standard streams of this process and of its children."""
    kept = [os.dup(number) for number in range(len(files))]
    try:
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
        yield
    finally:
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    set_environment(dict(variables))
    try:
        yield
    finally:
        set_environment(before)


def set_environment(variables: dict[str, str]) -> None:
    """Replace the environment, and reload the constants that huggingface_hub reads from it at import."""
    if variables != dict(os.environ):
        os.environ.clear()
        os.environ.update(variables)
        importlib.reload(importlib.import_module("huggingface_hub.constants"))


def _remember_replies(patch: pytest.MonkeyPatch) -> None:
    """Let embedded engines store their replies on disk, and reuse stored ones."""
    from pipeline.inference import engines
    from pipeline.types import Reply

    folder, load = Path(os.environ[REPLIES]), engines._embedded

    def load_remembering(*arguments: Any) -> Any:
        engine: Any = load(*arguments)
        ask_model = engine._answer

        def answer(requests: list[Any]) -> list[Any]:
            keys = [repr(request).encode() for request in requests]
            files = [folder / hashlib.sha256(key).hexdigest() for key in keys]
            new = [n for n, file in enumerate(files) if not file.exists()]
            for n, reply in zip(new, ask_model([requests[n] for n in new]) if new else [], strict=True):
                scratch = files[n].with_suffix(f".{os.getpid()}")
                scratch.write_text(json.dumps(asdict(reply)), encoding="utf-8")
                scratch.rename(files[n])
            replies = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            engine._tokens += sum(reply["reply_tokens"] for n, reply in enumerate(replies) if n not in new)
            return [Reply(**reply) for reply in replies]

        engine._answer = answer
        return engine

    patch.setattr(engines, "_embedded", load_remembering)
