"""The schema of a manifest. A version may come from a stranger: what is read of its manifest is checked here, once."""

import re
from typing import Annotated, Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from pipeline.dataset.conversation import READER_COLUMNS
from pipeline.tables import ADDED_FIELDS, PIXELS, ROW, SPLITS, arrow_type_of

MAX_NAME = 1000  # characters
MAX_DEPTH = 40  # of nested values
Name = Annotated[str, StringConstraints(max_length=MAX_NAME)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
VersionName = Annotated[str, StringConstraints(pattern=r"^v\d{1,9}\.\d{1,9}\.\d{1,9}$")]
OwnColumnName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.parquet")


class _Part(BaseModel):
    """Base of all parts: keys of later releases, and of a user's own, are allowed."""

    model_config = ConfigDict(extra="allow", strict=True)


class FileEntry(_Part):
    """What a manifest says of a file."""

    sha256: Digest
    bytes: Count
    rows: Count = 0


class Origin(_Part):
    """A source or a model."""

    name: Name
    revision: Name


class Step(_Part):
    """The counts of a step."""

    step: Name
    unit: Name
    input: Count
    kept: Count
    rejected: dict[Name, Count]


class OwnColumnEntry(BaseModel):
    """What a manifest says of a column of a user's own task."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Name
    is_list: bool


class Settings(_Part):
    """The settings of the run: those that cards and checks read."""

    tasks: list[Name]


class Manifest(_Part):
    """A manifest, as far as it is read."""

    version: VersionName
    digest: Digest
    parent: VersionName | None
    table_version: Count
    columns: list[Name]
    features: dict[Name, Any]
    licenses: list[Name]
    rows: dict[Name, Count]
    source: Origin
    model: Origin
    prompts: dict[Name, str]
    schemas: dict[Name, Any]
    config: Settings
    funnel: list[Step]
    measured: dict[Name, Any]
    files: dict[Name, FileEntry]
    rejections: FileEntry
    images: FileEntry | None = None  # digests of the images, where these are in a store
    license: Name = ""
    license_link: Name = ""
    title: Name = ""
    language: Name = ""
    pixels: Name = ""
    pixel_columns: list[Name] = []
    scores: list[Name] = []
    context: list[Name] = []
    own_columns: dict[OwnColumnName, OwnColumnEntry] = {}
    reader_columns: list[Name] = []
    acknowledged: list[Name] = []
    review: dict[Name, Count] = {}

    @model_validator(mode="after")
    def _names_only_what_a_version_has(self) -> "Manifest":
        if strange := [name for name in self.files if not _SHARD.fullmatch(name)]:
            raise ValueError(f"names files that are not shards: {strange[0]!r}")  # nothing else may be read or published
        if strange := [name for name, kind in self.features.items() if not _is_feature(kind)]:
            raise ValueError(f"has a feature that is none: {strange[0]!r}")
        if strange := [name for name in self.own_columns if name in (*ROW.names, "split") or name not in self.features]:
            raise ValueError(f"has an own column that cannot be: {strange[0]!r}")
        for name, own in self.own_columns.items():
            if own.is_list and not pa.types.is_list(arrow_type_of(self.features[name])):
                raise ValueError(f"has a list {name!r} that is none")
        unknown = [name for name in self.columns if name not in {*ROW.names, *self.own_columns}]
        unknown += [name for name in self.own_columns if name not in self.columns]
        unknown += [name for name in self.pixel_columns if name not in PIXELS]
        if unknown or len({*self.columns}) < len(self.columns) or "sample_id" not in self.columns:
            raise ValueError(f"has other columns than a version: {(unknown or self.columns)[0]!r}")
        if strange := [name for name in self.reader_columns if name not in READER_COLUMNS.names or name not in self.features]:
            raise ValueError(f"has a column for readers that is unknown here: {strange[0]!r}")
        if ("context" in self.columns) != bool(self.context) or len({*self.context}) < len(self.context):
            raise ValueError("has a context that is not that of its columns")
        if strange := [name for name in self.scores if name not in ADDED_FIELDS]:
            raise ValueError(f"has a score that is unknown here: {strange[0]!r}")
        if not {*self.rows} <= {*SPLITS}:
            raise ValueError(f"has a split {min({*self.rows} - {*SPLITS})!r}")
        return self


def _is_feature(kind: Any) -> bool:
    """Return whether a value is a feature of `datasets`, as tables.features writes it."""
    if not isinstance(kind, dict):
        return False
    if "_type" not in kind:
        return all(map(_is_feature, kind.values()))
    if kind["_type"] == "List":
        return _is_feature(kind.get("feature"))
    return kind["_type"] == "Image" or (kind["_type"] == "Value" and isinstance(kind.get("dtype"), str))


_MANIFEST = TypeAdapter(Manifest)


def check_manifest(values: Any) -> None:
    """Raise ValueError, with the key, if a value is not a manifest that this release can read."""
    _require_shallow(values, MAX_DEPTH)
    try:
        _MANIFEST.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, it ")) from None


def _require_shallow(value: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError("nested too deeply")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(inner, dict | list):
            _require_shallow(inner, depth - 1)
