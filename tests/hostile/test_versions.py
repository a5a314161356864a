"""Versions: every command that reads an untrusted version ends with a result or one error."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.dataset.version import file_entry
from pipeline.tables import features
from tests.hostile import Damage, link, outcomes_of, pipe, require_harmless_outcome
from tests.hostile.vectors import ALL
from tests.scene_data import make_version, pulled, scene_samples


def manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / "manifest.json").read_text())
        change(values)
        (folder / "manifest.json").write_text(json.dumps(values))

    return damage


def rename_file(values: dict[str, Any], name: str) -> None:
    values["files"][name] = values["files"].pop("train-00000.parquet")


def rows(change: Callable[[pa.Table], pa.Table]) -> Damage:
    """Return a function that changes the training rows, and their hashes in the manifest."""

    def damage(folder: Path) -> None:
        shard = folder / "train-00000.parquet"
        pq.write_table(change(pq.read_table(shard)), shard)
        manifest(lambda m: m["files"][shard.name].update(file_entry(shard)))(folder)

    return damage


def column(name: str, values: Callable[[pa.Table], Any]) -> Damage:
    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(name)
        made = values(table)
        if isinstance(made, list):
            made = pa.array(made, table.schema.field(index).type)
        return table.set_column(index, name, made)

    return rows(change)


def image(data: bytes | None) -> Damage:
    return column("image", lambda table: [{"bytes": data, "path": "/etc/passwd"}] * table.num_rows)


def huge_png() -> bytes:
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG", compress_level=9)
    return out.getvalue()


def texts(text: str) -> Damage:
    caption = {"text": text, "style": text}
    return column("captions", lambda t: [[old | caption for old in row] for row in t["captions"].to_pylist()])


def own(
    value: Any, kind: pa.DataType, *, name: str = "own", is_list: bool = False, feature: Any = None
) -> Damage:
    """Return a function that adds the column of a custom task, with its description in the manifest."""

    def damage(folder: Path) -> None:
        added = pa.field(name, kind)
        for shard in sorted(folder.glob("*-*.parquet")):
            table = pq.read_table(shard)
            pq.write_table(table.append_column(added, pa.array([value] * table.num_rows, kind)), shard)
            manifest(lambda m, shard=shard: m["files"][shard.name].update(file_entry(shard)))(folder)  # type: ignore[misc]

        def describe(m: dict[str, Any]) -> None:
            m["columns"].append(name)
            m["features"][name] = feature or features(pa.schema([added]))[name]
            m["own_columns"] = {name: {"kind": "boxes", "is_list": is_list}}

        manifest(describe)(folder)

    return damage


VECTORS = [vector.encode("utf-8", "replace").decode() for vector in ALL]
BOXES = pa.list_(pa.struct({"bbox_2d": pa.list_(pa.float64()), "label": pa.string()}))
DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
BROKEN_KEYS = (
    "columns", "features", "rows", "files", "funnel", "config", "source", "licenses", "measured",
    "table_version", "audit", "checks", "price", "ladder", "leakage", "review",
)  # fmt: skip
BROKEN_VALUES: dict[str, Any] = {
    "null": None, "a number": 7, "a text": "x", "a list": [[1]], "a map": {"x": {"y": 1}},
}  # fmt: skip
RATE = {"task": "captions", "style": "", "texts": 1, "reviewed": 1, "cannot_tell": 0, "wrong": 0.5, "low": 7}
AUDIT = {"seed": 0, "reviewed": 1, "reviewers": 1, "version": RATE, "rates": [RATE]}
CERTAIN = {"share": "1", "low": "1", "high": "1"}
COSTLY = {"texts": "captions", "kept": 10**9, "prompt_tokens": 1, "reply_tokens": 1}
INVALID_RESULTS: dict[str, Damage] = {
    "a file outside of the version": manifest(lambda m: rename_file(m, "/etc/passwd")),
    "a file in a folder above": manifest(lambda m: rename_file(m, "train-/../../x")),
    "audit of texts": manifest(lambda m: m.update(audit={"rates": "none"})),
    "audit with an impossible share": manifest(lambda m: m.update(audit=AUDIT)),
    "shares that are texts": manifest(lambda m: m.update(checks=[{"check": "judge", "range": CERTAIN}])),
    "a price of 400 digits": manifest(lambda m: m.update(price=[COSTLY | {"kept": 10**400}])),
    "a ladder with a negative cost": manifest(lambda m: m.update(ladder=[{"cost": -1.0}])),
}
DAMAGES: dict[str, Damage] = {
    **INVALID_RESULTS,
    **{
        f"{key} that is {kind}": manifest(lambda m, key=key, value=value: m.update({key: value}))  # type: ignore[misc]
        for key in BROKEN_KEYS
        for kind, value in BROKEN_VALUES.items()
    },
    "rejections that are null": manifest(lambda m: m.update(rejections=None)),
    "measures that are numbers": manifest(lambda m: m.update(measured={"captions": {"brief": 5}})),
    "filters that are texts": manifest(lambda m: m["config"].update(filter="none")),
    "manifest without a digest": manifest(lambda m: m.pop("digest")),
    "digest that is a path": manifest(lambda m: m.update(digest="../../etc")),
    "version that is a path": manifest(lambda m: m.update(version="v1.0.0/../../x")),
    "a row count of 400 digits": manifest(lambda m: m["rows"].update(train=10**400)),
    "negative rows": manifest(lambda m: m["rows"].update(train=-5)),
    "unknown split": manifest(lambda m: m["rows"].update(evil=1)),
    "unknown columns": manifest(lambda m: m.update(columns=["sample_id", "evil"])),
    "unknown reader columns": manifest(lambda m: m.update(reader_columns=["text", "evil"])),
    "columns twice": manifest(lambda m: m.update(columns=m["columns"] * 2)),
    "unknown task": manifest(lambda m: m["config"].update(tasks=["evil"])),
    "deep manifest": manifest(lambda m: m.update(evil=DEEP)),
    "manifest that is a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest that is deep": lambda folder: (folder / "manifest.json").write_text("[" * 10**5 + "]" * 10**5),
    "manifest that is a pipe": pipe("manifest.json"),
    "manifest that is a device": link("manifest.json", "/dev/zero"),
    "shard that is a pipe": pipe("train-00000.parquet"),
    "shard that is a private file": link("train-00000.parquet", "/etc/passwd"),
    "rejections that are a private file": link("about/rejections.parquet", "/etc/passwd"),
    "shard of other columns": rows(lambda t: pa.table({"evil": [1]})),
    "images that are stated to be stored": manifest(lambda m: m.update(pixels="stored")),
    "shard without images": rows(lambda t: t.drop_columns(["image"])),
    "empty shard": rows(lambda t: t.slice(0, 0)),
    "sample ids that are paths": column("sample_id", lambda t: ["../../evil"] * t.num_rows),
    "sample ids that are null": column("sample_id", lambda t: [None] * t.num_rows),
    "sample ids that are the same": column("sample_id", lambda t: [t["sample_id"][0].as_py()] * t.num_rows),
    "images that are null": image(None),
    "images that are empty": image(b""),
    "images that are text": image(b"GIF89a not really"),
    # This image is created late, because that takes seconds.
    "images of 400 megapixels": lambda folder: image(huge_png())(folder),
    "own values that are infinite boxes": own(
        [{"bbox_2d": [float("inf")] * 4, "label": "x"}], BOXES, is_list=True
    ),
    "own values that are half a box": own([{"bbox_2d": [1.0], "label": None}, None], BOXES, is_list=True),
    "own values that are vectors": own(VECTORS, pa.list_(pa.string())),
    "own values that are not a list": own(5, pa.int64(), is_list=True),
    "own values of another type": own(5, pa.int64(), feature={"dtype": "string", "_type": "Value"}),
    "own values that are images": own(None, pa.string(), feature={"_type": "Image"}),
    "own column named captions": own("x", pa.string(), name="captions"),
    "own column that is a path": own("x", pa.string(), name="../x"),
    "captions that are null": column("captions", lambda t: [None] * t.num_rows),
    "captions of a megabyte": texts("word " * 200_000),
    "captions that are vectors": texts(" ".join(VECTORS)),
    "questions that are texts": column("qa", lambda t: pa.array(["x"] * t.num_rows)),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made, _ = make_version(tmp_path_factory.mktemp("made"), scene_samples(12))
    version = pulled(made, tmp_path_factory.mktemp("home") / "pulled")
    folder, out = tmp_path_factory.mktemp("versions"), tmp_path_factory.mktemp("out")
    for name, damage in {"good": lambda folder: None, **DAMAGES}.items():
        shutil.copytree(version.path, folder / name)
        damage(folder / name)
    return outcomes_of("versions", folder, out)


@pytest.mark.parametrize("name", ["good", *DAMAGES])
def test_hostile_version_gives_result_or_one_error(name: str, outcomes: dict[str, Any]) -> None:
    require_harmless_outcome(name, outcomes[name], max_s=20)


@pytest.mark.parametrize("name", INVALID_RESULTS)
def test_manifest_with_invalid_results_is_refused(name: str, outcomes: dict[str, Any]) -> None:
    assert [*outcomes[name]["results"]] == ["open"]
    assert outcomes[name]["results"]["open"].startswith("error: not a version")
