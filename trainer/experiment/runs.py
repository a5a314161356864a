"""Run the cells of an experiment, several at a time; an interruption loses only a few steps of the running cells."""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from pipeline.dataset.version import Version
from pipeline.digests import digest
from pipeline.errors import SynthError, TrainError
from pipeline.progress import Progress
from pipeline.storage.files import write_json
from trainer.config import DECODERS, ENCODERS, SCRATCH_DECODERS, TINY_VIT, TrainConfig
from trainer.data import Example, count_words, limit_captions, limit_images, read_split_examples
from trainer.experiment.grid import FACTORS, Cell, Experiment
from trainer.model.pretrained import LOAD_ERRORS, load_config, reason_of
from trainer.training import train_captioner

MIN_TEST_IMAGES = 2
CONTEXT = get_context("spawn")
MAX_MESSAGE_CHARACTERS = 2000  # of a cell that has failed: a pipe holds little that nobody reads


@dataclass(frozen=True, slots=True)
class Run:
    """A cell with its data, final settings and folder."""

    cell: Cell
    version: Version
    config: TrainConfig
    folder: Path
    only: frozenset[str]  # sample ids of all splits
    train_images: int  # number of images to learn from
    train_words: int  # number of caption words to learn from

    @property
    def is_done(self) -> bool:
        """Whether the cell has been trained and scored."""
        return (self.folder / "metrics.json").exists() and (self.folder / "captions.jsonl").exists()


def plan(
    experiment: Experiment, cells: list[Cell], open_data: Callable[[str | None, str | None], Version], out: Path
) -> list[Run]:
    """Return the runs of all cells, with the same images and, with `match_words`, about as many caption words for all data.

    Raises TrainError if the data have no images in common, or no common references.
    """
    used = {cell.data: cell.config for cell in cells}  # the examples of a version depend only on its kind of data
    versions = {name: open_data(data.data, data.images) for name, data in experiment.data.items() if name in used}
    only: set[str] = set()
    learned: dict[str, list[Example]] = {}
    for split in ("train", "validation", "test"):
        by_data = {name: _texts(name, version, split, used[name]) for name, version in versions.items()}
        common = set.intersection(*({example.sample_id for example in examples} for examples in by_data.values()))
        if split == "test":  # all arms are scored against the same references
            with_references = [{(e.sample_id, e.references) for e in examples if e.references} for examples in by_data.values()]
            common = {sample_id for sample_id, _ in set.intersection(*with_references)}
        needed = MIN_TEST_IMAGES if split == "test" else 1
        if len(common) < needed:
            which = "that have the same references" if split == "test" else "with something to learn"
            hint = "compare versions of one source, whose references come from people or facts"
            raise TrainError(f"the data have {len(common)} {split} images in common {which}, of {needed} at least", hint=hint)
        only |= common
        if split == "train":
            learned = {name: [e for e in examples if e.sample_id in common] for name, examples in by_data.items()}
    budgets: dict[int, int] = {}  # by number of images
    sizes: dict[tuple[str, int], tuple[int, int]] = {}  # images and words to learn from, by data and number of images
    for size in {cell.train_images for cell in cells}:
        limited = {name: limit_images(examples, size) for name, examples in learned.items()}
        budgets[size] = min(map(_words, limited.values())) if experiment.match_words else 0
        fitting = {name: limit_captions(examples, budgets[size]) for name, examples in limited.items()}
        sizes |= {(name, size): (len(examples), _words(examples)) for name, examples in fitting.items()}
    runs, images = [], digest(sorted(only))
    for cell in cells:
        version, budget = versions[cell.data], budgets[cell.train_images]
        identity = (budget, version.manifest["digest"], images, _files(cell.encoder), _files(cell.decoder))
        config = cell.config.model_copy(update={"caption_word_budget": budget})
        learns_from = sizes[cell.data, cell.train_images]
        runs.append(Run(cell, version, config, out / "cells" / cell.folder(*identity), frozenset(only), *learns_from))
    return runs


def _texts(name: str, version: Version, split: str, config: TrainConfig) -> list[Example]:
    """Return the examples of a split without their pixels. Raises TrainError that names the kind of data."""
    try:
        examples = read_split_examples(version, split, config)
        return [replace(example, image=b"") for example in examples if example.texts]
    except SynthError as error:
        raise TrainError(f"data {name}: {error}", hint="see `data` and `settings.styles` of the experiment file") from None


