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
def test_title_defaults_to_name_of_the_folder(source: str, title: str | None, expected: str | None) -> None:
    config = resolve(source=source, title=title)
    described = describe_provenance(config, Tasks(), {"name": "folder"}, {"name": "none"})
    assert described.get("title") == expected
