"""Load each checkpoint below a folder, watched and with little memory; print what came of each as JSON."""

import json
import resource
import sys
import time
from pathlib import Path

from PIL import Image

from pipeline.errors import SynthError
from pipeline.storage.untrusted import read_regular
from tests.hostile import limit_memory, memory_bytes
from tests.hostile.audit import Watch
from trainer.captioning import Captioner
from trainer.config import require_checkpoint

MORE_BYTES = 1_500_000_000


def main() -> None:
    folder, photo = Path(sys.argv[1]), Path(sys.argv[2])
    Image.new("RGB", (32, 32), "red").save(photo)
    Captioner.from_pretrained(folder / "good").caption([photo])  # imports what is imported late
    read_regular(photo, max_bytes=10_000)
    virtual_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit_memory(virtual_bytes + MORE_BYTES)
    watch = Watch()
    outcomes = {}
    for checkpoint in sorted(folder.iterdir()):
        started = time.process_time()
        watch.violations = []
        try:
            with watch.reading(folder, photo.parent):
                require_checkpoint(checkpoint)
                texts = Captioner.from_pretrained(checkpoint).caption([photo])
            outcome = f"a text of {len(texts[0]) < 10_000}"
        except SynthError as error:
            outcome = f"error: {error}"
        except BaseException as error:  # noqa: BLE001  # what no user should see
            outcome = f"TRACEBACK {type(error).__name__}: {error}"
        seconds = time.process_time() - started
        print(f"{checkpoint.name}: {outcome[:120]} {watch.violations[:1]} {seconds:.1f} s", file=sys.stderr, flush=True)
        outcomes[checkpoint.name] = {"outcome": outcome, "violations": watch.violations, "seconds": seconds}
    print(json.dumps({"outcomes": outcomes, "peak": memory_bytes()}))


main()
