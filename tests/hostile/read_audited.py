"""Read each version or checkpoint of a folder as commands do, audited and with little memory.

`python -m tests.hostile.read_audited versions|checkpoints FOLDER OUT` prints the outcomes as JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.check import check_version
from pipeline.dataset.directory import open_dataset
from pipeline.hub.package import build_package
from pipeline.report.build import write_report
from pipeline.sources.join import join_images
from pipeline.storage.untrusted import read_regular
from tests.hostile import limit_more_memory
from tests.hostile.audit import Watch, attempt
from trainer.captioner import Captioner
from trainer.data import examples_in
from trainer.runtime.checkpoint_folder import require_checkpoint

Acts = dict[str, Callable[[], Any]]


def acts_on_version(path: Path, out: Path) -> Acts:
    """Return all operations on a version, by name."""
    version = open_dataset(path)

    def pack() -> None:
        with build_package(version, "me/x", acknowledged=version.manifest["licenses"]) as package:
            package.file_sizes()

    def train() -> None:
        for example in examples_in(version, "train", "mixed"):
            example.open()

    return {
        "check": lambda: check_version(version),
        "summary": version.summary,
        "rows": lambda: [batch.num_rows for _, batch in version.batches(version.manifest["columns"])],
        "report": lambda: write_report(version, out),
        "push": pack,
        "train": train,
        "join": lambda: join_images(version, []) if version.lacks_pixels else None,
    }


def acts_on_checkpoint(path: Path, out: Path) -> Acts:
    """Return the operation on a checkpoint, which captions a photo."""
    require_checkpoint(path)
    captioner = Captioner.from_pretrained(path)

    def caption() -> None:
        assert len(captioner.caption([out / "photo.png"])[0]) < 10_000

    return {"caption": caption}


# Each kind has a function, a memory limit in bytes, and further folders that may be written.
KINDS: dict[str, tuple[Callable[[Path, Path], Acts], int, tuple[Path, ...]]] = {
    "versions": (acts_on_version, 2_500_000_000, (Path("/tmp"),)),
    "checkpoints": (acts_on_checkpoint, 1_500_000_000, ()),
}


def main() -> None:
    (acts_on, max_bytes, more), folder, out = KINDS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    Image.new("RGB", (32, 32), "red").save(out / "photo.png")
    read_regular(out / "photo.png", max_bytes=10_000)
    for act in acts_on(folder / "good", out).values():
        act()  # do late imports before the audit
    limit_more_memory(max_bytes)
    watch = Watch()
    outcomes: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        results, watch.violations, started = {}, [], time.process_time()
        with watch.reading(folder, out, *more):
            results["open"], acts = attempt(partial(acts_on, path, out))
            for name, act in (acts or {}).items():
                results[name], _ = attempt(act)
        seconds = time.process_time() - started
        print(f"{path.name}: {results} {watch.violations} {seconds:.1f}", file=sys.stderr, flush=True)
        outcomes[path.name] = {"results": results, "violations": watch.violations, "seconds": seconds}
    print(json.dumps(outcomes))


main()
