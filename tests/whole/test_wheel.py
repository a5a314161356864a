"""A wheel contains all that the command needs: it runs from a folder outside the source tree."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_wheel_generates_from_another_folder(tmp_path: Path, source_tree: Path) -> None:
    """Takes some seconds, for a build and a model to load."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path / "dist"), str(source_tree)], check=True)
    (wheel,) = (tmp_path / "dist").glob("synth_captioner-*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "installed")]
    subprocess.run([*install, str(wheel)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import pipeline, sys; sys.argv = ['synth', 'generate', '--source', 'scenes', '--limit', '12'];"
        "assert 'installed' in pipeline.__file__; from pipeline.cli import main; main()"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "data" / "scenes" / "versions" / "v1.0.0" / "README.md").exists()
