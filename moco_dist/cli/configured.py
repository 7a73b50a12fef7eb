"""What the commands share that take a YAML file and flags, on one process or under torchrun."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from moco_dist.config.evaluate import DetectConfig, FinetuneConfig, KnnConfig, LinearConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.section import path_of
from moco_dist.config.source import help_text, leaf_fields, read_config, read_yaml
from moco_dist.errors import UserError

Config = TypeVar("Config", bound=BaseModel)
# A file that several commands would take is taken for the first one's.
SCHEMAS: dict[str, type[BaseModel]] = {
    "pretrain": PretrainConfig, "linear": LinearConfig, "knn": KnnConfig, "finetune": FinetuneConfig,
    "detect": DetectConfig,
}  # fmt: skip


def config_or_help(command: str, schema: type[Config], words: list[str]) -> Config | None:
    """The config that `[CONFIG.yaml ...] [--section.key VALUE ...]` gives; None after `--help`, which is printed.

    Later files go over earlier ones, setting by setting, and flags over all.

    Raises:
        UserError: one line per mistake.
    """
    if "-h" in words or "--help" in words:
        print(f"usage: moco-dist {command} [CONFIG.yaml ...] [--section.key VALUE ...]\n\n{schema.__doc__}")
        print(f"On several GPUs: torchrun --nproc-per-node N -m moco_dist {command} ...")
        print(help_text(schema))
        return None
    files, flags = files_and_flags(words)
    for file in files:
        require_config_of(schema, file)
    return read_config(schema, files[0] if files else None, flags, files[1:])


def files_and_flags(words: list[str]) -> tuple[list[Path], list[str]]:
    """The config files, which come first, and the rest."""
    files = [path_of(word) for word in itertools.takewhile(lambda word: not word.startswith("-"), words)]
    return files, words[len(files) :]


def require_config_of(schema: type[BaseModel], file: Path) -> None:
    """Refuse a file for another command in one line, where each of its settings would be one.

    Raises:
        UserError: more settings of `file` are another command's than `schema`'s; or it cannot be read.
    """
    command = command_of(file)
    if _num_known(file, SCHEMAS[command]) > _num_known(file, schema):
        raise UserError(f"config file {file} is one of moco-dist {command}")


def command_of(file: Path, flags: Sequence[str] = ()) -> str:
    """The first command that has the most of a config file's settings, and of the flags' beside it.

    Raises:
        UserError: it cannot be read.
    """
    given = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}
    return max(SCHEMAS, key=lambda it: _num_known(file, SCHEMAS[it]) + len(given & leaf_fields(SCHEMAS[it]).keys()))


def _num_known(file: Path, schema: type[BaseModel]) -> int:
    known = leaf_fields(schema)
    names = [f"{name}.{key}" if key else str(name) for name, value in read_yaml(file).items()
             for key in (value if isinstance(value, dict) else [""])]  # fmt: skip
    return sum(name in known or any(field.startswith(f"{name}.") for field in known) for name in names)