def _files(model: str) -> list[tuple[str, int, int]]:
    """Return name, size and mtime of each file of a model folder; an empty list for a model name."""
    files = sorted(path for path in Path(model).glob("*") if path.is_file()) if Path(model).is_dir() else []
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _words(examples: list[Example]) -> int:
    return sum(count_words(text) for example in examples for text in example.texts if text.style)


def default_jobs() -> int:
    """Return how many cells run at once: one for each GPU, or for each core."""
    return torch.cuda.device_count() or cores()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_models(runs: list[Run]) -> None:
    """Raise TrainError for an encoder or a decoder that cannot be had, before the first cell is trained."""
    for factor, known, made_here in (("encoder", ENCODERS, (TINY_VIT,)), ("decoder", DECODERS, SCRATCH_DECODERS)):
        for name in dict.fromkeys(getattr(run.config, factor) for run in runs if not run.is_done):
            if name not in made_here:
                try:
                    load_config(known.get(name, name))
                except LOAD_ERRORS as error:
                    hint = f"see `{factor}` of the experiment file"
                    raise TrainError(f"no {factor} {name}: {reason_of(error)}", hint=hint) from None


def run_cells(runs: list[Run], jobs: int, progress: Progress) -> list[str]:
    """Train all unfinished cells, `jobs` at a time; each resumes from its last checkpoint.

    Each cell is a process of its own, like a single `synth train`, so a failure or an out-of-memory kill affects no other cell.
    Returns the error messages of failed cells.
    """
    waiting = [run for run in runs if not run.is_done]
    done = len(runs) - len(waiting)
    progress("cells", done, len(runs))
    jobs = max(1, min(jobs, len(waiting)))
    slots, failed = list(range(jobs)), list[str]()
    running: dict[SpawnProcess, tuple[Run, int, Connection]] = {}  # with its slot, and the pipe that receives its error message
    try:
        while waiting or running:
            while waiting and slots:
                run, slot = waiting.pop(0), slots.pop(0)
                receiver, sender = CONTEXT.Pipe(duplex=False)
                process = CONTEXT.Process(target=_train, args=(run, max(1, cores() // jobs), _gpu(slot), os.getpid(), sender))
                process.start()
                sender.close()
                running[process] = run, slot, receiver
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                run, slot, errors = running.pop(process)
                if code := process.exitcode:
                    failed.append(f"{run.folder.name}: {_message(errors) or f'its process ended with exit code {code}'}")
                slots.append(slot)
                done += 1
                progress("cells", done, len(runs))
    finally:
        for process in running:
            process.terminate()
            process.join()
    return failed


def _message(errors: Connection) -> str:
    """Return the message that a cell has sent; empty if its process was killed before."""
    try:
        return str(errors.recv()) if errors.poll() else ""
    except EOFError:
        return ""


def _gpu(slot: int) -> str | None:
    """Return the GPU of a slot, as CUDA_VISIBLE_DEVICES names it; None without a GPU."""
    count = torch.cuda.device_count()
    if not count:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (visible.split(",") if visible else [str(n) for n in range(count)])[slot % count]


def _train(run: Run, threads: int, gpu: str | None, parent: int, sender: Any) -> None:
    """Train one cell in its own process; on an error, send its message to the parent and exit with 1."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    cell = run.cell
    values = {name: getattr(cell, name) for name in (*FACTORS, "otherwise", "seed")}
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(run.folder / "cell.json", values | {"version": run.version.name, "digest": run.version.manifest["digest"]})
        train_captioner(run.version, run.config, run.folder, resume=(run.folder / "resume.pt").exists(), only=run.only)
    except KeyboardInterrupt:
        sys.exit(130)  # the parent was interrupted as well, and reports it
    except Exception as error:  # noqa: BLE001
        message = str(error) if isinstance(error, SynthError) else f"{type(error).__name__}: {error}"
        sender.send(message[:MAX_MESSAGE_CHARACTERS])  # the parent reads it once this process has ended
        sys.exit(1)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone; the next command resumes the cell."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
