"""Runs: equal images and words for all kinds of data, and finished cells are skipped."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from pipeline.progress import NullProgress
from tests.scene_data import make_version, scene_samples, true_captions
from trainer.data import count_words, limit_captions, limit_images, read_split_examples
from trainer.experiment.grid import Experiment, cells_of
from trainer.experiment.report import write_result
from trainer.experiment.runs import Run, plan, require_models, run_cells

SAMPLES = scene_samples(60)
SMALL = {"steps": 4, "decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Version]:
    """Return two versions of the same samples; in the second, nine have no captions."""
    captions, without = true_captions(SAMPLES), {sample.id for sample in SAMPLES[:9]}
    remaining = captions.filter(pa.array([name not in without for name in captions["sample_id"].to_pylist()]))
    folder = tmp_path_factory.mktemp("data")
    few, _ = make_version(folder / "few", SAMPLES, remaining)
    return {"all": make_version(folder / "all", SAMPLES)[0], "few": few}


def planned(versions: dict[str, Version], clip: str, out: Path, **changes: Any) -> list[Run]:
    data = {
        "facts": {"data": "all", "text_source": "human"},
        "model": {"data": "few"},
        "both": {"data": "all", "text_source": "mixed"},
    }
    values = {"data": data, "encoder": [clip], "seeds": [0], "settings": SMALL}
    experiment = Experiment.model_validate(values | changes)
    return plan(experiment, cells_of(experiment), lambda name, images: versions[name or ""], out)


def images_of(run: Run, split: str) -> list[str]:
    return [example.sample_id for example in read_split_examples(run.version, split, run.config, run.only)]


def test_all_datasets_are_reduced_to_the_same_images_and_similar_word_counts(
    versions: dict[str, Version], clip: str, tmp_path: Path
) -> None:
    runs = planned(versions, clip, tmp_path)
    for split in ("train", "validation", "test"):
        first, *rest = (images_of(run, split) for run in runs)
        assert first and all(ids == first for ids in rest)
    assert not {sample.id for sample in SAMPLES[:9]} & set(images_of(runs[0], "train"))
    words = [run.train_words for run in runs]
    # Less than two captions.
    assert max(words) - min(words) < 30
    unmatched = {
        run.cell.data: run.train_words for run in planned(versions, clip, tmp_path, match_words=False)
    }
    assert unmatched["both"] > unmatched["model"] > unmatched["facts"]


def test_planned_image_and_word_counts_equal_the_training_data(
    versions: dict[str, Version], clip: str, tmp_path: Path
) -> None:
    for run in planned(versions, clip, tmp_path, train_images=[10, 0]):
        examples = read_split_examples(run.version, "train", run.config, run.only)
        limited = limit_images(examples, run.config.train_images)
        learned = limit_captions(limited, run.config.caption_word_budget)
        assert len(learned) == run.train_images
        captions = [text for example in learned for text in example.texts if text.style]
        assert sum(map(count_words, captions)) == run.train_words
        assert run.train_images == 10 or run.cell.train_images == 0


def test_changed_model_folder_gives_another_cell(
    versions: dict[str, Version], clip: str, tmp_path: Path
) -> None:
    before = planned(versions, clip, tmp_path)[0].folder
    weights = next(Path(clip).glob("*.safetensors"))
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert planned(versions, clip, tmp_path)[0].folder != before


@pytest.mark.parametrize("references", [(), ("Something else.",)])
def test_datasets_without_common_references_are_refused(
    versions: dict[str, Version], clip: str, tmp_path: Path, references: tuple[str, ...]
) -> None:
    changed, _ = make_version(tmp_path / "d", [replace(sample, references=references) for sample in SAMPLES])
    with pytest.raises(TrainError, match="0 test images in common with equal references"):
        planned({"all": versions["all"], "few": changed}, clip, tmp_path)


def kill_first_cell() -> None:
    """Kill the first child process, as the system does if memory is short."""
    while not (cells := active_children()):
        time.sleep(0.01)
    os.kill(cells[0].pid or 0, signal.SIGKILL)


def test_killed_cell_stops_no_other_and_finished_cells_are_skipped(
    versions: dict[str, Version], clip: str, tmp_path: Path
) -> None:
    killed, other = runs = planned(versions, clip, tmp_path)[:2]
    updates: list[tuple[int, int | None]] = []

    class Record(NullProgress):
        def __call__(self, stage: str, done: int, total: int | None, metrics: Any = None) -> None:
            updates.append((done, total))

    killer = threading.Thread(target=kill_first_cell)
    killer.start()
    assert run_cells(runs, 1, Record()) == [f"{killed.folder.name}: its process ended with exit code -9"]
    killer.join()
    assert updates == [(0, 2), (1, 2), (2, 2)] and other.is_done and not killed.is_done
    cell = json.loads((other.folder / "cell.json").read_text())
    assert (cell["data"], cell["seed"], cell["digest"]) == ("model", 0, other.version.manifest["digest"])
    before = (other.folder / "metrics.json").stat().st_mtime_ns
    assert run_cells(runs, 1, NullProgress()) == [] and killed.is_done
    assert before == (other.folder / "metrics.json").stat().st_mtime_ns
    result = write_result(runs, tmp_path)
    assert [arm["data"] for arm in result["arms"]] == ["facts", "model"]
    assert {difference["than"].split(",")[0] for difference in result["differences"]} == {"facts"}
    assert (tmp_path / "experiment.html").read_text().count("data:image/webp;base64,") == len(
        result["examples"]
    )
    assert "| facts, " in (tmp_path / "experiment.md").read_text()


def test_missing_model_raises_an_error_before_training(
    versions: dict[str, Version], clip: str, tmp_path: Path
) -> None:
    require_models(planned(versions, clip, tmp_path, decoder=["scratch", "prefix"]))
    for factor, name in (("encoder", "/nowhere/vit"), ("decoder", "./nowhere")):
        with pytest.raises(
            TrainError, match=f"cannot load the {factor} {name}: the folder does not exist"
        ) as raised:
            available = clip if factor == "encoder" else "scratch"
            require_models(planned(versions, clip, tmp_path, **{factor: [available, name]}))
        assert f"`{factor}` of the experiment file" in raised.value.hint
