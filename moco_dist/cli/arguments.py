"""Arguments of the commands that have few: argparse, but a mistake is one line with the nearest right word."""

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from moco_dist.config.address import Url, root_of
from moco_dist.config.section import path_of
from moco_dist.errors import UserError, nearest

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError where argparse prints its usage and exits; no abbreviated flags."""

    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **more})

    def add_argument(self, *names: str, **how: Any) -> argparse.Action:
        """Add an argument: a path (in which `~` at the start is the home folder) for type Path, a data root for Url."""
        read = {Path: path_of, Url: root_of}.get(how.get("type"))  # type: ignore[arg-type]
        return super().add_argument(*names, **{**how, "type": _told(read)} if read else how)

    def parse_own(self, words: list[str], settings: Iterable[str] = ()) -> tuple[argparse.Namespace, list[str]]:
        """The arguments, and the words that are a config's: `section.key`, `--method` and `settings`.

        Args:
            words: of the command line.
            settings: names of settings that have no section.

        Raises:
            UserError: a flag is neither, and resembles one of these arguments more than one of `settings`.
        """
        args, rest = self.parse_known_args(words)
        flags = {f"--{name.replace('_', '-')}" for name in settings}
        for word in rest:
            name = word.partition("=")[0]
            if not name.startswith("--") or "." in name or name.replace("_", "-") in flags:
                continue
            hint = nearest(name, self._option_string_actions)
            if hint and hint == nearest(name, [*self._option_string_actions, *flags]):
                self.error(f"unrecognized arguments: {name}")
        return args, rest

    def error(self, message: str) -> NoReturn:
        """Raise it.

        Raises:
            UserError: always.
        """
        hint = ""
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            hint = nearest(unknown[1], self._option_string_actions)
        elif invalid := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            hint = nearest(invalid[1], [word.strip("' ") for word in invalid[2].split(",")])
        raise UserError(f"{self.prog}: {message}{hint}; {self.prog} --help shows what it takes")


def _told(read: Callable[[str], T]) -> Callable[[str], T]:
    """The same with its mistakes as argparse tells them."""

    def read_word(word: str) -> T:
        try:
            return read(word)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read_word


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse a number that was given and is not greater than 0.

    Raises:
        UserError: one is 0 or less.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g} is not greater than 0")
