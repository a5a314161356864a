from pipeline.config import Config
from pipeline.inference.requests import RequestPlan
from pipeline.tasks import Tasks


def request_plan(config: Config, revision: str = "r") -> RequestPlan:
    """Return the requests of a run with these settings."""
    return RequestPlan.of(config, Tasks(config.tasks, config.own_tasks), revision)
