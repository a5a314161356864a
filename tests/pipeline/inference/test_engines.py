"""Engine choice by the settings and the hardware, licenses of models, and download before a server starts."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.digests import weights_revision
from pipeline.errors import ConfigError, EngineError, SynthError
from pipeline.inference import engines
from pipeline.inference.engines import TINY_WEIGHTS, box_unit_of, pick_engine
from pipeline.inference.model_licenses import UNKNOWN_LICENSE, license_of
from pipeline.inference.vllm import VLLM_PYTHON
from pipeline.plan import Model, Plan, describe_boxes
from tests.chat.server import ChatServer, running_chat
from tests.hub.server import running_hub
from tests.plans import engine_of

REVISION = "0123456789abcdef"  # `synth serve` appends the revision to the model name


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_gpu", lambda: False)
    monkeypatch.delenv(VLLM_PYTHON, raising=False)


def test_auto_engine_chooses_given_server_or_vllm_or_embedded(
    monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> None:
    choice = engine_of(resolve(source="scenes"))
    assert choice[:3] == ("embedded", "tiny", weights_revision(TINY_WEIGHTS))
    with running_chat(ChatServer(model=f"m@{REVISION}")) as chat:
        choice = engine_of(resolve(source="folder:x", base_url=[chat.url]))
    assert choice[:3] == ("vllm", f"m@{REVISION}", REVISION)
    monkeypatch.setattr(engines, "has_gpu", lambda: True)
    monkeypatch.setenv(VLLM_PYTHON, "/opt/vllm/python")
    assert pick_engine(resolve(source="scenes")) == ("vllm", "this machine has a GPU and vLLM")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"verify": {"checks": ["covers"]}}, "can neither read nor repair captions"),
        ({"source": "folder:x", "model": "tiny"}, "can only describe --source scenes, not folder:x"),
        ({"server": {"flags": ["--max-num-seqs", "7"]}}, "synth starts no server"),
        ({"engine": "embedded", "base_url": ["http://localhost:1/v1"]}, "cannot be combined"),
        ({"generate": {"caption_styles": ["plain"]}}, "does not support the caption style plain"),
        ({"source": "folder:x"}, "Qwen2.5-VL-3B-Instruct needs a server: no --base-url, and no GPU"),
        ({"engine": "embedded", "model": "a/b"}, "a/b needs a server: --engine embedded runs only the tiny"),
    ],
)
def test_settings_that_no_engine_supports_are_refused(
    settings: dict[str, Any], problem: str, no_gpu: None
) -> None:
    with pytest.raises(SynthError, match=problem) as caught:
        engine_of(resolve(**{"source": "scenes", **settings}))
    # A missing server is a problem of this machine (EngineError). The others are mistakes in the settings.
    assert type(caught.value) is (EngineError if "needs a server" in problem else ConfigError)


def test_revision_of_a_hub_model_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, name: SimpleNamespace(sha=f"{name}1"))
    assert engine_of(resolve(source="folder:x", engine="vllm", model="me/a")).revision == "me/a1"


def test_flags_that_may_change_replies_change_the_revision(no_gpu: None) -> None:
    def revision(*flags: str) -> str:
        return engine_of(resolve(source="scenes", engine="vllm", server={"flags": flags})).revision

    neutral = ("--max-num-seqs", "7", "--block-size=16", "--max_model_len", "4096", "-tp", "2", "-pp=2")
    assert revision(*neutral) == revision() == weights_revision(TINY_WEIGHTS)
    assert len({revision(), revision("--quantization", "fp8"), revision("--quantization=awq")}) == 3
    assert revision("--enforce-eager", "-q", "awq") == revision("-q", "awq", *neutral) != revision()
    assert (
        revision("--block-size", "16", "--seed", "-1") == revision("--seed", "-1") != revision("--seed", "1")
    )


def test_missing_vllm_error_has_three_hints(no_gpu: None) -> None:
    choice = engine_of(resolve(source="scenes", engine="vllm"))
    with pytest.raises(EngineError, match="vLLM is not installed here") as caught:
        choice.make()
    assert all(way in caught.value.hint for way in ("pip install vllm", VLLM_PYTHON, "--base-url"))


@pytest.mark.parametrize(
    ("model", "unit"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "pixels"), ("qwen2.5vl:3b", "pixels"),
        ("internlm/CapRL-3B", "pixels"), ("/models/Qwen3-VL-4B/", "thousandths"),
        ("OpenGVLab/InternVL3-8B-hf", "thousandths"), ("OpenGVLab/InternVL3_5-8B", None),
        ("/data/qwen3-vl-exp/llama", None),
    ],
)  # fmt: skip
def test_box_unit_follows_the_model_name(model: str, unit: str | None) -> None:
    assert box_unit_of(model) == unit


def test_model_whose_box_unit_differs_from_the_task_is_reported() -> None:
    task = {"name": "things", "kind": "boxes", "prompt": "Find things."}
    qwen3, qwen2 = "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"

    def notes(model: str, small: str = qwen2, **settings: Any) -> list[str]:
        config = resolve(source="folder:x", models={"small": {"model": small}}, **settings)
        models = {"default": Model(model, "1"), "small": Model(small, "2")}
        return list(describe_boxes(Plan.resolve(config, DatasetDir(Path("d")), models)))

    (note,) = notes(qwen3, custom_tasks=[task])
    assert note.startswith(f"{qwen3} writes boxes in thousandths, but the task things expects pixels")
    assert not notes(qwen2, custom_tasks=[task]) and not notes("gpt-5", custom_tasks=[task])
    assert not notes(qwen3) and not notes(qwen3, custom_tasks=[task | {"coordinates": "thousandths"}])
    ladder = {"task_models": {"things": ["default", "small"]}}
    assert len(notes(qwen2, qwen3, custom_tasks=[task], **ladder)) == 1
    assert not notes(qwen3, qwen2, custom_tasks=[task], task_models={"things": "small"})


COMMAND = """
import shutil, sys
from huggingface_hub import HfApi
from pipeline.errors import EngineError
from pipeline.inference import engines
from tests.notes import Notes
folder, is_full = sys.argv[1], sys.argv[2] == "full"
api = HfApi()
api.create_repo("me/model", exist_ok=True)
commit = api.upload_folder(repo_id="me/model", folder_path=folder).oid
if is_full:
    engines.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10, 9, 1)
