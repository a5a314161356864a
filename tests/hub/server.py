"""Run the Hub in a thread of this process."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from tests.hub.app import TOKEN, Hub
from tests.hub.storage import Storage


@dataclass(frozen=True)
class RunningHub:
    hub: Hub
    endpoint: str

    def env(self, home: Path) -> dict[str, str]:
        """Return an environment in which clients use this server, and keep their caches in `home`."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",  # large files are uploaded by LFS
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def running_hub(root: Path) -> Iterator[RunningHub]:
    hub = Hub(Storage(root))
    config = uvicorn.Config(hub, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield RunningHub(hub, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join()
