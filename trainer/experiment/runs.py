"""Train the cells of an experiment in parallel. Interrupted cells resume from their last state."""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from pipeline.dataset.version import Version
from pipeline.digests import digest
from pipeline.errors import SynthError, TrainError
from pipeline.progress import Progress
from pipeline.storage.files import write_json, write_text
from trainer.config import DECODERS, ENCODERS, SCRATCH_DECODERS, TINY_VIT, TrainConfig
from trainer.data import Example, count_words, limit_captions, limit_images, read_split_examples
from trainer.experiment.grid import FACTORS, Cell, Experiment
from trainer.model.pretrained import LOAD_ERRORS, load_config, reason_of
from trainer.training import train_captioner

MIN_TEST_IMAGES = 2
CONTEXT = get_context("spawn")
ERROR_FILE = "error.txt"
Examples = dict[str, list[Example]]
OpenData = Callable[[str | None, str | None], Version]


@dataclass(frozen=True, slots=True)
class Run:
    """A cell with its data, final settings and folder. `only` holds the sample ids to use from all splits.

    `train_images` and `train_words` are the numbers of training images and caption words.
    """

    cell: Cell
    version: Version
    config: TrainConfig
    folder: Path
    only: frozenset[str]
    train_images: int
    train_words: int

    @property
    def is_done(self) -> bool:
        """Whether the cell has been trained and scored."""
        return (self.folder / "metrics.json").exists() and (self.folder / "captions.jsonl").exists()


def plan(experiment: Experiment, cells: list[Cell], open_data: OpenData, out: Path) -> list[Run]:
    """Plan a run for each cell. All use the same images and, with `match_words`, similar numbers of words.

    Raises TrainError if the data entries have too few images in common.
    """
    # The settings that select examples depend only on the data entry.
    configs = {cell.data: cell.config for cell in cells}
    data = {name: experiment.data[name] for name in configs}
    versions = {name: open_data(item.data, item.images) for name, item in data.items()}
    only: set[str] = set()
    learned: Examples = {}
    for split in ("train", "validation", "test"):
        examples = {name: _read_examples(name, versions[name], split, configs[name]) for name in versions}
        common = _common_ids(examples, split)
        only |= common
        if split == "train":
            learned = {name: [e for e in group if e.sample_id in common] for name, group in examples.items()}
    runs, images = [], digest(sorted(only))
    budgets, sizes = _match_words(experiment, learned, {cell.train_images for cell in cells})
    for cell in cells:
        version, budget = versions[cell.data], budgets[cell.train_images]
        identity = (budget, version.manifest["digest"], images, _files(cell.encoder), _files(cell.decoder))
        config = cell.config.model_copy(update={"caption_word_budget": budget})
        folder = out / "cells" / cell.folder(*identity)
        runs.append(Run(cell, version, config, folder, frozenset(only), *sizes[cell.data, cell.train_images]))
    return runs


def _read_examples(name: str, version: Version, split: str, config: TrainConfig) -> list[Example]:
    """Read the examples of a split without pixels. The message of a TrainError names the data entry."""
    try:
        examples = read_split_examples(version, split, config)
        return [replace(example, image=b"") for example in examples if example.texts]
    except SynthError as error:
        hint = "see `data` and `settings.styles` of the experiment file"
        raise TrainError(f"data {name}: {error}", hint=hint) from None


def _common_ids(examples: Examples, split: str) -> set[str]:
    """Return the sample ids that all data entries share. In the test split, references must be equal too."""
    is_test = split == "test"
    keys = [{(e.sample_id, e.references if is_test else ()) for e in group} for group in examples.values()]
    common = {sample_id for sample_id, references in set.intersection(*keys) if references or not is_test}
    needed = MIN_TEST_IMAGES if is_test else 1
    if len(common) < needed:
        which = " with equal references" if is_test else ""
        problem = (
            f"the datasets have {len(common)} {split} images in common{which}; at least {needed} are needed"
        )
        raise TrainError(problem, hint="compare versions of one source that has human captions or facts")
    return common


