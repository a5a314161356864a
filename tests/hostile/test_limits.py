"""Limits of the machine: few open files."""

import subprocess
import sys
from pathlib import Path

from tests.chat.server import ChatServer, running_chat

RUN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from pathlib import Path
from pipeline.config.files import resolve
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.progress import LineProgress
from pipeline.types import SampleBatch
from tests.clients import client_of
from tests.plans import ask
from tests.scene_data import scene_samples
url, folder = sys.argv[1:]
server = {"concurrency": 1000}
config = resolve(source="scenes", base_url=[url], model="model", server=server, tasks=["caption"])
images = scene_samples(1)[0].images
chunk = SampleBatch.of((f"{n:064x}", images) for n in range(200))
stats = RequestStats()
with Journal(Path(folder) / "j.sqlite") as journal, client_of(config, progress=LineProgress()) as engine:
    ask(config, [chunk], lambda: engine, journal, stats)
print(stats.done, dict(stats.flaws))
"""


def test_concurrency_above_open_file_limit_is_reduced(tmp_path: Path) -> None:
    with running_chat(ChatServer()) as chat:
        command = [sys.executable, "-c", RUN, chat.url, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "does not answer" not in done.stderr
    assert chat.max_in_flight <= 72
    assert done.stdout.startswith("400 "), done.stderr
