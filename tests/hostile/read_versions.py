"""Open each version below a folder in every way that a command does, watched; print what came of each as JSON."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.check import check_version
from pipeline.dataset.diff import diff_versions
from pipeline.dataset.directory import open_dataset
from pipeline.dataset.pixels import join_pixels, lacks_pixels
from pipeline.dataset.version import Version
from pipeline.errors import SynthError
from pipeline.hub.package import build_package
from pipeline.report.build import write_report
from tests.hostile import limit_memory
from tests.hostile.audit import Watch
from trainer.data import examples_in

MORE_BYTES = 2_500_000_000


def consumers(version: Version, good: Version, out: Path) -> dict[str, Callable[[], Any]]:
    """Return everything that is done with a version, by name."""

    def pack() -> None:
        with build_package(version, "me/x", acknowledged=version.manifest["licenses"]) as package:
            package.bytes()

    def train() -> None:
        for example in examples_in(version, "train", "mixed", questions=True, styles=(), source_in_prompt=True):
            example.open()

    return {
        "check": lambda: check_version(version),
        "summary": version.summary,
        "diff": lambda: list(diff_versions(good, version).lines(5)),
        "report": lambda: write_report(version, out),
        "push": pack,
        "train": train,
        "join": lambda: join_pixels(version, [], out) if lacks_pixels(version) else None,
    }


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    good = open_dataset(folder / "good")
    for act in consumers(good, good, out).values():
        act()  # imports what is imported late
    virtual_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit_memory(virtual_bytes + MORE_BYTES)
    watch = Watch()
    outcomes: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        results, watch.violations, started = {}, [], time.process_time()
        try:
            with watch.reading(folder, out, Path("/tmp")):  # where shards are rewritten
                version = open_dataset(path)
        except SynthError as error:
            results["open"] = f"error: {error}"
        except BaseException as error:  # noqa: BLE001  # what no user should see
            results["open"] = f"TRACEBACK {type(error).__name__}: {error}"
        else:
            for name, act in consumers(version, good, out).items():
                try:
                    with watch.reading(folder, out, Path("/tmp")):
                        act()
                    results[name] = "done"
                except SynthError as error:
                    results[name] = f"error: {error}"
                except BaseException as error:  # noqa: BLE001
                    results[name] = f"TRACEBACK {type(error).__name__}: {error}"
        seconds = time.process_time() - started
        print(f"{path.name}: {results} {watch.violations} {seconds:.1f}", file=sys.stderr, flush=True)
        outcomes[path.name] = {"results": results, "violations": watch.violations, "seconds": seconds}
    print(json.dumps(outcomes))


main()
