"""Tests of manifests: a version is titled by the folder of its images, without other parts of the path."""

import pytest

from pipeline.config.files import resolve
from pipeline.dataset.manifest import describe_provenance
from pipeline.tasks import Tasks


@pytest.mark.parametrize(
    ("source", "title", "expected"),
    [
        ("folder:photos", None, "photos"),
        ("folder:/home/me/2019 Sommer/", None, "2019 Sommer"),
        ("folder:photos", "My lakes", "My lakes"),
        ("folder:..", None, None),
        ("folder:two\nlines", None, None),
        ("parquet:photos/a.parquet", None, None),
    ],
)
def test_title_defaults_to_name_of_the_folder_and_no_local_path_is_published(
    source: str, title: str | None, expected: str | None
) -> None:
    generate, verify = {"prompt_dir": "/home/me/prompts"}, {"clip_model": "/home/me/clip"}
    config = resolve(source=source, title=title, generate=generate, verify=verify)
    described = describe_provenance(config, Tasks(), {"name": "folder"}, {"name": "none"})
    assert described.get("title") == expected
    assert "/home/me" not in str(described)
