"""Installation: dependencies resolve together with vLLM, and the scripts in deploy/ work."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from zipfile import ZipFile

import pytest

from pipeline.install import DISTRIBUTION, PACKAGES
from tests.chat.server import ChatServer, running_chat
from tests.commands import Done, require_success, run_python
from tests.hostile import LONG
from tests.resolve import EXTRAS, PLATFORM, PYTHONS, RESOLUTIONS, ROOT, UV, resolve
from tests.whole.conftest import save_photos

TRIED = PYTHONS if LONG else PYTHONS[-1:]  # `make resolve` tries all Python versions


def test_all_extras_resolve_with_vllm_and_core_needs_no_torch() -> None:
    with ThreadPoolExecutor(4) as pool:  # resolvers mostly wait for downloads
        combinations = product(EXTRAS, TRIED, RESOLUTIONS)
        resolved = list(pool.map(lambda values: resolve(*values), combinations))
    assert [result for result in resolved if result.error] == []
    everything = [result.versions for result in resolved if "gpu" in result.extras]
    assert len(everything) == 2 * len(TRIED)
    for versions in everything:
        # a resolver may fall back to the first release
        assert tuple(map(int, versions["vllm"].split(".")[:2])) >= (0, 32)
        assert {"torch", "transformers", "llguidance", "ray", "pillow-heif", "s3fs"} <= versions.keys()
    for core in (result.versions for result in resolved if not result.extras):
        assert not {"torch", "vllm", "transformers", "ray"} & core.keys()


@pytest.mark.skipif(not LONG, reason="a new environment takes a minute: make test-long")
def test_docker_image_script_installs_synth_and_runs_doctor(tmp_path: Path, source_tree: Path) -> None:
    environment = [UV, "venv", "--quiet", "--seed", "--python", sys.executable, str(tmp_path / "env")]
    subprocess.run(environment, check=True)
    python = tmp_path / "env" / "bin" / "python"
    command = ["sh", str(ROOT / "deploy" / "install.sh"), str(source_tree), "heic"]
    env = os.environ | {"PYTHON": str(python)}
    done = require_success(subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True))
    assert f"ok   synth        {DISTRIBUTION} 0.1.0 on Python 3" in done.stdout
    assert "no   embedded     missing: torch" in done.stdout
    command = [str(python.with_name("synth")), "doctor", "--sources"]
    sources = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "folder:PATH" in sources.stdout


def test_docker_image_runs_the_install_script() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    command = "RUN sh /opt/synth/deploy/install.sh /opt/synth"
    assert [line for line in lines if line.startswith("RUN")] == [command]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, source_tree: Path) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source_tree)], check=True)
    return next(folder.glob("synth_captioner-*.whl"))


def test_wheel_contains_all_files_for_generate(tmp_path: Path, wheel: Path) -> None:
    command = ["git", "ls-files", *PACKAGES]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    with ZipFile(wheel) as archive:
        assert {*listing.stdout.splitlines()} <= {*archive.namelist()}
        archive.extractall(tmp_path / "installed")
    save_photos(tmp_path, 4)
    code = "import pipeline; assert 'installed' in pipeline.__file__; from pipeline.cli import main; main()"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    with running_chat(ChatServer()) as chat:
        generate = ("generate", "--source", "folder:photos", "--base-url", chat.url)
        run_python("-c", code, *generate, cwd=tmp_path, env=env)
    assert (tmp_path / "data" / "folder-photos" / "versions" / "v1.0.0" / "README.md").exists()


def test_job_script_dependencies_resolve(wheel: Path) -> None:
    command = [UV, "pip", "compile", "--quiet", "--python-version", "3.12", "--find-links", str(wheel.parent)]
    command += ["--python-platform", PLATFORM, str(ROOT / "deploy" / "hf_job.py")]
    done = require_success(subprocess.run(command, capture_output=True, text=True))
    assert f"{DISTRIBUTION}==0.1.0" in done.stdout
    assert "vllm==" in done.stdout


def test_slurm_array_task_makes_the_dataset_of_its_line_in_the_sources_file(tmp_path: Path) -> None:
    for photo in (save_photos(tmp_path, 4) / "photos").iterdir():
        photo.with_suffix(".txt").write_text(f"A drawing with the name {photo.stem}.")
    line = "--source folder:photos --no-model"
    (tmp_path / "sources.txt").write_text(f'{line}\n{line} --title "My scenes"')
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run_task(number: int) -> Done:
        env = os.environ | {"PATH": path, "SLURM_ARRAY_TASK_ID": str(number)}
        script = ["bash", str(ROOT / "deploy" / "slurm_array.sh"), "sources.txt", "datasets"]
        return subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True)

    require_success(run_task(2))
    assert "# My scenes" in (tmp_path / "datasets/task-0002/versions/v1.0.0/README.md").read_text()
    missing = run_task(3)
    assert (missing.returncode, missing.stderr) == (2, "sources.txt has no line 3\n")
