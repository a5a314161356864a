"""Ray: where it runs, how many work at once, and how a function is applied to every shard."""

import json
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import pyarrow as pa

from pipeline.cluster.job import Told
from pipeline.errors import ClusterError, ImageError, SynthError

CONNECT_SECONDS = 10
MIN_CLUSTER_CPUS = 2  # Ray counts a CPU for each task that reads, and would wait for one for ever
MIN_CPUS = 0.1  # of a worker: it waits for a server most of the time


@dataclass(frozen=True, slots=True)
class Plan:
    """How many workers ask at once, and what each holds of the cluster."""

    workers: int
    cpus: float
    gpus: float


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at an address, or start one on this machine that ends with this process.

    Raises:
        ClusterError: Ray is not installed, or there is no cluster at the address.
    """
    if find_spec("ray") is None:
        raise ClusterError("--executor ray needs the package ray", hint="install synth with its extra `ray`")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what it says of actors that may restart is said to nobody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    host, _, port = address.rpartition(":")
    ours: dict[str, Any] = (
        {"num_cpus": max(MIN_CLUSTER_CPUS, os.cpu_count() or 1), "include_dashboard": False} if address == "local" else {}
    )
    try:
        if port.isdigit() and "/" not in host:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()  # Ray itself tries for minutes
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="synth", **ours)
    except (OSError, ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise ClusterError(
            f"no Ray cluster at {address}: {what}",
            hint="start one with `ray start --head`; one that wants a token: RAY_AUTH_MODE=token",
        ) from None
    import ray.data  # which sets up its own log

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = -1  # a shard may take hours
    with redirect_stdout(sys.stderr):  # where Ray tells of nodes that are lost: standard output is for what was made
        try:
            yield
        finally:
            ray.shutdown()


def plan_workers(wanted: int | None, *, loads_model: bool, own_server: bool) -> Plan:
    """Return how the asking is spread over the cluster: a worker for each GPU, or for each CPU but one.

    Where each worker loads a model and there are no GPUs, there is one for each node: a model takes all of its CPUs. A pool
    that holds every CPU would wait for ever for one that reads.

    Raises:
        ClusterError: the cluster has no room for so many workers.
    """
    import ray

    known = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = known.get("CPU", 0.0), known.get("GPU", 0.0)
    on_gpus = loads_model and own_server and gpus > 0
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]
    workers = wanted or int(gpus if on_gpus else nodes if loads_model else max(1, cpus - 1))
    free = cpus - 1  # one is left for what reads
    if cpus < MIN_CLUSTER_CPUS or workers * MIN_CPUS > free:
        raise ClusterError(f"{workers} workers do not fit on {cpus:g} CPUs", hint="pass fewer --workers, or add nodes")
    if on_gpus and workers > gpus:
        raise ClusterError(
            f"{workers} workers with a server each do not fit on {gpus:g} GPUs", hint="pass fewer --workers, or --base-url"
        )
    share = math.floor(100 * min(1.0, free / workers)) / 100
    return Plan(workers, share, 1.0 if on_gpus else 0.0)


def every(
    count: int, do: Callable[[int], Told], plan: Plan | None = None, talk: Callable[[int], None] | None = None
) -> list[Told]:
    """Apply a function to every number below `count` on the cluster, and return what it told of each, in order.

    A worker that dies is replaced, and its numbers are done again.

    Args:
        count: of shards, or of whatever has numbers.
        do: makes files that appear whole or not at all; pickled. With a plan it is one of a fixed number of workers' own.
        plan: how many at once; None: as Ray sees fit. A function that is a context manager is left in the end.
        talk: told how many are done.

    Raises:
        SynthError: the first that a worker has raised.
        ClusterError: workers died.
    """
    found: dict[int, Told] = {}
    for number, told in _each(count, do, plan):
        found[number] = told
        if talk:
            talk(len(found))
    return [found[number] for number in range(count)]


def _each(count: int, do: Callable[[int], Told], plan: Plan | None) -> Iterator[tuple[int, Told]]:
    """Yield (number, what it told) as they are done."""
    import ray.data
    import ray.exceptions as lost

    numbers = ray.data.range(count, override_num_blocks=count)
    if plan:
        pool = ray.data.ActorPoolStrategy(size=plan.workers)
        done = numbers.map_batches(
            _Worker, fn_constructor_args=(do,), batch_size=1, batch_format="pyarrow", compute=pool,
            num_cpus=plan.cpus, num_gpus=plan.gpus,
        )  # fmt: skip
    else:
        done = numbers.map_batches(partial(_apply, do), batch_size=1, batch_format="pyarrow")
    try:
        for row in done.iter_rows():
            if row["error"]:
                kind, message, hint = json.loads(row["error"])
                raise _kind_of_error(kind)(message, hint=hint)
            yield row["id"], json.loads(row["told"])
    except (lost.RayActorError, lost.WorkerCrashedError, lost.OutOfMemoryError, lost.NodeDiedError) as error:
        what = f"workers died again and again: {' '.join(str(error).split())[:200]}"
        raise ClusterError(what, hint="was memory short? the same command goes on with what is done") from None


class _Worker:
    """Keeps what a function has made for the next number: a server, a model."""

    def __init__(self, do: Callable[[int], Told]) -> None:
        self.do = do

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _apply(self.do, batch)

    def __del__(self) -> None:  # Ray drops it before the worker ends
        if isinstance(self.do, AbstractContextManager):
            self.do.__exit__(None, None, None)


def _apply(do: Callable[[int], Told], batch: pa.Table) -> pa.Table:
    rows = []
    for number in batch["id"].to_pylist():
        try:
            rows.append({"id": number, "told": json.dumps(do(number)), "error": None})
        except SynthError as error:
            rows.append({"id": number, "told": None, "error": json.dumps([type(error).__name__, str(error), error.hint])})
    return pa.Table.from_pylist(rows, schema=pa.schema([("id", pa.int64()), ("told", pa.string()), ("error", pa.string())]))


def _kind_of_error(name: str) -> type[SynthError]:
    kinds = {kind.__name__: kind for kind in SynthError.__subclasses__() if kind is not ImageError}  # which wants more
    return kinds.get(name, SynthError)
