"""The Python API: importing `trainer` is cheap, and `trainer.train` works as in the README."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trainer
from pipeline.dataset.version import Version
from pipeline.storage.files import read_json
from tests.notes import Notes
from tests.scene_data import make_version, scene_samples
from tests.trainer.small_trainings import SMALL, replace
from trainer import TrainConfig

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_import_loads_no_other_package() -> None:
    code = "import sys; before = {*sys.modules}; import trainer; print(*({*sys.modules} - before), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"trainer"}


def test_settings_are_checked_before_torch_is_loaded() -> None:
    code = """
import sys, trainer
try:
    trainer.train("nowhere", epoch=1)
except Exception as error:
    print(type(error).__name__, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ConfigError", "False"]


def test_readme_example_trains_a_captioner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (text for text in PYTHON_BLOCK.findall(README) if "trainer.train(" in text)
    with monkeypatch.context() as context:
        context.chdir(tmp_path)
        make_version(Path("data/scenes"), scene_samples(60))
        names: dict[str, Any] = {}
        exec(block, names)
        result = names["result"]
        assert result.path == Path("data/scenes/checkpoints/v1.0.0-tiny-clip-scratch")
        assert result.metrics == read_json(result.path / "metrics.json")
        assert capsys.readouterr().out.startswith(f"{result.path} ")
    assert {"bleu_4", "rouge_l", "cider_d"} <= result.scores.keys()


def test_settings_override_config_and_the_result_has_all_settings(version: Version, tmp_path: Path) -> None:
    progress = Notes()
    config = replace(encoder="tiny-vit", seed=3)
    result = trainer.train(version, config, out=str(tmp_path), progress=progress, steps=2, seed=4)
    assert (result.path, result.version) == (tmp_path, version)
    assert (result.config.seed, result.config.steps) == (4, 2)
    assert result.config.decoder_width == SMALL.decoder_width
    trained = TrainConfig.model_validate(read_json(tmp_path / "train.json"))
    assert trained == result.config
    assert any(text.startswith("training on ") for text in progress.texts)
    again = trainer.train(version, config, out=tmp_path, steps=2, seed=4)
    assert again.metrics == result.metrics
