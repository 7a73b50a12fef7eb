"""What every section of settings is made of: strict, frozen models, and the one way to declare a setting.

No torch here, so that `--help` and a wrong flag answer at once.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from moco_dist.errors import UserError

VARIABLE = re.compile(r"(?:^|/)(\$\w+|\$\{\w+\})(?:/|$)")  # a whole part of a path
Probability = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]


# What a setting changes; the first that holds counts. "shapes": of weights or queue, so that no checkpoint of another
# value can be loaded. "result": what is computed. "speed": how fast, or with how much memory. "place": where it is
# computed, and where data is read. "record": how far a run goes now, and what is written of it, where and when.
Changes = Literal["shapes", "result", "speed", "place", "record"]
COMPUTED: tuple[Changes, ...] = ("shapes", "result")


class Declaration(TypedDict):
    """What `setting` knows of a setting beside its type, text, default and limits."""

    changes: Changes
    times: tuple[Literal["step", "loader"], ...]
    per_host: bool
    unit: str
    source: str


def setting(
    default: Any,
    text: str,
    *,
    changes: Changes,
    times: tuple[Literal["step", "loader"], ...] = (),
    per_host: bool = False,
    unit: str = "",
    source: str = "",
    **limits: Any,
) -> Any:
    """A config field: `--help` shows its text, unit, default and source.

    Args:
        default: its value where nothing is given; `...` makes it required.
        text: what it is, in a line.
        changes: what another value of it changes; see `Changes`.
        times: measurements of these parts of a run's time hold for its value alone.
        per_host: hosts of one run may have different values.
        unit: of the value.
        source: where the default was published.
        limits: pydantic's (gt, le, ...).
    """
    declaration = Declaration(changes=changes, times=times, per_host=per_host, unit=unit, source=source)
    return Field(default, description=text, json_schema_extra=cast(Any, declaration), **limits)


def declared(field: FieldInfo) -> Declaration:
    """What `setting` was told."""
    return cast(Declaration, field.json_schema_extra)


class Section(BaseModel):
    """A group of settings: unknown keys are errors, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a field of which nobody has said what it changes, when its module is imported."""
        for name, field in cls.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            extra = field.json_schema_extra
            if not is_section and not (isinstance(extra, dict) and extra["changes"] in get_args(Changes)):
                raise TypeError(f"{cls.__name__}.{name}: setting() declares it, and changes= is one of {Changes}")

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as booleans, and pydantic would take True for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is not a value for it")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_path_is_empty(cls, value: Any, info: ValidationInfo) -> Any:
        """Of empty text pathlib makes the folder that one is in."""
        kind = cls.model_fields[str(info.field_name)].annotation
        return path_of("") if value == "" and Path in (kind, *get_args(kind)) else value

    @field_validator("*", mode="after")
    @classmethod
    def _paths_are_those_of_this_user(cls, value: Any) -> Any:
        """`~` at the start of a path is the home folder, whether or not a shell has seen it."""
        return path_of(value) if isinstance(value, Path) else value


def path_of(text: str | Path) -> Path:
    """The path that a user means: `~` at its start is the home folder, whether or not a shell has seen it.

    Raises:
        UserError: it is empty, the home folder is not known, or it has a `$VARIABLE` that no shell has replaced.
    """
    if not str(text):
        raise UserError("'' is no path; is a variable of the shell empty? . is the folder that you are in")
    if variable := VARIABLE.search(str(text)):
        how = "which only a shell replaces; write the path, or ~ for the home folder"
        raise UserError(f"{text} has {variable[1]}, {how}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: there is no such home folder; give the whole path") from error
