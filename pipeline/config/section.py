"""What all settings share: sections of keys, and the forms of names, addresses and languages."""

from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.text.language_codes import RECOGNISED

TASK, STYLE = r"^[a-z][a-z0-9_]*$", r"^[a-z][a-z0-9-]*$"
ANY_LANGUAGE = "any"
JUDGE = r"^/?[^\s@/:]+([/:][^\s@/:]+)*(@[^\s@:/]+)?(@https?://[^/\s?#]+(/[^\s?#]*)?)?$"
LANGUAGE = r"^[a-z]{2,3}$"
FIELD = r"^[A-Za-z][A-Za-z0-9_]*$"
NEED = r"^[a-z][a-z0-9_-]*$"
BASE_URL = r"^https?://[^/\s?#]+(/[^\s?#]*)?$"
HEADER = r"^[A-Za-z0-9-]+$"
HEADER_VALUE = r"^[^\x00-\x08\x0a-\x1f\x7f]*$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
TITLE = r"^[^\x00-\x1f]+$"
LICENSE = r"^[A-Za-z0-9][A-Za-z0-9 .,+-]*$"
PATTERNS = {  # what a value that does not match should be
    TASK: "the name of a task, in small letters",
    STYLE: "the name of a caption style, in small letters",
    LANGUAGE: "a language of two or three letters, such as de",
    JUDGE: "a model and the address of its server, such as MODEL@http://HOST:8000/v1",
    BASE_URL: "an address with http:// or https:// and without a query, such as http://HOST:8000/v1 (of Azure: https://NAME.openai.azure.com/openai/v1)",
    HEADER: "the name of a header",
    HEADER_VALUE: "the value of a header, on one line",
    VARIABLE: "the name of an environment variable",
    FIELD: "the name of a field: letters, digits and _",
    NEED: "the name of a task or of a caption style",
    TITLE: "a title on one line",
    LICENSE: "the name of a license, such as cc-by-4.0",
}
Task = Annotated[str, Field(pattern=TASK, max_length=40)]  # defined in pipeline/tasks
Style = Annotated[str, Field(pattern=STYLE, max_length=40)]  # the prompt template decides which exist


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("named twice")
    return values


def _recognised(code: str) -> str:
    if code not in {*RECOGNISED, ANY_LANGUAGE}:
        raise ValueError("no language in which a text can be recognised; with `any`, texts of all languages are kept")
    return code


# YAML reads the code of Norwegian as false.
Language = Annotated[
    str, BeforeValidator(lambda code: "no" if code is False else code), Field(pattern=LANGUAGE), AfterValidator(_recognised)
]
Item = TypeVar("Item")
Distinct = Annotated[tuple[Item, ...], AfterValidator(_distinct)]


class Section(BaseModel):
    """Base of all sections: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _fill_empty_sections(cls, values: Any) -> Any:
        """Read null as an empty section: YAML returns null for a section whose lines are all commented out."""
        if not isinstance(values, dict):
            return values
        return {key: {} if value is None and _is_section(cls, key) else value for key, value in values.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_true_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false, and lists of them, where numbers are wanted: pydantic would take them for 1 and 0."""
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in items):
            kinds = _kinds_in(cls.model_fields[info.field_name or ""].annotation)
            if not kinds.isdisjoint({int, float}) and bool not in kinds:
                raise PydanticCustomError("bool_for_number", "true is no number")
        return value


def _kinds_in(kind: Any) -> set[Any]:
    """Return the types that stand in the type of a setting: of `tuple[Annotated[int, ...], ...] | None` int, among others."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return {kind}.union(*map(_kinds_in, get_args(kind))) if get_origin(kind) not in (None, Literal) else {kind}


def _is_section(section: type[Section], key: Any) -> bool:
    kind = section.model_fields[key].annotation if key in section.model_fields else None
    return isinstance(kind, type) and issubclass(kind, Section)


AnySection = TypeVar("AnySection", bound=Section)
