"""Measure how long a new user waits for the message of each mistake: wall clock and CPU of the whole command.

python benchmarks/mistakes.py [ROUNDS]
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.chat.server import ChatServer, running_chat
from tests.mistakes import MISTAKES, add_photos, environment

SYNTH = Path(sys.executable).with_name("synth")


def measure(command: list[str], folder: Path) -> tuple[float, float, str]:
    """Run a command; return its seconds, its CPU seconds, and the error that it printed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("synth: ", "Error: ", "│"))]
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu_s, lines[0] if lines else ""


def main() -> None:
    """Print a table in Markdown: the median of some rounds of each mistake."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print("| mistake | seconds | CPU seconds | message |\n|---|---|---|---|")
    with running_chat(ChatServer()) as chat:
        chat.key = "a key"
        for mistake in MISTAKES:
            results = []
            for _ in range(rounds):
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    add_photos(folder)
                    mistake.prepare(folder)
                    results.append(measure([str(SYNTH), *mistake.command.format(server=chat.url).split()], folder))
            wall_s = statistics.median(result[0] for result in results)
            cpu_s = statistics.median(result[1] for result in results)
            message = results[0][2].replace("|", " ").strip()[:110]
            print(f"| {mistake.name} | {wall_s:.2f} | {cpu_s:.2f} | {message} |", flush=True)


if __name__ == "__main__":
    main()
