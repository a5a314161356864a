"""Leave out what an earlier run has finished: a stage that would see the same rows under the same settings.

A run that was killed, or has nothing new, would otherwise judge every row again and write the same files. Beside its files a
stage leaves `finished.json`: a key of all that its result follows from, and a digest of each file. The next run takes the files
as they are if both are what they were. Of a run in one process only.
"""

from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pipeline.dataset.directory import OUTPUTS
from pipeline.dataset.version import Version
from pipeline.digests import digest, file_digest
from pipeline.errors import SynthError
from pipeline.inference.journal import Journal
from pipeline.install import ROOT, installed_version, needed_packages
from pipeline.stages.base import RunPlan, Stage, stage_input
from pipeline.storage.files import read_json, write_json
from pipeline.tasks import find_task
from pipeline.tasks.prompts import prompt_texts

FINISHED_FILE = "finished.json"
CODE = {"pipeline": (".py", ".gz"), "prompts": (".j2", ".yaml")}  # the folders of what stages run, and the files there
GENERATE, VERSION = "generate", "version"


class FinishedStages:
    """What earlier runs have finished in a dataset folder.

    The caller holds its lock; its source is read, and its images are asked about.
    """

    def __init__(self, plan: RunPlan) -> None:
        self.plan, self.dataset = plan, plan.dataset

    def has(self, stage: Stage, before: str) -> bool:
        """Return whether the files of a stage are those that it would write from the rows which `before` kept."""
        record = self._read(stage.name)
        return bool(record) and record == self._describe(stage, before)

    def add(self, stage: Stage, before: str) -> None:
        """Write down that a stage has written its files."""
        write_json(self._path(stage.name), self._describe(stage, before))

    def has_annotations(self) -> bool:
        """Return whether the annotations are those that the journal would give; of a user's own tasks, nobody knows."""
        record = self._read(GENERATE)
        return bool(record) and not self.plan.config.own_tasks and record == self._describe_annotations()

    def add_annotations(self) -> None:
        """Write down that the annotations are those of the journal."""
        write_json(self._path(GENERATE), self._describe_annotations())

    def find_version(self, last: str) -> Version | None:
        """Return the newest version if it was made of what the stage `last` kept and all stages rejected, else None."""
        if not (record := self._read(VERSION)):
            return None
        newest = self.dataset.versions()[-1:]
        return newest[0] if newest and record == self._describe_version(last, newest[0]) else None

    def add_version(self, last: str, version: Version) -> None:
        """Write down which version was made of what the stages kept and rejected."""
        write_json(self._path(VERSION), self._describe_version(last, version))

    def _describe(self, stage: Stage, before: str) -> dict[str, Any]:
        """Return the key of a stage, and a digest of each of its files; None for one that is not there."""
        own = [digest_of(path) for path in (stage_input(stage, self.dataset, before, self.plan), *stage.reads(self.plan))]
        outputs = {which: digest_of(self.dataset.stage(stage.name, which)) for which in OUTPUTS}
        return {"key": digest([self._of_run, stage.name, own]), "files": outputs}

    def _describe_annotations(self) -> dict[str, Any]:
        config = self.plan.config
        tasks = [find_task(name, config.own_tasks) for name in config.tasks]
        prompts = prompt_texts(tasks, config.prompt_dirs, config.generate.style_prompts)
        with Journal(self.dataset.journal) as journal:
            key = digest([self._of_settings, prompts, journal.digest()])
        return {"key": key, "files": {"kept": digest_of(self.dataset.stage(GENERATE))}}

    def _describe_version(self, last: str, version: Version) -> dict[str, Any]:
        rejected = sorted(self.dataset.path.glob("stages/*/rejected.parquet"))
        of_stages = [[path.parent.name, digest_of(path)] for path in rejected if path.parent.name != VERSION]
        key = digest([self._of_run, digest_of(self.dataset.stage(last)), of_stages])
        return {"key": key, "version": version.name}

    @cached_property
    def _of_run(self) -> str:
        """A digest of what every stage after `generate` depends on: that, and where samples and replies came from."""
        return digest([self._of_settings, *(read_json(self.dataset.provenance(stage)) for stage in ("source", GENERATE))])

    @cached_property
    def _of_settings(self) -> str:
        """A digest of code, settings, model, and the samples."""
        dataset, plan = self.dataset, self.plan
        # The file of the samples may have many gigabytes, and a time of its last change to the nanosecond.
        files = [(path.name, path.stat()) for path in sorted(dataset.stage("source").parent.glob("*.parquet"))]
        samples = [[name, state.st_size, state.st_mtime_ns] for name, state in files]
        return digest([code_digest(), plan.config.recorded(), plan.revision, plan.image_kind, samples])

    def _path(self, stage: str) -> Path:
        return self.dataset.stage(stage).with_name(FINISHED_FILE)

    def _read(self, stage: str) -> dict[str, Any]:
        """Return what a stage left; nothing if it left nothing that can be read."""
        try:
            return read_json(self._path(stage))
        except (OSError, ValueError, RecursionError, SynthError):
            return {}


@cache
def code_digest() -> str:
    """Return a digest of the code and the word lists of this package, and of the versions of the packages that it needs."""
    files = [path for name, kinds in CODE.items() for path in sorted((ROOT / name).rglob("*")) if path.suffix in kinds]
    contents = [[str(path.relative_to(ROOT)), file_digest(path)] for path in files]
    return digest([installed_version(), needed_packages(), contents])


def digest_of(path: Path) -> str | None:
    """Return the digest of a file, or None if there is none, or something else that could be read without an end."""
    return file_digest(path) if path.is_file() else None
