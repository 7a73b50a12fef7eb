"""Passwords and tokens, kept out of everything that the program says or writes."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

# What servers, stores and schedulers take from the environment; a value is left out wherever it stands.
_SECRET_VARIABLE = re.compile(
    r"(?i)(?:passw(?:or)?d|passphrase|mysql_pwd|token|secret|jwt|connection_string|"
    r"(?:secret|access|account|api|auth|master|private|sas|shared)_?key)$"
)
SHORTEST_SECRET = 6  # letters; what is shorter may be any word or number
_NAMES = (r"[\w.-]*(?:passw(?:or)?d|passphrase|pwd|token|secret|signature|credentials?|"
          r"(?:api|access|account|private)[_-]?key)")  # fmt: skip
_FORMS = (
    # user:password@ of a database. SQLAlchemy takes a password that has a slash in it, even after digits.
    (re.compile(r"(?<=://)(?<!http://)(?<!https://)(?:[^/\s]*@|[^/\s:]*:[^\s@]*@)(?:[^/\s@]*@)*"), ""),
    # The same for a server: what follows a port is a path.
    (re.compile(r"(?<=://)(?:[^/\s]*@|[^/\s:]*:(?!\d+/)[^\s@]*@)(?:[^/\s@]*@)*"), ""),
    # ?password=..., #access_token=..., and ODBC's parameter, which is a text of its own.
    (re.compile(rf"(?i)(?<=[?&#;])((?:{_NAMES}|sig|pass|auth|code|odbc_connect)=)[^&#;\s'\"]*"), r"\1"),
    # ODBC's PWD=...;, libpq's password=... and JSON's "password": "...", in any text.
    (
        re.compile(r"(?i)((?:passw(?:or)?d|pwd)(?:['\"]\s?:\s?|=))(?:'[^']*'|\"[^\"]*\"|[^\s;&,'\".$][^\s;&,'\"]*)"),
        r"\1***",
    ),
    # Authorization: Basic ..., and the same without its header's name.
    (re.compile(r"(?i)(authorization['\"]?\s?[=:]\s?['\"]?(?:(?:basic|bearer|token)\s+)?)[^\s'\",]+"), r"\1***"),
    (re.compile(r"\b((?i:bearer|basic)\s+)(?=[^\s'\"]*[\d=_])[\w+/=.~-]{8,}"), r"\1***"),
)


def without_credentials(text: str) -> str:
    """`text`, a URI or a message with URIs in it, without users, passwords, tokens and what the environment keeps.

    A URI loses its `user:password@` whole, so that it can be compared with the same URI from elsewhere.
    """
    for form, instead in _FORMS:
        text = form.sub(instead, text)
    for name in filter(_SECRET_VARIABLE.search, os.environ):
        # A line break in it may have become \\n, and what follows may be cut off: each of its words is a secret.
        for word in re.split(r"\s+", os.environ[name]):
            if len(word) >= SHORTEST_SECRET and word in text:
                text = text.replace(word, "***")
    return text


def has_credentials(text: str) -> bool:
    """Whether something would be left out of `text`."""
    return without_credentials(text) != text


class Redacted:
    """A text stream that passes on what it is given without credentials; everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; whole URIs come in one, from `print`, `logging` and tracebacks alike."""
        self._stream.write(without_credentials(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def redacted_output() -> Iterator[None]:
    """Keep credentials out of stdout and stderr, whoever writes there: a library's words are not ours to choose.

    After an exception the streams stay so: the interpreter may still print it.
    """
    before = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is not None and not isinstance(stream, Redacted):
            setattr(sys, name, Redacted(stream))
    yield
    sys.stdout, sys.stderr = before
