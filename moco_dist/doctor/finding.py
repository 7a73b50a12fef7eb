"""One line of the doctor."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What was looked at, what it is like, and what to do.

    Attributes:
        level: error: a run will fail, or learns nothing; warning: it may; ok.
        about: a few words.
        text: one line.
    """

    level: Literal["error", "warning", "ok"]
    about: str
    text: str


def is_error(findings: list[Finding]) -> bool:
    """Whether something has to be done before a run makes sense."""
    return any(finding.level == "error" for finding in findings)


def text(findings: list[Finding]) -> str:
    """One line each, the worst first."""
    order = ("error", "warning", "ok")
    lines = sorted(findings, key=lambda finding: order.index(finding.level))
    return "\n".join(f"{f.level:<8} {f.about}: {f.text}" for f in lines)


def problem(about: str, text: str) -> Finding:
    """A run will fail, or learns nothing."""
    return Finding("error", about, text)


def warning(about: str, text: str) -> Finding:
    """A run may fail, be slow, or learn less."""
    return Finding("warning", about, text)


def fine(about: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding("ok", about, text)
