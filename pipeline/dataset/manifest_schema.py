"""The schema of a manifest. Versions may be untrusted, so all names, counts and shares are checked here."""

from typing import Annotated, Any

import pyarrow as pa
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from pipeline.dataset.conversation import READER_COLUMNS
from pipeline.tables import ADDED_FIELDS, PIXELS, ROW, SPLITS, arrow_type_of

MAX_DEPTH = 40
Name = Annotated[str, StringConstraints(max_length=1000)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
VersionName = Annotated[str, StringConstraints(pattern=r"^v\d{1,9}\.\d{1,9}\.\d{1,9}$")]
OwnColumnName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Split = Annotated[str, StringConstraints(pattern=rf"^({'|'.join(SPLITS)})$")]
# A file whose name does not match this pattern must not be read or published.
ShardName = Annotated[str, StringConstraints(pattern=rf"^({'|'.join(SPLITS)})-\d{{5}}\.parquet$")]
PixelColumn = Annotated[str, StringConstraints(pattern=rf"^({'|'.join(PIXELS)})$")]
Score = Annotated[str, StringConstraints(pattern=rf"^({'|'.join(ADDED_FIELDS)})$")]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    """The base class for all parts of a manifest. Parts may have additional keys."""

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)


def _check_feature(kind: Any) -> Any:
    """Return a value that has the form of `tables.features`. Raises ValueError for any other value."""
    if not isinstance(kind, dict):
        raise ValueError("is not a feature")
    if "_type" not in kind:
        return {name: _check_feature(inner) for name, inner in kind.items()}
    if kind["_type"] == "List":
        _check_feature(kind.get("feature"))
    elif kind["_type"] != "Image" and (kind["_type"] != "Value" or not isinstance(kind.get("dtype"), str)):
        raise ValueError("is not a feature")
    return kind


Feature = Annotated[Any, AfterValidator(_check_feature)]


class FileEntry(_Part):
    """A file of the version."""

    sha256: Digest
    bytes: Count
    rows: Count = 0


class Origin(_Part):
    """The name and the revision of a source or a model."""

    name: Name
    revision: Name


class Writer(Origin):
    """A model that writes texts, or checks them. `license` is empty if no model was asked."""

    license: Name = ""


class ReadSource(Origin):
    """A source of samples. `joined_texts` is the number of tokenized human texts that were joined."""

    joined_texts: Count = 0


class Step(_Part):
    """The row counts of a step."""

    step: Name
    unit: Name
    input: Count
    kept: Count
    rejected: dict[Name, Count]


class Result(_Part):
    """A result of an audit, a check, a price, or one of several models. Each kind has only some keys."""

    share: Share | None = None
    low: Share = 0
    high: Share = 1
    wrong: Share | None = None
    lost: Share | None = None
    count: Count = 0
    reviewed: Count = 0
    kept: Count = 0
    prompt_tokens: Count = 0
    reply_tokens: Count = 0
    cost: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    refuted: "Result | None" = None
    range: "Result | None" = None
    reviewer_error: "Result | None" = None
    version: "Result | None" = None
    rejected: "Result | None" = None
    found: list["Result"] = []
    false_alarms: "Result | None" = None
    rates: list["Result"] = []


class OwnColumnEntry(BaseModel):
    """The column of a custom task."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)

    kind: Name
    is_list: bool


class TaskSettings(_Part):
    """The settings of a custom task that are used to build conversations."""

    name: Name
    prompt: str


class Settings(_Part):
    """The settings that cards, checks and conversations read."""

    tasks: list[Name]
    custom_tasks: list[TaskSettings] = []


class Manifest(_Part):
    """All keys that are read from a manifest, except those that are only shown."""

    version: VersionName
    digest: Digest
    parent: VersionName | None
    table_version: Count
    columns: list[Name]
    features: dict[Name, Feature]
    licenses: list[Name]
    rows: dict[Split, Count]
    source: ReadSource
    model: Writer
    prompts: dict[Name, str]
    schemas: dict[Name, Any]
    config: Settings
    funnel: list[Step]
    measured: dict[Name, Any]
    files: dict[ShardName, FileEntry]
    rejections: FileEntry
    license: Name = ""
    license_link: Name = ""
    title: Name = ""
    language: Name = ""
    pixels: Name = ""
    pixel_columns: list[PixelColumn] = []
    scores: list[Score] = []
    context: list[Name] = []
    own_columns: dict[OwnColumnName, OwnColumnEntry] = {}
    reader_columns: list[Name] = []
    acknowledged: list[Name] = []
    review: dict[Name, Count] = {}
    models: dict[Name, Writer] = {}
    audit: Result | None = None
    checks: list[Result] = []
    skipped_checks: dict[Name, dict[Name, Count]] = {}
    price: list[Result] = []
    ladder: list[Result] = []

    @model_validator(mode="after")
    def _check_columns(self) -> "Manifest":
        known, columns = {*ROW.names, *self.own_columns}, {*self.columns}
        readers = {*READER_COLUMNS.names} & {*self.features}
        if unknown := columns - known or {*self.reader_columns} - readers:
            raise ValueError(f"has an unknown column: {min(unknown)!r}")
        if len(columns) < len(self.columns) or "sample_id" not in columns:
            raise ValueError("has duplicate columns, or no column sample_id")
        for name, own in self.own_columns.items():
            if name in (*ROW.names, "split") or name not in columns & {*self.features}:
                raise ValueError(f"has an invalid column of a custom task: {name!r}")
            if own.is_list and not pa.types.is_list(arrow_type_of(self.features[name])):
                raise ValueError(f"declares the column {name!r} as a list, but its type is not a list")
        if ("context" in columns) != bool(self.context) or len({*self.context}) < len(self.context):
            raise ValueError("has context names that do not match its columns")
        return self


def check_manifest(values: Any) -> None:
    """Raise ValueError with the invalid key if a value is not a manifest that this release can read."""
    _require_shallow(values, MAX_DEPTH)
    try:
        Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {message}" if where else message) from None


def _require_shallow(value: Any, depth: int) -> None:
    if depth == 0:
        raise ValueError("nested too deeply")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        if isinstance(child, dict | list):
            _require_shallow(child, depth - 1)
