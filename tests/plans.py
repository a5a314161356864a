"""Plans of what is asked, from settings."""

from pipeline.config import Config
from pipeline.inference.requests import RequestPlan
from pipeline.tasks import Tasks


def request_plan(config: Config, revision: str = "r") -> RequestPlan:
    """Return what a run with these settings asks a model of this revision."""
    return RequestPlan.of(config, Tasks(config.tasks, config.own_tasks), revision)
