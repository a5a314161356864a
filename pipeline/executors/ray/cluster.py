"""Ray: open a cluster, plan its workers, and apply a function to every shard."""

import logging
import math
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.errors import ClusterError, SynthError, one_line
from pipeline.install import install_command

T = TypeVar("T")
CONNECT_SECONDS = 10
MIN_CLUSTER_CPUS = 2  # Ray reserves a CPU for each reading task, and would wait for one forever
MIN_CPUS = 0.1  # of a worker: it waits for a server most of the time


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """The number of workers that send requests at once, and the CPUs and GPUs of each."""

    workers: int
    cpus: float
    gpus: float


@contextmanager
def open_cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at an address, or start one on this machine that ends with this process. Raises ClusterError."""
    if find_spec("ray") is None:
        raise ClusterError("--executor ray needs the package ray", hint=install_command("ray"))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # no messages about actors that may restart
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    host, _, port = address.rpartition(":")
    options: dict[str, Any] = (
        {"num_cpus": max(MIN_CLUSTER_CPUS, os.cpu_count() or 1), "include_dashboard": False} if address == "local" else {}
    )
    try:
        if port.isdigit() and "/" not in host:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()  # Ray itself tries for minutes
        ended_by = signal.getsignal(signal.SIGTERM)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="synth", **options)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ended_by)  # Ray has set its own, which ends the command without a word
    except (OSError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"no Ray cluster at {address}: {one_line(error)}",
            hint="start one with `ray start --head`; one that wants a token: RAY_AUTH_MODE=token",
        ) from None
    import ray.data  # sets up its own log

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = -1  # a shard may take hours
    with redirect_stdout(sys.stderr):  # Ray prints lost nodes to standard output, which is for results
        try:
            yield
        finally:
            ray.shutdown()


def plan_workers(wanted: int | None, *, loads_model: bool, own_server: bool) -> WorkerPlan:
    """Return the plan for the workers that send requests: one for each GPU, or for each CPU but one.

    If each worker loads a model and there are no GPUs, there is one worker a node: a model takes all of its CPUs. A pool that
    holds every CPU would wait forever for a reading task. Raises ClusterError if the workers do not fit.
    """
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    on_gpus = loads_model and own_server and gpus > 0
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    workers = wanted or max(1, int(gpus if on_gpus else nodes if loads_model else cpus - 1))  # a GPU may be a part of one
    free = cpus - 1  # one is left for reading tasks
    if cpus < MIN_CLUSTER_CPUS or workers * MIN_CPUS > free:
        raise ClusterError(f"{workers} workers do not fit on {cpus:g} CPUs", hint="pass fewer --workers, or add nodes")
    if on_gpus and workers > gpus:
        raise ClusterError(
            f"{workers} workers with a server each do not fit on {gpus:g} GPUs", hint="pass fewer --workers, or --base-url"
        )
    share = math.floor(100 * min(1.0, free / workers)) / 100
    return WorkerPlan(workers, share, 1.0 if on_gpus else 0.0)


def map_on_cluster(
    count: int, work: Callable[[int], T], workers: WorkerPlan | None = None, report: Callable[[int], None] | None = None
) -> list[T]:
    """Apply a function to every index below `count` on the cluster, and return the results in order.

    A worker that dies is replaced, and its indices are repeated: `work` writes files that appear whole or not at all. It is
    pickled; with `workers`, each worker has its own copy, which is exited at the end if it is a context manager. `report`
    receives the number of finished indices. Raises the first SynthError of a worker, and ClusterError if workers died.
    """
    results: dict[int, T] = {}
    for index, result in _map(count, work, workers):
        results[index] = result
        if report:
            report(len(results))
    return [results[index] for index in range(count)]


def _map(count: int, work: Callable[[int], T], workers: WorkerPlan | None) -> Iterator[tuple[int, T]]:
    """Yield (index, result) as results arrive."""
    import ray.data
    import ray.exceptions as lost

    indices = ray.data.range(count, override_num_blocks=count)
    if workers:
        pool = ray.data.ActorPoolStrategy(size=workers.workers)
        outcomes = indices.map_batches(
            _Worker, fn_constructor_args=(work,), batch_size=1, batch_format="pyarrow", compute=pool,
            num_cpus=workers.cpus, num_gpus=workers.gpus,
        )  # fmt: skip
    else:
        outcomes = indices.map_batches(partial(_apply, work), batch_size=1, batch_format="pyarrow")
    try:
        for row in outcomes.iter_rows():
            result, error = pickle.loads(row["outcome"])  # noqa: S301  # of our own workers
            if error:
                raise error
            yield row["id"], result
    except (lost.RayActorError, lost.WorkerCrashedError, lost.OutOfMemoryError, lost.NodeDiedError) as died:
        message = f"workers died again and again: {one_line(died)}"
        raise ClusterError(message, hint="was memory short? the same command goes on with what is done") from None


class _Worker:
    """Keeps a function and its state, such as a server or a model, from index to index."""

    def __init__(self, work: Callable[[int], Any]) -> None:
        self.work = work

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _apply(self.work, batch)

    def __del__(self) -> None:  # Ray drops it before the worker ends
        if isinstance(self.work, AbstractContextManager):
            self.work.__exit__(None, None, None)


def _apply(work: Callable[[int], Any], batch: pa.Table) -> pa.Table:
    rows = []
    for index in batch["id"].to_pylist():
        try:
            outcome: tuple[Any, SynthError | None] = (work(index), None)
        except SynthError as error:
            outcome = (None, error)
        rows.append({"id": index, "outcome": pickle.dumps(outcome)})
    return pa.Table.from_pylist(rows, schema=pa.schema([("id", pa.int64()), ("outcome", pa.binary())]))
