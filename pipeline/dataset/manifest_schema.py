"""The schema of a manifest. Versions may be untrusted, so every key that is read is checked here."""

import re
from typing import Annotated, Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pipeline.dataset.conversation import READER_COLUMNS
from pipeline.tables import ADDED_FIELDS, PIXELS, ROW, SPLITS, arrow_type_of

MAX_DEPTH = 40  # maximum nesting of values
Name = Annotated[str, StringConstraints(max_length=1000)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
VersionName = Annotated[str, StringConstraints(pattern=r"^v\d{1,9}\.\d{1,9}\.\d{1,9}$")]
OwnColumnName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Share = Annotated[float, Field(ge=0, le=1)]
_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.parquet")


class _Part(BaseModel):
    """The base class for all parts of a manifest. Parts may have additional keys."""

    model_config = ConfigDict(extra="allow", strict=True)


class FileEntry(_Part):
    """A file of the version."""

    sha256: Digest
    bytes: Count
    rows: Count = 0


class Origin(_Part):
    """A name with a revision."""

    name: Name
    revision: Name


class Writer(Origin):
    """The model that wrote the texts. `license` is empty if no model was asked."""

    license: Name = ""


class Step(_Part):
    """The row counts of a step."""

    step: Name
    unit: Name
    input: Count
    kept: Count
    rejected: dict[Name, Count]


class OwnColumnEntry(BaseModel):
    """The column of a custom task."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Name
    is_list: bool


class TaskSettings(_Part):
    """The settings of a custom task that conversations read."""

    name: Name
    prompt: str


class AuditRate(_Part):
    """The share of wrong texts of a task and style, with its interval. Null without verdicts."""

    task: Name
    style: Name
    texts: Count
    reviewed: Count
    cannot_tell: Count
    wrong: Share | None
    low: Share = 0
    high: Share = 1


class Audit(_Part):
    """The results of an audit."""

    seed: int
    reviewed: Count
    reviewers: Count
    agreement: Annotated[float, Field(ge=-1, le=1)] | None
    rates: list[AuditRate]


class Rate(_Part):
    """A share of texts, with its 95 % interval."""

    count: Count
    share: Share
    low: Share
    high: Share


class CorrectedShare(_Part):
    """A share that is corrected for the errors of a check. It is null if only bounds are known."""

    share: Share | None
    low: Share
    high: Share


class CheckErrors(_Part):
    """The errors of a check, and the share of true texts before any rejection, corrected by them."""

    check: Name
    judges_itself: bool
    min_evidence: Count
    lost: Share | None
    passed: Rate
    true: CorrectedShare | None
    false_alarms: Rate | None
    missed: Rate | None
    kinds: dict[Name, Rate]


class Settings(_Part):
    """The settings that cards, checks and conversations read."""

    tasks: list[Name]
    custom_tasks: list[TaskSettings] = []


class Manifest(_Part):
    """All keys that are read from a manifest."""

    version: VersionName
    digest: Digest
    parent: VersionName | None
    table_version: Count
    columns: list[Name]
    features: dict[Name, Any]
    licenses: list[Name]
    rows: dict[Name, Count]
    source: Origin
    model: Writer
    prompts: dict[Name, str]
    schemas: dict[Name, Any]
    config: Settings
    funnel: list[Step]
    measured: dict[Name, Any]
    files: dict[Name, FileEntry]
    rejections: FileEntry
    images: FileEntry | None = None
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
    audit: Audit | None = None
    checks: list[CheckErrors] = []

    @model_validator(mode="after")
    def _check_names(self) -> "Manifest":
        row_columns = {*ROW.names, *self.own_columns}
        # A file with another name must not be read or published.
        invalid_by_kind = {
            "a file that is not a shard": [name for name in self.files if not _SHARD.fullmatch(name)],
            "an invalid feature": [name for name, kind in self.features.items() if not _is_feature(kind)],
            "an invalid column of a custom task": [
                name
                for name in self.own_columns
                if name in (*ROW.names, "split") or name not in self.features or name not in self.columns
            ],
            "an unknown column": [
                *(name for name in self.columns if name not in row_columns),
                *(name for name in self.pixel_columns if name not in PIXELS),
                *(
                    name
                    for name in self.reader_columns
                    if name not in {*READER_COLUMNS.names} & {*self.features}
                ),
            ],
            "an unknown score": [name for name in self.scores if name not in ADDED_FIELDS],
            "an unknown split": sorted({*self.rows} - {*SPLITS}),
        }
        for kind, names in invalid_by_kind.items():
            if names:
                raise ValueError(f"has {kind}: {names[0]!r}")
        for name, own in self.own_columns.items():
            if own.is_list and not pa.types.is_list(arrow_type_of(self.features[name])):
                raise ValueError(f"has a list column whose type is not a list: {name!r}")
        if len({*self.columns}) < len(self.columns) or "sample_id" not in self.columns:
            raise ValueError(
                f"has {'no column sample_id' if 'sample_id' not in self.columns else 'a duplicate column'}"
            )
        if ("context" in self.columns) != bool(self.context) or len({*self.context}) < len(self.context):
            raise ValueError("has context names that do not match its columns")
        return self


def _is_feature(kind: Any) -> bool:
    """Return whether a value has the form that `tables.features` returns."""
    if not isinstance(kind, dict):
        return False
    if "_type" not in kind:
        return all(map(_is_feature, kind.values()))
    if kind["_type"] == "List":
        return _is_feature(kind.get("feature"))
    return kind["_type"] == "Image" or (kind["_type"] == "Value" and isinstance(kind.get("dtype"), str))


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
