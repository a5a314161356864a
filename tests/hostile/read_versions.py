"""Read each version of a folder as all commands do, audited. Print the outcomes as JSON."""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.check import check_version
from pipeline.dataset.directory import open_dataset
from pipeline.dataset.pixels import join_images, lacks_pixels
from pipeline.dataset.version import Version
from pipeline.hub.package import build_package
from pipeline.report.build import write_report
from tests.hostile import limit_more_memory
from tests.hostile.audit import Watch, attempt
from trainer.data import examples_in


def consumers(version: Version, good: Version, out: Path) -> dict[str, Callable[[], Any]]:
    """Return all operations on a version, by name."""

    def pack() -> None:
        with build_package(version, "me/x", acknowledged=version.manifest["licenses"]) as package:
            package.bytes()

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
        "join": lambda: join_images(version, []) if lacks_pixels(version) else None,
    }


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    good = open_dataset(folder / "good")
    for act in consumers(good, good, out).values():
        act()  # do late imports before the audit
    limit_more_memory(2_500_000_000)
    watch = Watch()
    outcomes: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        results, watch.violations, started = {}, [], time.process_time()
        with watch.reading(folder, out, Path("/tmp")):  # shards are rewritten in /tmp
            results["open"], version = attempt(partial(open_dataset, path))
            for name, act in consumers(version, good, out).items() if version else ():
                results[name], _ = attempt(act)
        seconds = time.process_time() - started
        print(f"{path.name}: {results} {watch.violations} {seconds:.1f}", file=sys.stderr, flush=True)
        outcomes[path.name] = {"results": results, "violations": watch.violations, "seconds": seconds}
    print(json.dumps(outcomes))


main()
