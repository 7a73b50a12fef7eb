"""From a YAML file and `--section.key value` flags to one config, with every mistake reported at once.

argparse shows the help and splits the flags; pydantic checks the values. Flags go over the file, the file over
the defaults.
"""

import argparse
import json
import reprlib
import shutil
import textwrap
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from moco_dist.config import packaged
from moco_dist.config.section import COMPUTED, Declaration, declared
from moco_dist.errors import UserError, file_error, nearest

Config = TypeVar("Config", bound=BaseModel)
# What PyYAML raises; all but YAMLError come from a value that is not of its tag (!!int one), or has too many digits.
NOT_YAML = (yaml.YAMLError, ValueError, KeyError, AttributeError)
MOST_NESTED = 20  # a config has sections, settings, lists
MOST_MISTAKES, MOST_CHARACTERS = 50, 500  # lines and letters of a message, so that a person sees its end


def read_config(schema: type[Config], path: Path | None, flags: list[str], overlays: Sequence[Path] = ()) -> Config:
    """The config of `schema` from the YAML file `path` (if any), with `overlays` over it and `flags` over all.

    A setting of an overlay takes the place of the same setting; those that it does not have stay as they are.

    Raises:
        UserError: one line per mistake (unknown key or flag, wrong type, out of range, sizes that do not fit).
    """
    values = read_yaml(path) if path else {}
    for overlay in overlays:
        values = _over(values, read_yaml(overlay))
    fields = leaf_fields(schema)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in fields:
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, default=argparse.SUPPRESS)
    problems, stray = [], []
    try:
        given, unknown = parser.parse_known_args([_normalise(flag) for flag in flags])
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    for before, word in zip([None, *unknown], unknown, strict=False):
        if word.startswith("--"):
            name = word.removeprefix("--").split("=")[0].replace("-", "_")
            problems.append(f"unknown flag {word}{_as_flag(nearest(name, fields))}")
        elif before is None or not before.startswith("--"):  # the value of an unknown flag is told with the flag
            stray.append(word)
    if stray:
        how = "config files come first" if stray[0].endswith((".yaml", ".yml")) else (
            "settings are given as --section.key VALUE, lists as '[1, 2]'")  # fmt: skip
        problems.append(f"unexpected argument {' '.join(map(repr, stray))}; {how}")
    for name, text in vars(given).items():
        _set(values, name, _value_of(text, fields[name].annotation))
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        # A misspelt flag, which is told already, may have been meant to give what is missing.
        meant = {line.rpartition("did you mean --")[2].rstrip("?").replace("-", "_") for line in problems}
        told = [line for line in mistakes(error, schema) if line.removesuffix(" is required") not in meant]
        raise UserError(_shortened(problems + told)) from error
    if problems:
        raise UserError(_shortened(problems))
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or in the packaged config of that name where there is no such file.

    Raises:
        UserError: the file is missing, unreadable, not a mapping, or has a key twice; a missing one names its nearest
            neighbour.
    """
    try:
        with packaged.located(path).open(encoding="utf-8") as file:
            values = _Loader(file).get_single_data()
    except FileNotFoundError as error:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        others = "; moco-dist configs lists those that come with moco_dist"
        near = nearest(path.name, siblings) or others + nearest(path.stem, packaged.names())
        raise UserError(f"config file {path} does not exist{near}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder where a config file is expected; a run's is given by a flag") from error
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise file_error(f"config file {path} cannot be read: {why}", error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} cannot be read: {error}") from error
    except NOT_YAML as error:
        raise UserError(_shortened([f"config file {path} is not YAML: {' '.join(str(error).split())}"])) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config file {path} holds a {type(values).__name__}; a mapping of settings is expected")
    return values


class _Loader(yaml.SafeLoader):
    """A SafeLoader for settings.

    A key that is there twice is a mistake: YAML says so, and PyYAML takes the last. Dates and base 60 are not known, so
    2024-11-25 and 12:30 are text. A value that is nested deeply, or in itself, is a mistake.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._open: list[str | None] = []  # the anchors of the nodes that are being read

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        is_base_60 = kind is yaml.ScalarNode and tag.endswith((":int", ":float")) and ":" in value
        return "tag:yaml.org,2002:str" if is_base_60 or tag.endswith(":timestamp") else tag

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent) and anchor in self._open:
            raise yaml.MarkedYAMLError(problem=f"*{anchor} is inside of &{anchor}", problem_mark=event.start_mark)
        if len(self._open) > MOST_NESTED:
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {MOST_NESTED} deep",
                                       problem_mark=event.start_mark)  # fmt: skip
        self._open.append(None if isinstance(event, yaml.AliasEvent) else anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Take in what `<<` names, each key once: PyYAML keeps all, and nine lines of `<<` would be millions."""
        super().flatten_mapping(node)
        last = {key.value if isinstance(key, yaml.ScalarNode) else id(key): (key, value) for key, value in node.value}
        node.value = list(last.values())


def _over(values: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """`overlay` over `values`, section by section."""
    merged = dict(values)
    for name, value in overlay.items():
        both_sections = isinstance(value, dict) and isinstance(values.get(name), dict)
        merged[name] = _over(values[name], value) if both_sections else value
    return merged


def to_yaml(config: BaseModel) -> str:
    """The config as YAML that `read_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(config: BaseModel) -> dict[str, Any]:
    """`{"optim.base_lr": 0.03, ...}`: every setting by its dotted name, as plain JSON values."""
    flat: dict[str, Any] = {}
    values = config.model_dump(mode="json")
    for name in leaf_fields(type(config)):
        value: Any = values
        for part in name.split("."):
            value = value[part]
        flat[name] = value
    return flat


def leaf_fields(schema: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting of `schema` by its dotted name, in order."""
    fields: dict[str, FieldInfo] = {}
    for name, field in schema.model_fields.items():
        if section := _section_of(field):
            fields |= leaf_fields(section, f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


def declarations(schema: type[BaseModel]) -> dict[str, Declaration]:
    """How every setting of `schema` was declared, by its dotted name."""
    return {name: declared(field) for name, field in leaf_fields(schema).items()}


def what_is_computed(config: BaseModel, without: Container[str] = ()) -> dict[str, Any]:
    """The settings that change what is computed, in their sections, as plain JSON values, without those of `without`.

    Two configs for which they are equal compute the same.
    """
    flat, computed = flatten(config), {}
    for name, setting in declarations(type(config)).items():
        if setting["changes"] in COMPUTED and name not in without:
            _set(computed, name, flat[name])
    return computed


def help_text(schema: type[BaseModel], prefix: str = "") -> str:
    """One paragraph per setting: flag, type or choices, what it is, unit, default, source; a heading per section.

    A section's own settings come before the sections in it, and what is required before all.
    """
    width = min(104, shutil.get_terminal_size().columns)
    own = {name: field for name, field in schema.model_fields.items() if _section_of(field) is None}
    lines = []
    for name, field in sorted(own.items(), key=lambda item: not item[1].is_required()):
        extra = declared(field)
        facts = [f"unit: {extra['unit']}"] if extra["unit"] else []
        facts.append("required" if field.is_required() else f"default: {default_text(field.default)}")
        facts += [f"source: {extra['source']}"] if extra["source"] else []
        lines.append(f"  --{(prefix + name).replace('_', '-')} {type_name(field.annotation)}")
        text = f"{field.description or ''} [{'; '.join(facts)}]"
        lines += textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    for name, field in schema.model_fields.items():
        if section := _section_of(field):
            what = " ".join((section.__doc__ or "").split())
            lines += ["", *textwrap.wrap(f"{prefix}{name}: {what}", width), help_text(section, f"{prefix}{name}.")]
    return "\n".join(lines)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section; None of one that is a setting."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _normalise(flag: str) -> str:
    """`--optim.base_lr=1` as `--optim.base-lr=1`: both spellings work."""
    name, equals, value = flag.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else flag


def _value_of(word: str, annotation: Any) -> Any:
    """A flag's word for a setting of this type: text and paths as they are; the rest as YAML reads it.

    A list may be given as `[a, b]`, or as its only item.
    """
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        is_list = word.startswith("[")
        value = _yaml_of(word, yaml.BaseLoader if _is_text(item) else _Loader) if is_list else _value_of(word, item)
        return value if isinstance(value, list | dict) else [value]
    if _is_text(annotation):
        return None if word == "null" and type(None) in get_args(annotation) else word
    return _yaml_of(word, _Loader)


def _yaml_of(word: str, loader: type[yaml.BaseLoader] | type[yaml.SafeLoader]) -> Any:
    try:
        return loader(word).get_single_data()
    except NOT_YAML:
        return word


def _is_text(annotation: Any) -> bool:
    """Whether a setting of this type is text, a path, or one of several words; it may be null too."""
    if get_origin(annotation) is Literal:
        return all(isinstance(word, str) for word in get_args(annotation))
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return issubclass(annotation, str | Path)
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return bool(kinds) and get_origin(annotation) is not tuple and all(map(_is_text, kinds))


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        inner = values.get(section)
        values = values.setdefault(section, {}) if not isinstance(inner, dict) else inner
        if not isinstance(values, dict):
            return  # the file gave a plain value where a section is expected: pydantic says so
    values[key] = value


_SHORT = reprlib.Repr()  # without walking through what a few lines of aliases stand for
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 20
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, MOST_CHARACTERS, MOST_CHARACTERS


def _as_flag(hint: str) -> str:
    return hint.replace("did you mean ", "did you mean --").replace("_", "-")


def mistakes(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """One line per pydantic error, in the user's words."""
    known = leaf_fields(schema)
    messages = []
    everything = error.errors()
    for item in everything:
        loc = item["loc"]
        if item["type"] == "too_short" and any(o["loc"][: len(loc)] == loc for o in everything if o is not item):
            continue  # pydantic counts only the values that are right; the wrong ones are told
        name = ".".join(str(part) for part in item["loc"])
        kind, given = item["type"], "null" if item["input"] is None else _SHORT.repr(item["input"])
        if kind == "extra_forbidden" and name in known:
            section, _, key = name.rpartition(".")
            messages.append(f"{name}: a file has it in its section: {section}: {{{key}: {given}}}")
        elif kind == "extra_forbidden":
            messages.append(f"unknown setting {name}{nearest(name, {*known, *(k.split('.')[0] for k in known)})}")
        elif kind == "missing" and (whole := ".".join(map(str, loc[:-1]))) in known:  # a list that is too short
            messages.append(f"{whole}: {type_name(known[whole].annotation)} is expected")
        elif kind == "missing":
            messages += [f"{field} is required" for field in _required_below(name, known)]
        elif kind in ("model_type", "model_attributes_type"):
            messages.append(f"{name}: {given} is given where a section of settings is expected")
        elif kind == "invalid_key":
            messages.append(f"{name} is not the name of a setting")
        elif kind == "value_error":
            lines = str(item.get("ctx", {})["error"]).splitlines() if "ctx" in item else [item["msg"]]
            messages += [f"{name}: {line}" if name else line for line in lines]
        elif kind == "literal_error":
            expected = item.get("ctx", {})["expected"]
            hint = nearest(str(item["input"]), expected.split("'")[1::2])
            messages.append(f"{name}: {given} is not one of {expected}{hint}")
        elif kind in ("path_type", "string_type") and isinstance(item["input"], int | float):
            messages.append(f"{name}: {given} is a number where text is expected; in quotes it is text")
        else:
            messages.append(f"{name}: {given} {item['msg'].replace('Input should be', 'is not')}")
    return list(dict.fromkeys(messages))


def _shortened(lines: list[str]) -> str:
    """At most so many lines of at most so many characters each."""
    cut = [line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]} ..." for line in lines[:MOST_MISTAKES]]
    return "\n".join([*cut, f"and {len(lines) - MOST_MISTAKES} more"] if len(lines) > MOST_MISTAKES else cut)


def _required_below(name: str, known: dict[str, FieldInfo]) -> list[str]:
    below = [field for field, info in known.items() if field.startswith(f"{name}.") and info.is_required()]
    return below or [name]


def default_text(value: Any) -> str:
    """A setting's default as `--help` and the reference show it."""
    if isinstance(value, Path):
        return str(value)
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def type_name(annotation: Any) -> str:
    """A setting's type or choices as `--help` and the reference show them."""
    if annotation in (int, float, str, bool):
        return {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false"}[annotation]
    if annotation is Path:
        return "PATH"
    args = [a for a in get_args(annotation) if a is not type(None)]
    if args and all(isinstance(a, str) for a in args):
        return "|".join(args)
    if getattr(annotation, "__origin__", None) is tuple:
        inner = type_name(args[0])
        return f"[{inner}, ...]" if Ellipsis in args else f"[{', '.join(type_name(a) for a in args)}]"
    return type_name(args[0]) if args else "VALUE"
