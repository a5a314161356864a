"""Connect to a Ray cluster, plan its workers, and apply a function to every shard."""

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
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from pipeline.errors import ClusterError, SynthError, one_line
from pipeline.install import install_command

T = TypeVar("T")
CONNECT_TIMEOUT_S = 10
# Ray reserves a CPU for each task that reads its input, and would wait forever if workers used all CPUs.
MIN_CLUSTER_CPUS = 2
MIN_WORKER_CPUS = 0.1
OUTCOMES = pa.schema([("id", pa.int64()), ("outcome", pa.binary())])


class ClusterOptions(NamedTuple):
    """Options for a run on a cluster. Without an address, uses RAY_ADDRESS or starts a local cluster."""

    address: str | None = None
    shards: int | None = None
    workers: int | None = None


class WorkerPlan(NamedTuple):
    """The number of workers that send requests, and the numbers of CPUs and GPUs per worker."""

    workers: int
    cpus: float
    gpus: float


@contextmanager
def open_cluster(address: str | None) -> Iterator[None]:
    """Connect to the cluster at an address, or start one on this machine that ends with this process.

    Raises ClusterError if Ray is not installed or no cluster answers.
    """
    if find_spec("ray") is None:
        raise ClusterError("--executor ray needs the package ray", hint=install_command("ray"))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    host, _, port = address.rpartition(":")
    options: dict[str, Any] = {}
    if address == "local":
        options = {"num_cpus": max(MIN_CLUSTER_CPUS, os.cpu_count() or 1), "include_dashboard": False}
    try:
        # Test the connection first, since Ray would try to connect for minutes.
        if port.isdigit() and "/" not in host:
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        sigterm_handler = signal.getsignal(signal.SIGTERM)
        ray.init(
            address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="synth", **options
        )
        # Restore our handler, since Ray's handler ends the command without a message.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm_handler)
    except (OSError, ValueError, RuntimeError) as error:
        hint = "start one with `ray start --head`; if it needs a token, set RAY_AUTH_MODE=token"
        raise ClusterError(f"no Ray cluster at {address}: {one_line(error)}", hint=hint) from None
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Disable the timeout, since a shard may take hours.
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = -1
    # Ray reports lost nodes on standard output, which is reserved for results.
    with redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            ray.shutdown()


def plan_workers(wanted: int | None, *, loads_model: bool, own_server: bool) -> WorkerPlan:
    """Plan the workers that send requests. `wanted` overrides the default number of workers.

    By default, there is one worker per GPU if workers start servers there, or else one per node if they load
    models, or else one per CPU. One CPU stays free for reading. Raises ClusterError if workers do not fit.
    """
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    on_gpus = loads_model and own_server and gpus > 0
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    workers = wanted or max(1, int(gpus if on_gpus else nodes if loads_model else cpus - 1))
    free = cpus - 1
    if cpus < MIN_CLUSTER_CPUS or workers * MIN_WORKER_CPUS > free:
        raise ClusterError(
            f"{workers} workers do not fit on {cpus:g} CPUs", hint="pass fewer --workers, or add nodes"
        )
    if on_gpus and workers > gpus:
        problem = f"{workers} workers, each with its own server, do not fit on {gpus:g} GPUs"
        raise ClusterError(problem, hint="pass fewer --workers, or --base-url")
    return WorkerPlan(workers, math.floor(100 * min(1.0, free / workers)) / 100, 1.0 if on_gpus else 0.0)


def map_on_cluster(
    count: int,
    work: Callable[[int], T],
    workers: WorkerPlan | None = None,
    report: Callable[[int], None] | None = None,
) -> list[T]:
    """Apply a function to every index below `count` on the cluster, and return the results in order.

    `work` is pickled, and called again if its worker dies. With `workers`, each worker keeps a copy of `work`
    for all its indices, and exits it at the end if it is a context manager. `report` gets the number of
    finished indices. Raises the first SynthError of a worker, or ClusterError if workers die repeatedly.
    """
    import ray.data
    import ray.exceptions as lost

    function: Any = partial(_apply, work)
    options: dict[str, Any] = {}
    if workers:
        pool = ray.data.ActorPoolStrategy(size=workers.workers)
        resources = {"num_cpus": workers.cpus, "num_gpus": workers.gpus}
        function, options = _Worker, {"fn_constructor_args": (work,), "compute": pool, **resources}
    indices = ray.data.range(count, override_num_blocks=count)
    outcomes = indices.map_batches(function, batch_size=1, batch_format="pyarrow", **options)
    results: dict[int, T] = {}
    try:
        for row in outcomes.iter_rows():
            results[row["id"]], error = pickle.loads(row["outcome"])  # noqa: S301
            if error:
                raise error
            if report:
                report(len(results))
    except (lost.RayActorError, lost.WorkerCrashedError, lost.OutOfMemoryError, lost.NodeDiedError) as died:
        hint = "look for out-of-memory kills, then run the same command to resume"
        raise ClusterError(f"workers died repeatedly: {one_line(died)}", hint=hint) from None
    return [results[index] for index in range(count)]


class _Worker:
    """Keeps a function and its state, such as a server or a model, between calls."""

    def __init__(self, work: Callable[[int], Any]) -> None:
        self.work = work

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _apply(self.work, batch)

    def __del__(self) -> None:
        # Clean up here, since Ray deletes this object before the worker process ends.
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
    return pa.Table.from_pylist(rows, schema=OUTCOMES)
