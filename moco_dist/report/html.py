"""A page of one of this folder's templates."""

from pathlib import Path


def rendered(template: str, **values: object) -> str:
    """The page. jinja2 is imported here, so that a training does not wait for it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
