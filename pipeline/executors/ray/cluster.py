"""Connect to a Ray cluster, plan its workers, and apply a function to every shard."""

import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

from pipeline.errors import ClusterError, SynthError, one_line
from pipeline.install import install_command

T = TypeVar("T")
CONNECT_TIMEOUT_S = 10
# The run fails if more workers than this die while they work on the same shard.
MAX_DEATHS = 3


class ClusterOptions(NamedTuple):
    """Options for a run on a cluster. None chooses the default number."""

    shards: int | None = None
    workers: int | None = None


class WorkerPlan(NamedTuple):
    """The number of workers that send requests, and the numbers of CPUs and GPUs per worker."""

    workers: int
    cpus: float
    gpus: float


@contextmanager
def open_cluster() -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS, or start one on this machine that ends with this process.

    Raises ClusterError if Ray is not installed or no cluster answers.
    """
    if find_spec("ray") is None:
        raise ClusterError("--executor ray needs the package ray", hint=install_command("ray"))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # By default, a local cluster retries forever if work runs out of memory.
    os.environ.setdefault("RAY_task_oom_retries", str(MAX_DEATHS))
    import ray

    address = os.environ.get("RAY_ADDRESS") or "local"
    host, _, port = address.rpartition(":")
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
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
    # Ray reports lost nodes on standard output, which is reserved for results.
    with redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            ray.shutdown()


def plan_workers(wanted: int | None, *, loads_model: bool, own_server: bool) -> WorkerPlan:
    """Plan the workers that send requests. `wanted` overrides the default number of workers.

    The default is one worker per GPU if workers start servers on GPUs, one per node if they load a model, and
    else one per CPU. Raises ClusterError if there are too few GPUs.
    """
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    on_gpus = loads_model and own_server and gpus > 0
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    workers = wanted or max(1, int(gpus if on_gpus else nodes if loads_model else cpus))
    if on_gpus and workers > gpus:
        problem = f"{workers} workers, each with its own server, do not fit on {gpus:g} GPUs"
        raise ClusterError(problem, hint="pass fewer --workers, or --base-url")
    return WorkerPlan(workers, math.floor(100 * min(1.0, cpus / workers)) / 100, 1.0 if on_gpus else 0.0)


def map_on_workers(
    count: int,
    work: Callable[[int], T],
    workers: WorkerPlan,
    report: Callable[[int], None],
    warn: Callable[[str], None],
) -> list[T]:
    """Apply a function to every index below `count` on workers, and return the results in order.

    Each worker calls its own pickled copy of `work`, which may be a context manager. If a worker dies, its
    index is started again. `report` gets the number of finished indices. Raises the first SynthError of a
    worker, or ClusterError if workers die repeatedly.
    """
    import ray
    import ray.exceptions as lost
    from ray.util import ActorPool

    deaths = (lost.RayActorError, lost.WorkerCrashedError, lost.OutOfMemoryError, lost.NodeDiedError)
    options: dict[str, Any] = {"num_cpus": workers.cpus, "num_gpus": workers.gpus}
    worker: Any = ray.remote(max_restarts=-1, max_task_retries=MAX_DEATHS, **options)(_Worker)
    actors = [worker.remote(work) for _ in range(min(workers.workers, count))]
    pool: Any = ActorPool(actors)
    call: Callable[[Any, int], Any] = lambda actor, index: actor.apply.remote(index)  # noqa: E731
    waiting = list(reversed(range(count)))
    results: dict[int, T] = {}
    errors: list[SynthError] = []
    try:
        for _ in actors:
            pool.submit(call, waiting.pop())
        while pool.has_next():
            try:
                index, result, error = pool.get_next_unordered()
            except deaths as died:
                hint = "look for out-of-memory kills, then run the same command to resume"
                error = ClusterError(f"workers died repeatedly: {one_line(died)}", hint=hint)
            if error:
                errors.append(error)
                if len(errors) == 1 and pool.has_next():
                    warn(f"a worker failed: {error}; the other workers finish their shards")
            else:
                results[index] = result
                report(len(results))
            if waiting and not errors:
                pool.submit(call, waiting.pop())
        if errors:
            raise errors[0]
        ray.get([actor.close.remote() for actor in actors])
    finally:
        for actor in actors:
            ray.kill(actor)
    return [results[index] for index in range(count)]


class _Worker:
    """Keeps a function and its state, such as a server or a model, between calls."""

    def __init__(self, work: Callable[[int], Any]) -> None:
        self.work = work

    def apply(self, index: int) -> tuple[int, Any, SynthError | None]:
        """Return an index with its result or error. Ray would change the type of a raised error."""
        try:
            return index, self.work(index), None
        except SynthError as error:
            return index, None, error

    def close(self) -> None:
        if isinstance(self.work, AbstractContextManager):
            self.work.__exit__(None, None, None)
