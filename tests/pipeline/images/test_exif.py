"""EXIF: only requested fields are read before an image loses its metadata."""

import io
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image, TiffImagePlugin

from pipeline.config.files import resolve
from pipeline.images.metadata import is_exif_name, read_exif
from pipeline.sources import open_source
from pipeline.types import Sample
from tests.pipeline.images.test_similarity import photo

NAMES = (
    "exif_Model",
    "exif_DateTimeOriginal",
    "exif_FNumber",
    "exif_GPSLatitude",
    "exif_GPSLongitude",
    "exif_ISOSpeedRatings",
)


def taken(kind: str = "JPEG", model: str = "Box 3") -> bytes:
    """Return a photo with EXIF: model, time, aperture, and a position in the south and west."""
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = model
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2024:05:17 08:30:00"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FNumber] = TiffImagePlugin.IFDRational(28, 10)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = b"secret"
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitudeRef], gps[ExifTags.GPS.GPSLatitude] = "S", (33.0, 30.0, 36.0)
    gps[ExifTags.GPS.GPSLongitudeRef], gps[ExifTags.GPS.GPSLongitude] = "W", (70.0, 15.0, 0.0)
    buffer = io.BytesIO()
    photo(1).save(buffer, kind, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_requested_exif_fields_are_read_as_strings(kind: str) -> None:
    assert read_exif(taken(kind), NAMES) == {
        "exif_Model": "Box 3",
        "exif_DateTimeOriginal": "2024:05:17 08:30:00",
        "exif_FNumber": "2.8",
        "exif_GPSLatitude": "-33.510000",
        "exif_GPSLongitude": "-70.250000",
    }
    assert read_exif(taken(kind), ["exif_MakerNote"]) == {}  # binary


def test_exif_names_follow_the_standard() -> None:
    assert all(map(is_exif_name, NAMES))
    assert not any(map(is_exif_name, ["Model", "exif_", "exif_Shoe", "title"]))


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff"])
def test_image_without_readable_exif_has_no_fields(data: bytes) -> None:
    assert read_exif(data, NAMES) == {}


@pytest.mark.parametrize("source", ["folder", "list", "archive"])
def test_requested_exif_fields_are_moved_from_the_image_to_context(source: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(taken())
    buffer = io.BytesIO()
    photo(2).save(buffer, "JPEG")
    (tmp_path / "photos" / "b.jpg").write_bytes(buffer.getvalue())
    if source == "list":
        (tmp_path / "photos" / "list.txt").write_text("a.jpg\nb.jpg\n")
    if source == "archive":
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for name in ("a.jpg", "b.jpg"):
                archive.write(tmp_path / "photos" / name, name)
    path = {"folder": "photos", "list": "photos/list.txt", "archive": "photos.zip"}[source]
    names = "exif_Model,exif_GPSLatitude" if source == "list" else "file_name,exif_Model,exif_GPSLatitude"
    opened = open_source(resolve(source=f"{source}:{tmp_path}/{path}", columns={"context": names}))
    samples = [sample for sample in opened.rows if isinstance(sample, Sample)]
    contexts = [dict(sample.context) for sample in samples]
    assert [context.pop("file_name", "") for context in contexts] == (
        ["", ""] if source == "list" else ["a.jpg", "b.jpg"]
    )
    assert contexts[0] == {"exif_Model": "Box 3", "exif_GPSLatitude": "-33.510000"}
    assert contexts[1] == {"exif_Model": "", "exif_GPSLatitude": ""}
    assert all(read_exif(sample.images[0], NAMES) == {} for sample in samples)


def test_source_column_overrides_exif_field(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"image": [taken()], "exif_Model": ["of the table"], "title": ["Lake"]}),
        tmp_path / "a.parquet",
    )
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(taken())
    (tmp_path / "photos" / "metadata.csv").write_text("file_name,exif_Model\na.jpg,of the table\n")
    for source in (f"parquet:{tmp_path}/a.parquet", f"folder:{tmp_path}/photos"):
        (sample,) = open_source(resolve(source=source, columns={"context": "exif_FNumber,exif_Model"})).rows
        assert isinstance(sample, Sample)
        assert dict(sample.context) == {"exif_FNumber": "2.8", "exif_Model": "of the table"}
