"""Features: stored states equal computed ones, and builds resume."""

import itertools
import os
import random
import shutil
import socket
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.dataset.version import Version, read_version
from pipeline.errors import TrainError
from pipeline.progress import NullProgress
from tests.scene_data import make_version, scene_samples
from tests.trainer.tiny_models import save_clip
from trainer import features
from trainer.data import Example, examples_in
from trainer.features import OnlineFeatures, load_ahead, store_features
from trainer.model.encoder import Encoder, load_encoder
from trainer.runtime.devices import join_processes

CPU = torch.device("cpu")
QUIET = NullProgress()


class Counted(NullProgress):
    """Records progress, and interrupts the build before batch `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.done: list[tuple[int, int | None]] = []
        self._calls, self._dies_at = itertools.count(), dies_at

    def __call__(self, stage: str, done: int, total: int | None, metrics: Any = None) -> None:
        if next(self._calls) == self._dies_at:
            raise KeyboardInterrupt
        self.done.append((done, total))


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("data"), scene_samples(30))[0]


@pytest.fixture(scope="module")
def examples(version: Version) -> list[Example]:
    return examples_in(version, "train")


@pytest.fixture(scope="module")
def encoder(clip: str) -> Encoder:
    return load_encoder(clip)


def test_stored_states_equal_computed_ones(encoder: Encoder, examples: list[Example], tmp_path: Path) -> None:
    stored = store_features(encoder, examples, tmp_path, CPU, QUIET)
    chosen = [examples[3], examples[0], examples[3]]
    assert torch.equal(stored(chosen), OnlineFeatures(encoder, CPU)(chosen))
    assert torch.equal(stored.states(stored.load(chosen), CPU), stored(chosen))


def test_interrupted_build_resumes(
    encoder: Encoder, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CPU_BATCH_IMAGES", 8)
    monkeypatch.setattr(features, "SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        store_features(encoder, examples, tmp_path, CPU, Counted(dies_at=1))
    (ids,) = tmp_path.glob("*/ids.bin")
    assert ids.stat().st_size == 16 * 32
    # Cut off the last id, too.
    ids.write_bytes(ids.read_bytes()[:-5])
    left = Counted()
    stored = store_features(encoder, examples, tmp_path, CPU, left)
    assert left.done[0] == (8, len(examples) - 15)
    assert torch.equal(stored(examples), OnlineFeatures(encoder, CPU)(examples))


Start = Callable[..., list[ForkServerProcess]]


@pytest.fixture(scope="module")
def start() -> Start:
    """Start processes that store features, as torchrun does."""
    context = get_context("forkserver")  # imports the modules once for all processes
    context.set_forkserver_preload([__name__])

    def start(count: int, *arguments: Any) -> list[ForkServerProcess]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            group |= {"MASTER_PORT": str(free.getsockname()[1])}
        processes = []
        for rank in range(count):
            environment = group | {"RANK": str(rank)}
            processes.append(context.Process(target=store_in_process, args=(environment, *arguments)))
            processes[-1].start()
        return processes

    return start


def store_in_process(
    environment: dict[str, str], version: Path, clip: str, out: Path, sleep_s: float
) -> None:
    encoder, examples = load_encoder(clip), examples_in(read_version(version), "train")
    os.environ |= environment
    rank, _ = join_processes()
    torch.set_num_threads(1)
    features.CPU_BATCH_IMAGES, features.SAVE_EVERY_S = 2, 0.0
    pixels, loaded = OnlineFeatures.pixels, list[str]()

    def count(online: OnlineFeatures, examples: list[Example]) -> torch.Tensor:
        time.sleep(sleep_s)
        loaded.extend(example.sample_id for example in examples)
        return pixels(online, examples)

    features.OnlineFeatures.pixels = count  # type: ignore[assignment, method-assign]
    # In the second build, the third process is on another machine, which has its own disk.
    for name in ("shared", f"machine{rank // 2}"):
        loaded.clear()
        stored = store_features(encoder, examples, out / name, CPU, QUIET)
        # The first loaded image only determines the shape.
        torch.save((stored(examples), loaded[1:]), out / f"{name}-{rank}.pt")
        os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": str(2 - rank // 2)}


def test_processes_share_the_encoding(
    version: Version, clip: str, encoder: Encoder, examples: list[Example], tmp_path: Path, start: Start
) -> None:
    processes = start(3, version.path, clip, tmp_path, 0)
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    expected, ids = OnlineFeatures(encoder, CPU)(examples), sorted(e.sample_id for e in examples)
    for name, ranks in {"shared": (0, 1, 2), "machine0": (0, 1), "machine1": (2,)}.items():
        results = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in ranks]
        assert all(torch.equal(states, expected) for states, _ in results)
        # Machines with their own disks also encode the share of the other machine.
        assert sorted(chain.from_iterable(loaded for _, loaded in results)) == ids
        counts = [len(loaded) for _, loaded in results]
        assert max(counts) - min(counts) <= 1 + (name == "machine0")


def test_killed_processes_resume(
    version: Version, clip: str, encoder: Encoder, examples: list[Example], tmp_path: Path, start: Start
) -> None:
    processes = start(2, version.path, clip, tmp_path, 0.1)
    while not any(path.stat().st_size > 4 * 32 for path in tmp_path.glob("shared/*/ids.bin")):
        assert all(process.is_alive() for process in processes)
        time.sleep(random.random() / 10)
    for process in processes:
        process.kill()
        process.join()
    left = Counted()
    stored = store_features(encoder, examples, tmp_path / "shared", CPU, left)
    assert 0 < left.done[-1][0] < len(examples)
    assert torch.equal(stored(examples), OnlineFeatures(encoder, CPU)(examples))


def test_batches_are_loaded_ahead_of_their_use() -> None:
    parts = iter(range(9))
    loaded = load_ahead(str, parts, count=3, threads=2)
    assert next(loaded) == "0" and next(parts) == 4  # later parts wait, since they take memory
    assert [*loaded] == [str(part) for part in range(1, 9) if part != 4]


def test_threads_that_encode_leave_the_other_threads_as_they_were(
    encoder: Encoder, examples: list[Example], tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        store_features(encoder, examples[:9], tmp_path, CPU, QUIET)
        with ThreadPoolExecutor(1) as pool:
            assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)  # a process that a later test forks hangs with several threads
    assert all(weights.is_contiguous() for weights in encoder.tower.state_dict().values())


def test_different_encoder_states_or_weights_get_a_new_feature_store(
    examples: list[Example], tmp_path: Path
) -> None:
    folder = save_clip(tmp_path / "clip")
    loaded = [load_encoder(folder, states=states) for states in ("all", "2x2", "all")]
    with torch.no_grad():
        next(loaded[2].tower.parameters()).flatten()[0] += 1e-3
    for one in loaded:
        store_features(one, examples, tmp_path / "features", CPU, QUIET)
    assert len(list((tmp_path / "features").iterdir())) == 3


def test_full_disk_raises_an_error_before_images_are_encoded(
    encoder: Encoder, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_features(encoder, examples[:2], tmp_path, CPU, QUIET)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**9 + 500))
    store_features(encoder, examples[:2], tmp_path, CPU, QUIET)
    progress = Counted()
    with pytest.raises(TrainError, match=r"hidden states of 22 images take .* are free") as refused:
        store_features(encoder, examples[:24], tmp_path, CPU, progress)
    assert "2x2" in refused.value.hint and progress.done == []


def test_save_reads_only_the_ids_that_other_processes_added(tmp_path: Path) -> None:
    own, other = (features._Store(tmp_path / "store", record_bytes=1) for _ in range(2))
    ids = [bytes([number]) * 32 for number in range(6)]

    def append(store: Any, *numbers: int) -> None:
        store.append(
            [ids[number] for number in numbers], np.array([[number] for number in numbers], np.uint8)
        )

    append(own, 0, 1)
    append(other, 1, 2)
    append(own, 2, 3)
    # A store that read known ids again would find this damage, and remove the rows after it.
    with (tmp_path / "store/ids.bin").open("r+b") as file:
        file.seek(32)
        file.write(ids[0])
    append(other, 3, 4)
    append(own, 4, 5)
    assert (tmp_path / "store/ids.bin").read_bytes() == b"".join([ids[0], ids[0], *ids[2:]])
    assert (tmp_path / "store/states.bin").read_bytes() == bytes(range(6))


@pytest.mark.parametrize("name", ["lock", "ids.bin", "states.bin"])
def test_linked_file_is_refused(encoder: Encoder, examples: list[Example], tmp_path: Path, name: str) -> None:
    store_features(encoder, examples, tmp_path / "features", CPU, QUIET)
    (store,) = (tmp_path / "features").iterdir()
    (tmp_path / "precious").write_text("of the user")
    (store / name).unlink()
    (store / name).symlink_to(tmp_path / "precious")
    with pytest.raises(TrainError, match=r"is a (?:sym)?link"):
        store_features(encoder, examples, tmp_path / "features", CPU, QUIET)
    assert (tmp_path / "precious").read_text() == "of the user"


def test_lost_or_damaged_records_are_computed_again(
    encoder: Encoder, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CPU_BATCH_IMAGES", 8)
    monkeypatch.setattr(features, "SAVE_EVERY_S", 0.0)
    expected = OnlineFeatures(encoder, CPU)(examples)
    store_features(encoder, examples, tmp_path, CPU, QUIET)
    (path,) = tmp_path.iterdir()
    size, count = (path / "states.bin").stat().st_size, len(examples)
    os.truncate(path / "states.bin", size // 2)
    again = Counted()
    assert torch.equal(store_features(encoder, examples, tmp_path, CPU, again)(examples), expected)
    assert again.done[-1] == (count - count // 2, count - count // 2)
    ids = (path / "ids.bin").read_bytes()
    # Repeat one id.
    (path / "ids.bin").write_bytes(ids[:64] + ids[32:64] + ids[96:])
    assert torch.equal(store_features(encoder, examples, tmp_path, CPU, QUIET)(examples), expected)
    (path / "states.bin").unlink()
    # Ids whose records were deleted must not point to records that are written later.
    with pytest.raises(KeyboardInterrupt):
        store_features(encoder, examples, tmp_path, CPU, Counted(dies_at=0))
    assert torch.equal(store_features(encoder, examples, tmp_path, CPU, QUIET)(examples), expected)
