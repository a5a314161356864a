"""Ray cluster: the number of workers, with one CPU left for reading the source."""

import pytest
import ray

from pipeline.errors import ClusterError
from pipeline.executors.ray import cluster
from pipeline.executors.ray.cluster import MIN_WORKER_CPUS, WorkerPlan, plan_workers


@pytest.mark.parametrize(
    ("cpus", "gpus", "wanted", "own_server", "plan"),
    [
        (2, 0, None, False, WorkerPlan(1, 1.0, 0)),
        (8, 0, None, False, WorkerPlan(7, 1.0, 0)),
        (2, 0, 2, False, WorkerPlan(2, 0.5, 0)),
        (8, 0, None, True, WorkerPlan(3, 1.0, 0)),  # one per node
        (32, 4, None, True, WorkerPlan(4, 1.0, 1)),
        (4, 4, None, True, WorkerPlan(4, 0.75, 1)),
        (32, 4, None, False, WorkerPlan(31, 1.0, 0)),  # other servers use the GPUs
    ],
)
def test_default_worker_count_follows_gpus_or_cpus_and_leaves_one_cpu_free(
    monkeypatch: pytest.MonkeyPatch,
    cpus: float,
    gpus: float,
    wanted: int | None,
    own_server: bool,  # noqa: FBT001
    plan: WorkerPlan,
) -> None:
    monkeypatch.setattr(
        ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    )
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * 3 + [{"Alive": False}])
    planned = plan_workers(wanted, loads_model=own_server, own_server=own_server)
    assert planned == plan
    assert planned.workers * planned.cpus <= cpus - 1
    assert planned.cpus >= MIN_WORKER_CPUS


@pytest.mark.parametrize(
    ("cpus", "gpus", "wanted", "what"),
    [
        (2, 0, 11, "11 workers do not fit on 2 CPUs"),
        (32, 4, 5, "5 workers, each with its own server, do not fit on 4 GPUs"),
    ],
)
def test_too_many_workers_are_refused(
    monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, wanted: int | None, what: str
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    with pytest.raises(ClusterError, match=what) as caught:
        plan_workers(wanted, loads_model=True, own_server=True)
    assert "fewer --workers" in caught.value.hint


def test_missing_ray_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with (
        pytest.raises(ClusterError, match="--executor ray needs the package ray") as caught,
        cluster.open_cluster(None),
    ):
        pass
    assert "[ray]" in caught.value.hint