for attempt in range(2):
    notes = Notes()
    try:
        found = engines.download_model("me/model", commit, notes)
        print(*sorted(path.name for path in found.iterdir()), *notes.texts)
    except EngineError as error:
        print(error, error.hint)
"""


def download_twice(model: Path, tmp_path: Path, disk: str = "free") -> list[str]:
    with running_hub(tmp_path / "hub") as hub:
        command = [sys.executable, "-c", COMMAND, str(model), disk]
        env = hub.env(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "model-q4.gguf"):
        (folder / name).write_bytes(name.encode() * 1000)
    return folder


@pytest.mark.parametrize("disk", ["free", "full"])
def test_model_is_downloaded_once_without_copies_of_weights(disk: str, model: Path, tmp_path: Path) -> None:
    first, second = download_twice(model, tmp_path, disk)
    if disk == "full":
        assert "me/model needs 0.0 GB in" in first and "set HF_HOME" in first
        assert second == first
        return
    assert second == ".gitattributes config.json model.safetensors"
    assert first.startswith(f"{second} downloading me/model: 3 files, 0.0 GB, to ")


def test_model_without_safetensors_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    first, second = download_twice(model, tmp_path)
    assert first == second and first.startswith("me/model has no weights in safetensors files")


RESEARCH = "Qwen Research License: no commercial use"


@pytest.mark.parametrize(
    ("model", "stated"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", RESEARCH),
        ("/models/Qwen2.5-VL-3B-Instruct/", RESEARCH),
        ("Qwen2.5-VL-3B-Instruct@c0ffee", RESEARCH),
        ("qwen2.5vl:3b", RESEARCH),
        ("someone/my-Qwen2.5-VL-3B-medical", RESEARCH),
        ("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "Apache-2.0"),
        ("qwen2.5vl:7b-q4_K_M", "Apache-2.0"),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct-FP8", "Apache-2.0"),
        ("tiny", "Apache-2.0"),
        ("Qwen/Qwen2.5-VL-72B-Instruct", UNKNOWN_LICENSE),
        # A fine-tuned copy may have other terms than its base model.
        ("someone/Qwen2.5-VL-7B-medical", UNKNOWN_LICENSE),
        ("/data/qwen3-vl/llama", UNKNOWN_LICENSE),
        ("gpt-5", UNKNOWN_LICENSE),
    ],
)
def test_license_follows_the_name_of_the_model(model: str, stated: str) -> None:
    assert license_of(model) == stated
