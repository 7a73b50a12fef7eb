"""The one exception that is a message to a person, and the hint that goes with a wrong name."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave. Its text says what is wrong, what is allowed and the nearest choice.

    The command line prints it without a traceback and exits with 2; a library user sees a ValueError.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name closest to `name`, or nothing when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
