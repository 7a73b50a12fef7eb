"""What the commands share that take a YAML file and flags, on one process or under torchrun."""

import itertools
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from moco_dist.config_source import help_text, read_config

Config = TypeVar("Config", bound=BaseModel)


def config_or_help(command: str, schema: type[Config], words: list[str]) -> Config | None:
    """The config that `[CONFIG.yaml ...] [--section.key VALUE ...]` says; None after `--help`, which is printed.

    Later files go over earlier ones, setting by setting, and flags over all.

    Raises:
        UserError: one line per mistake.
    """
    if "-h" in words or "--help" in words:
        print(f"usage: moco-dist {command} [CONFIG.yaml ...] [--section.key VALUE ...]\n\n{schema.__doc__}\n")
        print(help_text(schema))
        return None
    files = [Path(word) for word in itertools.takewhile(lambda word: not word.startswith("-"), words)]
    return read_config(schema, files[0] if files else None, words[len(files) :], files[1:])