def _match_words(
    experiment: Experiment, learned: Examples, train_images: set[int]
) -> tuple[dict[int, int], dict[tuple[str, int], tuple[int, int]]]:
    """Return the word budget by image count, and (images, words) by data entry and image count."""
    budgets: dict[int, int] = {}
    sizes: dict[tuple[str, int], tuple[int, int]] = {}
    for size in train_images:
        limited = {name: limit_images(examples, size) for name, examples in learned.items()}
        budgets[size] = min(map(_count_words, limited.values())) if experiment.match_words else 0
        for name, examples in limited.items():
            fitting = limit_captions(examples, budgets[size])
            sizes[name, size] = len(fitting), _count_words(fitting)
    return budgets, sizes


def _files(model: str) -> list[tuple[str, int, int]]:
    """Return name, size and mtime of each file in a model folder, or [] if `model` is not a folder."""
    files = sorted(path for path in Path(model).glob("*") if path.is_file()) if Path(model).is_dir() else []
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _count_words(examples: list[Example]) -> int:
    return sum(count_words(text) for example in examples for text in example.texts if text.style)


def default_jobs() -> int:
    """Return the number of cells to train in parallel: one per GPU or, without GPUs, one per CPU core."""
    return torch.cuda.device_count() or _count_cores()


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_models(runs: list[Run]) -> None:
    """Raise TrainError if an encoder or a decoder cannot be loaded."""
    models = (("encoder", ENCODERS, (TINY_VIT,)), ("decoder", DECODERS, SCRATCH_DECODERS))
    for factor, known, built_in in models:
        for name in dict.fromkeys(getattr(run.config, factor) for run in runs if not run.is_done):
            try:
                if name not in built_in:
                    load_config(known.get(name, name))
            except LOAD_ERRORS as error:
                hint = f"see `{factor}` of the experiment file"
                raise TrainError(f"cannot load the {factor} {name}: {reason_of(error)}", hint=hint) from None


def run_cells(runs: list[Run], jobs: int, progress: Progress) -> list[str]:
    """Train all unfinished cells, `jobs` at a time. Returns the error messages of failed cells.

    Each cell has its own process, so an error or an out-of-memory kill does not affect other cells.
    """
    waiting = [run for run in runs if not run.is_done]
    done = len(runs) - len(waiting)
    progress("cells", done, len(runs))
    jobs = max(1, min(jobs, len(waiting)))
    threads = max(1, _count_cores() // jobs)
    slots, failed = list(range(jobs)), list[str]()
    running: dict[SpawnProcess, tuple[Run, int]] = {}
    try:
        while waiting or running:
            while waiting and slots:
                run, slot = waiting.pop(0), slots.pop(0)
                process = CONTEXT.Process(target=_train, args=(run, threads, _visible_gpu(slot), os.getpid()))
                (run.folder / ERROR_FILE).unlink(missing_ok=True)
                process.start()
                running[process] = run, slot
            wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                run, slot = running.pop(process)
                if process.exitcode:
                    failed.append(_describe_failure(run, process.exitcode))
                slots.append(slot)
                done += 1
                progress("cells", done, len(runs))
    finally:
        for process in running:
            process.terminate()
            process.join()
    return failed


def _describe_failure(run: Run, exit_code: int) -> str:
    file = run.folder / ERROR_FILE
    message = file.read_text("utf-8") if file.exists() else f"its process ended with exit code {exit_code}"
    return f"{run.folder.name}: {message}"


def _visible_gpu(slot: int) -> str | None:
    """Return the CUDA_VISIBLE_DEVICES value for a slot, or None if there is no GPU."""
    count = torch.cuda.device_count()
    if not count:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (visible.split(",") if visible else [str(n) for n in range(count)])[slot % count]


def _train(run: Run, threads: int, gpu: str | None, parent: int) -> None:
    """Train one cell. Runs in a child process. On an error, writes it to a file and exits with code 1."""
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    folder, version = run.folder, run.version
    values = {name: getattr(run.cell, name) for name in (*FACTORS, "seed")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        values |= {"version": version.name, "digest": version.manifest["digest"]}
        write_json(folder / "cell.json", values)
        resume = (folder / "resume.pt").exists()
        train_captioner(version, run.config, folder, resume=resume, only=run.only)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001
        message = str(error) if isinstance(error, SynthError) else f"{type(error).__name__}: {error}"
        write_text(folder / ERROR_FILE, message)
        sys.exit(1)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
