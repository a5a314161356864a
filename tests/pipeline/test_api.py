"""The Python API: the example of the README runs, and `load` returns a version with its images."""

import asyncio
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Features, Image, List

import pipeline
from pipeline.errors import ConfigError, StoreError
from pipeline.images.decode import deck_id, image_id
from pipeline.install import installed_version
from pipeline.sources.join import join_images
from tests.chat.server import ChatServer, running_chat
from tests.commands import run_python
from tests.hub.pusher import Pusher
from tests.hub.server import running_hub
from tests.scene_data import make_version, pulled, scene_samples, true_captions

SAMPLES = scene_samples(20)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_local_and_pulled_version_are_loaded_with_images(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "d", SAMPLES)
    make_version(tmp_path / "d", SAMPLES[:12])
    published = pulled(version, tmp_path / "home" / "x")
    for name in (f"{tmp_path}/d@{version.name}", published.path):
        loaded = pipeline.load(name)
        assert loaded.num_rows == {split: count for split, count in version.manifest["rows"].items() if count}
        for split, rows in loaded.items():
            assert isinstance(rows.features, Features) and rows.features["image"] == Image()
            expected = version.read(split).to_pylist()
            assert rows.cast_column("image", Image(decode=False)).to_list() == expected
            assert rows[0]["image"].size == (expected[0]["width_px"], expected[0]["height_px"])
    assert sum(pipeline.load(tmp_path / "d").num_rows.values()) == 12


def test_pages_of_a_deck_are_loaded_as_a_list_of_images(tmp_path: Path) -> None:
    pages = tuple(sample.images[0] for sample in SAMPLES[:3])
    deck = replace(SAMPLES[0], id=deck_id([image_id(page) for page in pages]), images=pages)
    captions = true_captions(SAMPLES[:1])
    ids = captions.schema.get_field_index("sample_id")
    captions = captions.set_column(ids, "sample_id", [[deck.id] * captions.num_rows])
    make_version(tmp_path, [deck], captions, decks=True)
    (rows,) = pipeline.load(tmp_path).values()
    assert rows.features["pages"] == List(Image()) and len(rows[0]["pages"]) == 3


def test_missing_images_raise_an_error_with_a_hint(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "d", SAMPLES)
    texts = pulled(version, tmp_path / "home" / "texts", images=False)
    assert "image" not in pipeline.load(texts.path)["train"].column_names
    images = ((name, tuple(version.store.read([name])[0].as_py())) for name in texts.sample_ids())
    join_images(texts, images)
    assert "image" in pipeline.load(texts.path)["train"].column_names
    for path in version.store.paths():
        path.unlink()
    with pytest.raises(StoreError, match="the images of 20 samples are not in") as raised:
        pipeline.load(tmp_path / "d")
    assert "restore the whole dataset folder" in raised.value.hint


def test_missing_package_is_an_error_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the package datasets") as raised:
        pipeline.load(tmp_path)
    assert "pip install" in raised.value.hint


def test_export_to_a_url_or_below_a_file_is_an_error_with_a_hint(tmp_path: Path) -> None:
    make_version(tmp_path / "d", SAMPLES[:4])
    (tmp_path / "file").touch()
    for out in ("s3://bucket/x", tmp_path / "file/x"):
        with pytest.raises(pipeline.SynthError, match=r"is a URL|a file exists where") as raised:
            pipeline.export(tmp_path / "d", "csv", out)
        assert raised.value.hint


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LOADED = """
import sys
import pipeline
packages = ("pyarrow", "datasets", "torch", "pydantic", "duckdb")
print(*(name for name in packages if name in sys.modules), pipeline.__version__)
import pipeline.cli, pipeline.hub.push, pipeline.report.build, pipeline.run
print(*(name for name in ("datasets", "torch", "transformers", "vllm") if name in sys.modules))
"""


def test_import_loads_no_heavy_package(tmp_path: Path) -> None:
    assert run_python("-c", LOADED, cwd=tmp_path).stdout.split() == [installed_version()]
    assert {"generate", "load", "push", "export", "Config", "SynthError"} < {*pipeline.__all__}
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        pipeline.lod  # noqa: B018


def test_readme_example_generates_exports_pushes_and_loads(tmp_path: Path) -> None:
    (block,) = (text for text in PYTHON_BLOCK.findall(README) if "pipeline.generate(" in text)
    code = f"{block}\nprint(dataset.num_rows, result.stats.asked)"
    with running_hub(tmp_path / "hub") as hub, Pusher(hub, tmp_path / "home") as client:
        done = run_python("-c", code, cwd=tmp_path, env=hub.env(client.home))
        assert hub.hub.storage.repos["dataset", "ORG/NAME"].tags.keys() >= {"v1.0.0"}
    assert done.stdout.splitlines()[0] == "v1.0.0 20" and done.stdout.splitlines()[-1].endswith("} 60")
    assert list((tmp_path / "shards").glob("*.tar"))
    assert '"v1.0.0"' in (tmp_path / "data/scenes/pushed.json").read_text()


def test_keywords_override_settings_file_and_unknown_keyword_is_refused(tmp_path: Path) -> None:
    (tmp_path / "synth.yaml").write_text("source: scenes\nlimit: 3\ntitle: Drawn\n")
    result = pipeline.generate(config=tmp_path / "synth.yaml", out=tmp_path / "d", limit=4)
    assert (result.version.num_rows, result.version.manifest["title"]) == (4, "Drawn")
    again = pipeline.generate(config=result.plan.config, out=tmp_path / "d")
    assert (again.is_new, again.stats.asked) == (False, 0)
    with pytest.raises(pipeline.SynthError, match="unknown config key: limt") as raised:
        pipeline.generate("scenes", limt=3)
    assert raised.value.hint == "did you mean limit?"


def test_generate_asks_a_server_while_an_event_loop_runs_as_in_a_notebook(tmp_path: Path) -> None:
    async def cell(url: str) -> int:
        settings: dict[str, Any] = {"limit": 2, "base_url": [url], "model": "model", "tasks": ["qa"]}
        return pipeline.generate("scenes", out=tmp_path / "d", **settings).version.num_rows

    with running_chat(ChatServer()) as chat:
        assert asyncio.run(cell(chat.url)) == 2
