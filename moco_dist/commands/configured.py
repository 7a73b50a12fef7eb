"""What the commands share that take a YAML file and flags, on one process or under torchrun."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from moco_dist.config_source import help_text, read_config

Config = TypeVar("Config", bound=BaseModel)


def config_or_help(command: str, schema: type[Config], words: list[str]) -> Config | None:
    """The config that `[CONFIG.yaml] [--section.key VALUE ...]` says; None after `--help`, which is printed.

    Raises:
        UserError: one line per mistake.
    """
    if "-h" in words or "--help" in words:
        print(f"usage: moco-dist {command} [CONFIG.yaml] [--section.key VALUE ...]\n\n{schema.__doc__}\n")
        print(help_text(schema))
        return None
    has_file = bool(words) and not words[0].startswith("-")
    return read_config(schema, Path(words[0]) if has_file else None, words[1:] if has_file else words)
