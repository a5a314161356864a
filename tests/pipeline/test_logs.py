"""Log records are appended to a file of the folder, and to stderr on request."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import logs
from tests.commands import run_python


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    roots = [logging.getLogger(name) for name in ("pipeline", "trainer")]
    before = [(root.handlers[:], root.level, root.propagate) for root in roots]
    yield
    for root, (handlers, level, propagates) in zip(roots, before, strict=True):
        root.handlers[:], root.level, root.propagate = handlers, level, propagates


def test_log_file_is_created_by_the_first_record_and_closed_after_the_context(tmp_path: Path) -> None:
    log = logging.getLogger("pipeline.storage.lock")
    with logs.log_to(tmp_path):
        assert list(tmp_path.iterdir()) == []
        log.warning("not renewed: %s", "the store was away")
        log.debug("a detail")
    log.warning("too late")
    (line,) = (tmp_path / logs.FILE).read_text().splitlines()
    assert line.endswith("WARNING pipeline.storage.lock: not renewed: the store was away")


def test_log_enabled_twice_in_one_folder_has_each_record_once(tmp_path: Path) -> None:
    logs.keep_log_in(tmp_path)
    logs.keep_log_in(tmp_path)
    logging.getLogger("pipeline.executors").warning("once")
    assert (tmp_path / logs.FILE).read_text().count("once") == 1


def test_show_log_prints_debug_records_to_stderr(tmp_path: Path) -> None:
    code = "import logging, pipeline.logs as logs; logs.show_log(); logging.getLogger('trainer.x').debug('x')"
    result = run_python("-c", code, cwd=tmp_path)
    assert "DEBUG trainer.x: x" in result.stderr
    assert result.stdout == ""
