"""What every section of settings is made of: strict, frozen models, and the one way to declare a setting.

No torch here, so that `--help` and a wrong flag answer at once.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Probability = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]


def setting(default: Any, text: str, *, unit: str = "", source: str = "", **limits: Any) -> Any:
    """A config field: `--help` shows its text, unit, default and source; `limits` are pydantic's (gt, le, ...)."""
    return Field(default, description=text, json_schema_extra={"unit": unit, "source": source}, **limits)


class Section(BaseModel):
    """A group of settings: unknown keys are errors, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as booleans, and pydantic would take True for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is not a value for it")
        return value
