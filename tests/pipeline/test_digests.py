"""Published names of models contain no local path."""

from pathlib import Path

import pytest

from pipeline.digests import public_name, without_folders


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("tiny-vit", "tiny-vit"),
        ("/scratch/somebody/clip-ft", "clip-ft"),  # a path of another machine
        ("~/models/clip-ft", "clip-ft"),
        ("./clip-ft", "clip-ft"),
        ("models/mine", "mine"),
        ("models/theirs", "models/theirs"),  # not a folder here, so it may be a name on the Hub
    ],
)
def test_published_model_path_has_no_folders(
    name: str, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_folders(name) == published
    assert public_name(f"{name}@0123abcd") == published
