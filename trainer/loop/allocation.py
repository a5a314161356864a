"""Keep memory that a training step frees for the next one, where the C library is glibc."""

import ctypes

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # parameters of mallopt(3)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for what it needs next.

    By default glibc returns each large block to the system, which hands it out again page by page, filled with zeros: on a CPU
    a seventh of a training step (docs/experiments/training.md). Without glibc nothing changes.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
