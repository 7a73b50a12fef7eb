"""The exceptions that are messages to a person, and the hint that goes with a wrong name."""

import difflib
import unicodedata
from collections.abc import Iterable

# Exit statuses of every command.
EXIT_MISTAKE = 2  # a mistake in what the user gave
EXIT_UNREACHABLE = 69  # EX_UNAVAILABLE: another rank, host or server is gone, so starting again may help
EXIT_IO = 74  # EX_IOERR: a file cannot be read or written
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved before the end; the same command goes on
EXIT_INTERRUPTED = 130  # Ctrl-C
EXIT_PIPE = 141  # SIGPIPE


class UserError(ValueError):
    """A mistake in what the user gave. Its text says what is wrong, what is allowed and the nearest choice.

    The command line prints it without a traceback and exits with `exit_status`; a library user sees a ValueError.
    """

    exit_status = EXIT_MISTAKE


class UnreachableError(UserError):
    """Other hosts cannot be reached: of the network or of a host that is gone, so starting again may help."""

    exit_status = EXIT_UNREACHABLE


class LoadingError(UserError):
    """No batch comes: loader processes are killed, have no memory or no file left, or a request to stop came first.

    What was computed up to the last step is whole.
    """

    exit_status = EXIT_UNREACHABLE


class Preempted(Exception):
    """A scheduler asked, all ranks have agreed, and the run is saved: run the same command to go on."""

    exit_status = EXIT_PREEMPTED

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped: saved at step {step}; run the same command to go on")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name closest to `name`, or nothing when none is close.

    Two names may look the same and be other characters (é, or e and an accent): those are shown by their codes.
    """
    known, seen = list(known), unicodedata.normalize("NFC", name)
    if twins := [other for other in known if other != name and unicodedata.normalize("NFC", other) == seen]:
        return f"; {twins[0]!a}, which is there, looks the same as {name!a} and is another Unicode form of it"
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def not_a_multiple(name: str, value: int, unit: int, what: str) -> str:
    """That the setting `name` is no multiple of `unit`, which `what` is a description of; and the nearest that are."""
    below, above = value // unit * unit, (value // unit + 1) * unit
    allowed = f"{below} and {above} are" if below else f"{above} is the smallest that is"
    return f"{name} {value} is not a multiple of {what}; {allowed}"
