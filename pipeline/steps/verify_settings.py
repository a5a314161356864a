"""The settings of the verify step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.sections import FilterConfig, Servers, VerifyConfig
from pipeline.dataset.records import described, read_record
from pipeline.digests import weights_revision
from pipeline.inference.requests import RequestPlan
from pipeline.plan import Plan
from pipeline.tasks.checks import CHECKING


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """The settings of the verify step. `servers` do not affect the replies, so they are not part of the key.

    `bounds` apply to repaired captions. With `splits_claims`, the model splits captions into claims.
    `clip_model` is None if captions are not compared with images. `seed` and `samples`, a digest of the list
    of all samples, decide about which images known truths are asked.
    """

    verify: VerifyConfig
    bounds: FilterConfig
    requests: RequestPlan
    splits_claims: bool
    clip_model: str | None
    servers: Servers
    seed: int
    samples: str

    @classmethod
    def of(cls, plan: Plan) -> "VerifySettings":
        """Resolve the settings of a run."""
        config = plan.config
        return cls(
            verify=config.verify,
            bounds=config.filter,
            requests=plan.requests,
            splits_claims=config.splits_claims,
            clip_model=plan.clip_model if plan.needs_clip else None,
            servers=config.servers,
            seed=config.seed,
            samples=read_record(plan.dataset, "read").get("files", {}).get("kept", {}).get("sha256", ""),
        )

    def describe(self) -> list[Any]:
        """Return everything that the results of the checks depend on, except the rows and the images."""
        if not self.verify.is_asked:
            return []
        clip = Path(self.clip_model or "")
        weights = weights_revision(clip) if self.clip_model and clip.is_dir() else self.clip_model
        asked = [self.splits_claims, weights, self.requests.describe(*CHECKING)]
        chosen = [self.seed, self.samples] if self.is_calibrated else []
        return [described(self.verify), described(self.bounds), *asked, *chosen]

    @property
    def is_calibrated(self) -> bool:
        """Whether a check is asked about known truths and falsehoods."""
        return self.verify.calibration > 0 and ("claims" in self.verify.checks or bool(self.verify.judge))
