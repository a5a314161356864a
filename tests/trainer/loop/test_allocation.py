"""What a step frees is there for the next: it is not taken from the system anew."""

import subprocess
import sys

import pytest

MEASURE = """
import resource, torch
{before}
def step():
    blocks = [torch.zeros(1 << 20) for _ in range(8)]  # 4 MB each
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from trainer.loop.allocation import keep_freed_memory; keep_freed_memory()"


def pages_taken(before: str) -> int:
    done = subprocess.run([sys.executable, "-c", MEASURE.format(before=before)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no mallopt")
def test_memory_that_a_step_frees_is_not_taken_from_the_system_again() -> None:
    assert pages_taken(KEEP) < pages_taken("") / 5
