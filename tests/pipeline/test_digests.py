"""Published names of models contain no local path."""

from pathlib import Path

import pytest

from pipeline.digests import public_name, without_folders


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("tiny-vit", "tiny-vit"),
        # A path of another machine.
        ("/scratch/somebody/clip-ft", "clip-ft"),
        ("~/models/clip-ft", "clip-ft"),
        ("./clip-ft", "clip-ft"),
    ],
)
def test_published_model_path_has_no_folders(name: str, published: str) -> None:
    assert without_folders(name) == published == public_name(f"{name}@0123abcd")


def test_folders_are_removed_from_a_relative_path_only_if_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_folders("models/mine") == "mine"
    # It may be a name on the Hub.
    assert without_folders("models/theirs") == "models/theirs"
