"""Load each checkpoint of a folder, audited and with little memory. Print the outcomes as JSON."""

import json
import sys
import time
from functools import partial
from pathlib import Path

from PIL import Image

from pipeline.storage.untrusted import read_regular
from tests.hostile import limit_more_memory, memory_bytes
from tests.hostile.audit import Watch, attempt
from trainer.captioner import Captioner
from trainer.runtime.checkpoint_folder import require_checkpoint


def load(checkpoint: Path, photo: Path) -> int:
    """Return the number of characters that a checkpoint writes about a photo."""
    require_checkpoint(checkpoint)
    return len(Captioner.from_pretrained(checkpoint).caption([photo])[0])


def main() -> None:
    folder, photo = Path(sys.argv[1]), Path(sys.argv[2])
    Image.new("RGB", (32, 32), "red").save(photo)
    Captioner.from_pretrained(folder / "good").caption([photo])  # do late imports before the audit
    read_regular(photo, max_bytes=10_000)
    limit_more_memory(1_500_000_000)
    watch = Watch()
    outcomes = {}
    for checkpoint in sorted(folder.iterdir()):
        started, watch.violations = time.process_time(), []
        with watch.reading(folder, photo.parent):
            outcome, characters = attempt(partial(load, checkpoint, photo))
        if characters is not None:
            outcome = f"a text of {characters < 10_000}"
        seconds = time.process_time() - started
        line = f"{checkpoint.name}: {outcome[:120]} {watch.violations[:1]} {seconds:.1f} s"
        print(line, file=sys.stderr, flush=True)
        outcomes[checkpoint.name] = {"outcome": outcome, "violations": watch.violations, "seconds": seconds}
    print(json.dumps({"outcomes": outcomes, "peak": memory_bytes()}))


main()
