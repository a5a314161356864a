"""Experiment files: a grid of cells on one budget, and one clear error for an invalid file."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import ConfigError
from trainer.experiment.grid import Experiment, cells_of, read_experiment

ROOT = Path(__file__).parents[3]
TWO: dict[str, Any] = {
    "data": {"facts": {"data": "d", "text_source": "human"}, "model": {"data": "d"}},
    "encoder": ["tiny-clip"],
    "seeds": [0, 1],
    "settings": {"steps": 100},
}


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate(TWO | changes)


def test_every_kind_of_data_meets_every_encoder_and_seed() -> None:
    cells = cells_of(experiment(encoder=["tiny-clip", "tiny-vit"]))
    assert len(cells) == 8 and len({(cell.data, cell.encoder, cell.seed) for cell in cells}) == 8
    assert {cell.config.text_source for cell in cells if cell.data == "facts"} == {"human"}
    assert all((cell.config.encoder, cell.config.seed) == (cell.encoder, cell.seed) for cell in cells)


def test_all_cells_train_for_the_same_number_of_steps() -> None:
    cells = cells_of(experiment(alignment=["none", "connector", "contrast"]))
    assert {cell.config.align_steps + cell.config.steps for cell in cells} == {100}
    stages = {cell.alignment: (cell.config.align_steps > 0, cell.config.contrastive_weight > 0) for cell in cells}
    assert stages == {"none": (False, False), "connector": (True, False), "contrast": (True, True)}


def test_a_smaller_grid_beside_the_first_replaces_lists_and_adds_settings() -> None:
    second_grid = {"data": ["model"], "decoder": ["smollm2"], "seeds": [0], "settings": {"steps": 7}}
    cells = cells_of(experiment(also=[second_grid]))
    assert len(cells) == 5
    last = cells[-1]
    assert (last.data, last.encoder, last.decoder, last.seed, last.config.steps) == ("model", "tiny-clip", "smollm2", 0, 7)
    assert last.otherwise == "steps 7" and {cell.otherwise for cell in cells[:-1]} == {""}


def test_a_cell_that_is_named_twice_is_run_once() -> None:
    assert len(cells_of(experiment(also=[{"seeds": [1, 2]}]))) == 6


def test_cells_of_other_settings_or_data_do_not_share_a_folder() -> None:
    base, varied = cells_of(experiment())[0], cells_of(experiment(settings={"steps": 100, "dropout": 0.2}))[0]
    names = {base.folder("a"), base.folder("b"), varied.folder("a"), *(cell.folder("a") for cell in cells_of(experiment())[1:])}
    assert len(names) == 6
    assert base.folder("a").startswith("facts-tiny-clip-scratch-none-all-s0-")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {}}, "settings.steps must say"),
        ({"settings": {"steps": 9, "seed": 3}}, "settings.seed is decided by the grid"),
        ({"settings": {"stepz": 9}}, "settings.stepz is not a setting of a training: did you mean steps"),
        ({"encoders": ["clip"]}, "unknown config key: encoders"),
        ({"seeds": []}, "seeds"),
        ({"settings": {"steps": 3}}, "a number from 4 on"),
        ({"also": [{"settings": {"styles": ["brief"]}}]}, "settings.styles of `also`"),
        ({"encoder": ["auto"]}, "auto is none"),
        ({"encoder": ["a/best", "b/best"]}, "same last part"),
        ({"also": [{"data": ["nothing"]}]}, "data that is not there: nothing"),
        ({"data": {"facts": {"text_source": "true"}}}, r"data\.facts\.text_source"),
    ],
)
def test_what_cannot_be_is_one_error_before_anything_runs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(TWO | changes))
    with pytest.raises(ConfigError, match=message):
        read_experiment(tmp_path / "e.yaml")


@pytest.mark.parametrize("content", [None, b"- 1", b"\xff", b"a: ["])
def test_what_is_no_experiment_is_one_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "e.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"e\.yaml"):
        read_experiment(tmp_path / "e.yaml")


def test_the_example_in_the_documentation_is_one() -> None:
    assert len(cells_of(read_experiment(ROOT / "docs" / "experiment.yaml"))) == 20


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"batch_size": 16}])
def test_a_setting_as_it_is_anyway_is_no_other_arm(settings: dict[str, Any]) -> None:
    """Two cells would have one folder, and be trained there at the same time."""
    usual = {"steps": 100, "batch_size": 16}
    cells = cells_of(experiment(settings=usual, also=[{"settings": settings}]))
    assert len(cells) == len(cells_of(experiment(settings=usual)))
    assert len({cell.folder() for cell in cells}) == len(cells)
