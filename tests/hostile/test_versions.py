"""Versions: whatever a stranger put into one, every command that reads it ends with a result or one error."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.dataset.version import file_entry
from pipeline.tables import features
from tests.hostile import Damage, link, pipe
from tests.hostile.vectors import ALL
from tests.scene_data import make_version, scene_samples


def manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Return a damage that changes the manifest."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / "manifest.json").read_text())
        change(values)
        (folder / "manifest.json").write_text(json.dumps(values))

    return damage


def rows(change: Callable[[pa.Table], pa.Table]) -> Damage:
    """Return a damage that changes the training rows, with a manifest that says so: the hashes are right."""

    def damage(folder: Path) -> None:
        shard = folder / "train-00000.parquet"
        pq.write_table(change(pq.read_table(shard)), shard)
        manifest(lambda m: m["files"][shard.name].update(file_entry(shard)))(folder)

    return damage


def column(name: str, values: Callable[[pa.Table], Any]) -> Damage:
    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(name)
        made = values(table)
        array = made if isinstance(made, pa.Array | pa.ChunkedArray) else pa.array(made, table.schema.field(index).type)
        return table.set_column(index, name, array)

    return rows(change)


def png_of(width_px: int, height_px: int) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width_px, height_px)).save(out, "PNG", compress_level=9)
    return out.getvalue()


def image(data: bytes | None) -> Damage:
    return column("image", lambda table: [{"bytes": data, "path": "/etc/passwd"}] * table.num_rows)


def texts(text: str) -> Damage:
    def change(table: pa.Table) -> list[Any]:
        return [[caption | {"text": text, "style": text} for caption in row] for row in table["captions"].to_pylist()]

    return column("captions", change)


def own(value: Any, kind: pa.DataType, *, name: str = "own", is_list: bool = False, feature: Any = None) -> Damage:
    """Return a damage that adds a column of a task of one's own, which a manifest describes."""

    def damage(folder: Path) -> None:
        column = pa.field(name, kind)
        described = feature or features(pa.schema([column]))[name]
        for shard in sorted(folder.glob("*-*.parquet")):
            table = pq.read_table(shard)
            pq.write_table(table.append_column(column, pa.array([value] * table.num_rows, kind)), shard)
            manifest(lambda m, shard=shard: m["files"][shard.name].update(file_entry(shard)))(folder)  # type: ignore[misc]
        entry = {name: {"kind": "boxes", "is_list": is_list}}
        manifest(lambda m: m["columns"].append(name))(folder)
        manifest(lambda m: m["features"].update({name: described}))(folder)
        manifest(lambda m: m.update(own_columns=entry))(folder)

    return damage


