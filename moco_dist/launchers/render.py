"""Templates to text. Every value of a user goes through `sh` or `yaml`, which quote it."""

import json
import shlex
from typing import Any

import jinja2

from moco_dist.errors import UserError


def render(template: str, **values: Any) -> str:
    """The text of moco_dist/launchers/templates/TEMPLATE with `values`; `| sh` quotes for bash, `| yaml` for YAML.

    Raises:
        UserError: a value has a line break or another control character, which #SBATCH lines cannot hold.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moco_dist.launchers"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        autoescape=False,  # shells and YAML, not HTML
    )  # fmt: skip
    environment.filters["sh"] = lambda value: shlex.quote(_one_line(str(value)))
    environment.filters["yaml"] = json.dumps  # JSON is YAML
    return environment.get_template(template).render(values)


def _one_line(text: str) -> str:
    if any(ord(letter) < 32 for letter in text):
        raise UserError(f"{text!r} has a line break or another control character")
    return text
