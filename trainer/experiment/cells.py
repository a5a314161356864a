"""Run the cells of an experiment, several at a time, so that any interruption costs a few steps of those that were running."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import SynthError, TrainError
from pipeline.store import Version, write_json
from trainer.config import TrainConfig
from trainer.data import Example, count_words, limit_captions, limit_images
from trainer.experiment.grid import FACTORS, Cell, Experiment
from trainer.features import Talk
from trainer.loop import examples_of, train

MIN_TEST_IMAGES = 2


@dataclass(frozen=True, slots=True)
class Budget:
    """What all arms have in common: images of each split, and words of captions for each number of training images."""

    images: dict[str, list[str]]
    words: dict[int, int]  # 0: as many as there are


@dataclass(frozen=True, slots=True)
class Run:
    """A cell with where it runs, and on what."""

    cell: Cell
    version: Version
    config: TrainConfig
    folder: Path
    only: frozenset[str]

    @property
    def is_done(self) -> bool:
        """Whether it has been trained and scored."""
        return (self.folder / "metrics.json").exists() and (self.folder / "captions.jsonl").exists()


def plan(
    experiment: Experiment, cells: list[Cell], open_data: Callable[[str | None, str | None], Version], out: Path
) -> list[Run]:
    """Return the runs of all cells, with the same images and, if asked for, as many words of captions for all data.

    Raises:
        TrainError: the data have no test images in common, or nobody has said what is true of them.
    """
    used = {cell.data for cell in cells}
    versions = {name: open_data(data.data, data.images) for name, data in experiment.data.items() if name in used}
    budget = _budget(experiment, cells, versions)
    only = frozenset(sample_id for ids in budget.images.values() for sample_id in ids)
    runs = []
    for cell in cells:
        config = cell.config.model_copy(update={"caption_words": budget.words[cell.train_images]})
        version = versions[cell.data]
        folder = out / "cells" / cell.folder(budget.words[cell.train_images], version.manifest["digest"], sorted(only))
        runs.append(Run(cell, version, config, folder, only))
    return runs


def _budget(experiment: Experiment, cells: list[Cell], versions: dict[str, Version]) -> Budget:
    config_of = {cell.data: cell.config for cell in cells}  # what is seen of a version depends on the data alone
    images: dict[str, list[str]] = {}
    learned: dict[str, list[Example]] = {}
    for split in ("train", "validation", "test"):
        seen = {name: examples_of(version, split, config_of[name]) for name, version in versions.items()}
        common = set.intersection(*({example.sample_id for example in mine} for mine in seen.values()))
        if split == "test":  # all arms are scored against the same words
            told = [{(e.sample_id, e.references) for e in mine if e.references} for mine in seen.values()]
            common = {sample_id for sample_id, _ in set.intersection(*told)}
        if len(common) < (MIN_TEST_IMAGES if split == "test" else 1):
            why = "that have references" if split == "test" else "with something to learn"
            hint = "compare versions of one source, and train on what people or facts say of it"
            raise TrainError(f"the data have no {split} images in common {why}", hint=hint)
        images[split] = sorted(common)
        learned |= {name: [e for e in mine if e.sample_id in common] for name, mine in seen.items() if split == "train"}
    words = {
        size: min(_words(limit_images(mine, size)) for mine in learned.values()) if experiment.match_words else 0
        for size in {cell.train_images for cell in cells}
    }
    return Budget(images, words)


def learned(run: Run) -> tuple[int, int]:
    """Return from how many images and words of captions a run learns."""
    examples = limit_images(examples_of(run.version, "train", run.config, run.only), run.config.train_images)
    return len(examples), _words(limit_captions(examples, run.config.caption_words))


def _words(examples: list[Example]) -> int:
    return sum(count_words(text) for example in examples for text in example.texts if text.style)


def default_jobs() -> int:
    """Return how many cells run at once: one for each GPU, or for each core."""
    return torch.cuda.device_count() or cores()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_cells(runs: list[Run], jobs: int, talk: Talk) -> list[str]:
    """Train all that are not done yet, so many at a time; each goes on where it stopped.

    One that fails keeps no other from running: returns what was said of those.
    """
    waiting = [run for run in runs if not run.is_done]
    done = len(runs) - len(waiting)
    talk("cells", done, len(runs))
    threads, context, places = max(1, cores() // jobs), get_context("spawn"), get_context("spawn").SimpleQueue()
    for place in range(jobs):
        places.put(place)
    failed: list[str] = []
    # Processes of their own: each starts as a single run of `synth train` would, and one that dies takes no other along.
    with ProcessPoolExecutor(jobs, context, _prepare, (threads, os.getpid(), torch.cuda.device_count(), places)) as pool:
        coming = {pool.submit(_train, run): run for run in waiting}
        try:
            for future in as_completed(coming):
                if error := future.exception():
                    said = str(error) if isinstance(error, SynthError) else f"{type(error).__name__}: {error}"
                    failed.append(f"{coming[future].folder.name}: {said}")
                done += 1
                talk("cells", done, len(runs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _prepare(threads: int, parent: int, gpus: int, places: Any) -> None:
    """Make a process of the pool ready: its share of the cores, a GPU of its own, and no life after its parent."""
    torch.set_num_threads(threads)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(places.get() % gpus)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # what it would write is written by the next command


def _train(run: Run) -> None:
    cell = run.cell
    about = {name: getattr(cell, name) for name in (*FACTORS, "seed")}
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "cell.json", about | {"version": run.version.name, "digest": run.version.manifest["digest"]})
    train(run.version, run.config, run.folder, resume=(run.folder / "resume.pt").exists(), only=run.only)
