"""Ray cluster: the number of workers, and failed workers."""

import time
from pathlib import Path

import pytest
import ray

from pipeline.errors import ClusterError, EngineError
from pipeline.executors.ray import cluster
from pipeline.executors.ray.cluster import WorkerPlan, map_on_workers, open_cluster, plan_workers
from pipeline.install import install_command


@pytest.mark.parametrize(
    ("cpus", "gpus", "wanted", "own_server", "plan"),
    [
        (8, 0, None, False, WorkerPlan(8, 1.0, 0)),
        (2, 0, 4, False, WorkerPlan(4, 0.5, 0)),
        (8, 0, None, True, WorkerPlan(3, 1.0, 0)),  # one worker per node
        (32, 4, None, True, WorkerPlan(4, 1.0, 1)),
        (3, 4, None, True, WorkerPlan(4, 0.75, 1)),
        (32, 4, None, False, WorkerPlan(32, 1.0, 0)),  # other servers use the GPUs
    ],
)
def test_default_worker_count_follows_gpus_nodes_or_cpus(
    monkeypatch: pytest.MonkeyPatch,
    cpus: float,
    gpus: float,
    wanted: int | None,
    own_server: bool,  # noqa: FBT001
    plan: WorkerPlan,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus} | ({"GPU": gpus} if gpus else {}))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * 3 + [{"Alive": False}])
    assert plan_workers(wanted, loads_model=own_server, own_server=own_server) == plan


def test_more_workers_than_gpus_are_refused_if_each_worker_starts_a_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 32, "GPU": 4})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    with pytest.raises(ClusterError, match="5 workers, each with its own server, do not fit") as caught:
        plan_workers(5, loads_model=True, own_server=True)
    assert "fewer --workers" in caught.value.hint


def test_missing_ray_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match="needs the package ray") as caught, cluster.open_cluster():
        pass
    assert caught.value.hint == install_command("ray")


def test_other_workers_finish_their_shards_after_failures(tmp_path: Path) -> None:
    def work(index: int) -> None:
        if index != 1:
            time.sleep(index / 2)
            raise EngineError("no credit", hint="add credit")
        (tmp_path / f"begun-{index}").touch()
        time.sleep(3)
        (tmp_path / f"finished-{index}").touch()

    warnings: list[str] = []
    with open_cluster():
        for workers in (3, 1):
            with pytest.raises(EngineError, match="no credit"):
                map_on_workers(5, work, WorkerPlan(workers, 0.3, 0), lambda done: None, warnings.append)
    assert {path.name for path in tmp_path.iterdir()} == {"begun-1", "finished-1"}
    assert warnings == ["a worker failed: no credit; the other workers finish their shards"]
