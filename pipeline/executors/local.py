"""Run in one process. The dataset folder is the only shard, and each function is applied immediately."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from pipeline.dataset.directory import DatasetDir
from pipeline.inference.engines import open_engines
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.logs import log_to
from pipeline.plan import Plan
from pipeline.progress import Progress
from pipeline.sources.read import SourceReader
from pipeline.steps.base import Services
from pipeline.storage.files import translate_disk_errors

T = TypeVar("T")


class LocalExecutor:
    """Applies functions in this process (see steps.base.Executor). Exiting the context closes the engine.

    The caller must hold the lock of the dataset folder.
    """

    def __init__(self, plan: Plan, stats: RequestStats, progress: Progress) -> None:
        self.plan, self.dataset = plan, plan.dataset
        self.shards = [plan.dataset]
        self._engine = ExitStack()
        engine = self._engine.enter_context(open_engines(plan.engines.__getitem__))
        self._services = Services(plan.dataset, engine, plan.config.servers, stats, progress)

    def __enter__(self) -> "LocalExecutor":
        # Reuse the replies that cluster runs stored in the shards of this dataset folder.
        paths = sorted(self.dataset.path.glob("shards/*/journal/local.sqlite")) if self.plan.source else []
        for path in paths:
            # Merge the write-ahead log that a killed worker may have left.
            with Journal(path):
                pass
            with Journal(self.dataset.journal) as journal:
                journal.import_replies(path, "", "g")
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.close()

    def read(self) -> None:
        """See Executor."""
        plan = self.plan
        assert plan.source is not None
        SourceReader(self.dataset, plan.config, plan.source, self._services.progress).read(plan.config.limit)

    def each(self, work: Callable[[DatasetDir, Services], None]) -> None:
        """See Executor."""
        work(self.dataset, self._services)

    def wait(self) -> None:
        """See Executor. Unloads the model, unless a task has several models that later passes may use."""
        if self.plan.requests.num_rungs == 1:
            self._engine.close()

    def begin_pass(self, escalations: str) -> None:
        """See Executor."""

    def map_with_scratch(self, work: Callable[[DatasetDir, Path], T], draft: Path) -> list[T]:
        """See Executor."""
        path = draft / "rows"
        path.mkdir()
        return [work(self.dataset, path)]

    def check(self) -> None:
        """See Executor."""


@contextmanager
def open_local_executor(plan: Plan, stats: RequestStats, progress: Progress) -> Iterator[LocalExecutor]:
    """Open the dataset folder for a run in this process. Raises StoreError if another process uses it."""
    path, executor = plan.dataset.path, LocalExecutor(plan, stats, progress)
    with translate_disk_errors(path), plan.dataset.lock(), log_to(path), executor:
        yield executor
