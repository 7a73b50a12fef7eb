"""The exceptions that are messages to a person, and the hint that goes with a wrong name."""

import difflib
import errno
import unicodedata
from collections.abc import Iterable

# Exit statuses of every command.
EXIT_FAILURE = 1  # an error that nobody has foreseen, with its traceback
EXIT_MISTAKE = 2  # a mistake in what the user gave
EXIT_UNREACHABLE = 69  # EX_UNAVAILABLE: another rank, host or server is gone, so starting again may help
EXIT_IN_USE = 73  # EX_CANTCREAT: another living process writes there; starting again is of no use while it lives
EXIT_IO = 74  # EX_IOERR: a file cannot be read or written; the storage may come back
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved before the end; the same command goes on
EXIT_INTERRUPTED = 130  # Ctrl-C
EXIT_ABORTED = 134  # SIGABRT: NCCL's watchdog, for one
EXIT_KILLED = 137  # SIGKILL: the out-of-memory killer, for one
EXIT_PIPE = 141  # SIGPIPE
EXIT_TERMINATED = 143  # SIGTERM without a handler

# Statuses of the processes of one job, the most telling first. One that fails alone takes the others with it, and they
# can only say that they have lost it (69).
CAUSES = (
    EXIT_MISTAKE, EXIT_IN_USE, EXIT_IO, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_PREEMPTED,
    EXIT_UNREACHABLE,
)  # fmt: skip

# What the system answers about a path or its rights: another attempt would find the same.
OF_A_PATH = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG,
             errno.ELOOP, errno.EROFS, errno.EINVAL}  # fmt: skip


LONGEST_LINE = 2000  # letters


class UserError(ValueError):
    """A mistake in what the user gave. Its text says what is wrong, what is allowed and the nearest choice.

    The command line prints it without a traceback and exits with `exit_status`; a library user sees a ValueError.
    """

    exit_status = EXIT_MISTAKE


class UnreachableError(UserError):
    """Other hosts cannot be reached: the network or a host is gone, so starting again may help."""

    exit_status = EXIT_UNREACHABLE


class LoadingError(UserError):
    """No batch comes: loader processes are killed, have no memory or no file left, or a request to stop came first.

    What was computed up to the last step is whole.
    """

    exit_status = EXIT_UNREACHABLE


class InUseError(UserError):
    """Another living process has what this one would write to: nothing to correct, and nothing to try again."""

    exit_status = EXIT_IN_USE


class InfrastructureError(UserError):
    """A disk, a folder or a device failed that was there before: no mistake, and it may be there again later."""

    exit_status = EXIT_IO


class SaidElsewhere(UserError):
    """The error of another rank, which says it: this one ends with the same status, without a line."""

    def __init__(self, text: str, exit_status: int) -> None:
        """`text` is what the other rank says, and `exit_status` what it ends with."""
        super().__init__(text)
        self.exit_status = exit_status


def file_error(text: str, error: OSError) -> UserError:
    """The exception for a file that somebody named and that cannot be read or written, with `text`.

    It is a mistake where the path, its rights or the file's content is the reason (an OSError of gzip has no number);
    anything else is the disk's or the file server's failure.
    """
    return (UserError if error.errno is None or error.errno in OF_A_PATH else InfrastructureError)(text)


class Preempted(Exception):
    """Somebody asked, and what was done is saved: run the same command to go on."""

    exit_status = EXIT_PREEMPTED

    def __init__(self, where: int | str) -> None:
        """`where` is a step, or says what was done."""
        saved = f"saved at step {where}" if isinstance(where, int) else where
        super().__init__(f"stopped: {saved}; run the same command to go on")


def cause(statuses: Iterable[int]) -> int:
    """The status that tells why a job ended, of those of its processes; 0 where none failed.

    A process that was aborted or killed is a lost one (EXIT_UNREACHABLE).
    """
    lost = {EXIT_ABORTED, EXIT_KILLED}
    failed = [EXIT_UNREACHABLE if status in lost else status for status in statuses if status]
    return min(failed, key=lambda s: CAUSES.index(s if s in CAUSES else EXIT_FAILURE), default=0)


def in_a_line(text: str) -> str:
    """A text as a terminal may show it: names in files of others may hold its control codes, or millions of letters."""
    half = LONGEST_LINE // 2  # what to do about it stands at the end
    shown = text if len(text) <= LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in shown)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name closest to `name`, or nothing when none is close.

    Two names may look the same and be other characters: é, or e and an accent; a space at the end; letters of another
    script. Such names are shown by their codes.
    """
    known, seen = list(known), _visible(name)
    if twins := [other for other in known if other != name and _visible(other) == seen]:
        return f"; {twins[0]!a}, which is there, looks the same as {name!a} and has other characters"
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if matches and _scripts(matches[0]) != _scripts(name):
        return f"; did you mean {matches[0]!a}? {name!a} has letters of another script"
    return f"; did you mean {matches[0]}?" if matches else ""


def _visible(name: str) -> str:
    """What can be seen of a name: one Unicode form, without spaces at its ends and letters of no width."""
    letters = [letter for letter in unicodedata.normalize("NFC", name) if unicodedata.category(letter) != "Cf"]
    return "".join(letters).strip()


def _scripts(name: str) -> set[str]:
    """The scripts of its letters, as Unicode's names of letters begin: LATIN, GREEK."""
    return {unicodedata.name(letter, "").partition(" ")[0] for letter in name if letter.isalpha()}


def not_a_multiple(name: str, value: int, unit: int, what: str) -> str:
    """The line that the setting `name` is no multiple of `unit`, which `what` describes, with the nearest multiples."""
    below, above = value // unit * unit, (value // unit + 1) * unit
    allowed = f"{below} and {above} are" if below else f"{above} is the smallest that is"
    return f"{name} {value} is not a multiple of {what}; {allowed}"