BOXES = pa.list_(pa.struct({"bbox_2d": pa.list_(pa.float64()), "label": pa.string()}))
DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
BROKEN_KEYS = (
    "columns", "features", "rows", "files", "funnel", "config", "source", "licenses", "measured", "table_version",
)  # fmt: skip
DAMAGES: dict[str, Damage] = {
    **{
        f"{key} that is {kind}": manifest(lambda m, key=key, value=value: m.update({key: value}))  # type: ignore[misc]
        for key in BROKEN_KEYS
        for kind, value in (("null", None), ("a number", 7), ("a text", "x"), ("a list", [[1]]), ("a map", {"x": {"y": 1}}))
    },
    "a rejections that is null": manifest(lambda m: m.update(rejections=None)),
    "a license that is null": manifest(lambda m: m.update(license=None)),
    "measures that are numbers": manifest(lambda m: m.update(measured={"captions": {"brief": 5}})),
    "measures that are lists": manifest(lambda m: m.update(measured={"true_captions": [1], "answers": [2]})),
    "leakage that is a number": manifest(lambda m: m.update(leakage=5)),
    "a review of texts": manifest(lambda m: m.update(review={"good": "many"})),
    "filters that are texts": manifest(lambda m: m["config"].update(filter="none")),
    "a manifest without a digest": manifest(lambda m: m.pop("digest")),
    "a digest that is a path": manifest(lambda m: m.update(digest="../../etc")),
    "a version that is a path": manifest(lambda m: m.update(version="v1.0.0/../../x")),
    "a version of a thousand digits": manifest(lambda m: m.update(version="v" + "9" * 1000 + ".0.0")),
    "rows without end": manifest(lambda m: m["rows"].update(train=10**400)),
    "negative rows": manifest(lambda m: m["rows"].update(train=-5)),
    "an unknown split": manifest(lambda m: m["rows"].update(evil=1)),
    "unknown columns": manifest(lambda m: m.update(columns=["sample_id", "evil"])),
    "columns twice": manifest(lambda m: m.update(columns=m["columns"] * 2)),
    "an unknown task": manifest(lambda m: m["config"].update(tasks=["evil"])),
    "a deep manifest": manifest(lambda m: m.update(evil=DEEP)),
    "a manifest that is a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "a manifest that is deep": lambda folder: (folder / "manifest.json").write_text("[" * 10**5 + "]" * 10**5),
    "a manifest that is not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{}"),
    "a manifest that is a pipe": pipe("manifest.json"),
    "a manifest that is a device": link("manifest.json", "/dev/zero"),
    "a shard that is a pipe": pipe("train-00000.parquet"),
    "a shard that is a private file": link("train-00000.parquet", "/etc/passwd"),
    "a shard that is the environment": link("train-00000.parquet", "/proc/self/environ"),
    "a rejections that is a device": link("rejections.parquet", "/dev/zero"),
    "a rejections that is a private file": link("rejections.parquet", "/etc/passwd"),
    "a shard of other columns": rows(lambda t: pa.table({"evil": [1]})),
    "a shard without images": rows(lambda t: t.drop_columns(["image"])),
    "an empty shard": rows(lambda t: t.slice(0, 0)),
    "sample ids that are paths": column("sample_id", lambda t: ["../../evil"] * t.num_rows),
    "sample ids that are null": column("sample_id", lambda t: [None] * t.num_rows),
    "sample ids that are numbers": column("sample_id", lambda t: pa.array(range(t.num_rows))),
    "sample ids that are the same": column("sample_id", lambda t: [t["sample_id"][0].as_py()] * t.num_rows),
    "images that are null": image(None),
    "images that are empty": image(b""),
    "images that are none": image(b"GIF89a not really"),
    "images of 2,500 megapixels": image(png_of(50_000, 50_000)),
    "images of a hundred to one": image(png_of(20_000, 10)),
    "images that are scripts": image(b"%!PS\n(/etc/passwd) (r) file"),
    "own values that are not numbers": own(float("nan"), pa.float64()),
    "own values that are infinite boxes": own([{"bbox_2d": [float("inf")] * 4, "label": "x"}], BOXES, is_list=True),
    "own values that are half a box": own([{"bbox_2d": [1.0], "label": None}, None], BOXES, is_list=True),
    "own values that are vectors": own([vector.encode("utf-8", "replace").decode() for vector in ALL], pa.list_(pa.string())),
    "own values that are no list": own(5, pa.int64(), is_list=True),
    "own values of another type": own(5, pa.int64(), feature={"dtype": "string", "_type": "Value"}),
    "own values that are images": own(None, pa.string(), feature={"_type": "Image"}),
    "an own column of our name": own("x", pa.string(), name="captions"),
    "an own column that is a path": own("x", pa.string(), name="../x"),
    "an own column that is the split": own("x", pa.string(), name="split"),
    "captions that are null": column("captions", lambda t: [None] * t.num_rows),
    "captions that are numbers": column("captions", lambda t: pa.array(range(t.num_rows))),
    "captions of a megabyte": texts("word " * 200_000),
    "captions that are vectors": texts(" ".join(vector.encode("utf-8", "replace").decode() for vector in ALL)),
    "captions that are empty": texts(""),
    "questions that are texts": column("qa", lambda t: pa.array(["x"] * t.num_rows)),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Open a good version and all damaged ones in one watched process."""
    version, _ = make_version(tmp_path_factory.mktemp("made"), scene_samples(12))
    folder, out = tmp_path_factory.mktemp("versions"), tmp_path_factory.mktemp("out")
    shutil.copytree(version.path, folder / "good")
    for name, damage in DAMAGES.items():
        shutil.copytree(version.path, folder / name)
        damage(folder / name)
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.read_versions", str(folder), str(out)],
        capture_output=True, text=True, timeout=600, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = json.loads(done.stdout)
    assert isinstance(loaded, dict)
    return loaded


def test_a_good_version_is_read_by_all_and_nothing_else_is_touched(outcomes: dict[str, Any]) -> None:
    assert set(outcomes["good"]["results"].values()) == {"done"}
    assert outcomes["good"]["violations"] == []


@pytest.mark.parametrize("name", DAMAGES)
def test_a_hostile_version_is_a_result_or_one_error_for_each_command(name: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[name]["violations"] == []
    assert not [result for result in outcomes[name]["results"].items() if result[1].startswith("TRACEBACK")]
    assert outcomes[name]["seconds"] < 20
