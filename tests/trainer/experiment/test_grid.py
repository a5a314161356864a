"""Experiment files: a grid of cells, and one clear error for an invalid file."""

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


def test_grid_combines_all_data_encoders_and_seeds() -> None:
    cells = cells_of(experiment(encoder=["tiny-clip", "tiny-vit"]))
    assert len(cells) == 8 and len({(cell.data, cell.encoder, cell.seed) for cell in cells}) == 8
    assert {cell.config.text_source for cell in cells if cell.data == "facts"} == {"human"}
    assert all((cell.config.encoder, cell.config.seed) == (cell.encoder, cell.seed) for cell in cells)


def test_cells_with_different_settings_or_data_have_different_folders() -> None:
    base, varied = cells_of(experiment())[0], cells_of(experiment(settings={"steps": 100, "dropout": 0.2}))[0]
    names = {base.folder("b"), varied.folder("a"), *(cell.folder("a") for cell in cells_of(experiment()))}
    assert len(names) == 6
    assert base.folder("a").startswith("facts-tiny-clip-scratch-all-s0-")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {}}, "settings.steps must be the number of steps"),
        ({"settings": {"steps": 9, "seed": 3}}, "remove settings.seed: the grid sets it"),
        ({"settings": {"steps": 9, "stepz": 9}}, "unknown config key: stepz"),
        ({"encoders": ["clip"]}, "unknown config key: encoders"),
        ({"seeds": []}, "seeds"),
        ({"encoder": ["auto"]}, "list each encoder by name: auto is not supported"),
        ({"encoder": ["a/best", "b/best"]}, "two encoders have the same last part"),
        ({"data": {"facts": {"text_source": "true"}}}, r"data\.facts\.text_source"),
    ],
)
def test_invalid_experiment_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(TWO | changes))
    with pytest.raises(ConfigError, match=message):
        read_experiment(tmp_path / "e.yaml")


@pytest.mark.parametrize("content", [None, b"- 1", b"\xff", b"a: ["])
def test_unreadable_experiment_file_is_named_in_the_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "e.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"e\.yaml"):
        read_experiment(tmp_path / "e.yaml")


def test_documented_example_is_valid() -> None:
    assert len(cells_of(read_experiment(ROOT / "docs" / "experiment.yaml"))) == 18
