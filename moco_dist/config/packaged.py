"""The configs that come with the program: in a wheel they lie in the package, in a checkout beside it."""

from pathlib import Path

from moco_dist.errors import UserError, nearest

_PACKAGE = Path(__file__).parent.parent
# setup.py puts the repository's configs/ there.
FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """All of them, as they are given to a command."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def located(path: Path) -> Path:
    """`path`; or, where it is a plain name and no file, the packaged config of that name, `.yaml` or not."""
    if path.parent != Path() or (path.exists() and not path.is_dir()):
        return path
    packaged = FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    return packaged if packaged.is_file() else path


def text(name: str) -> str:
    """The packaged config of that name, whole.

    Raises:
        UserError: there is none.
    """
    if name.removesuffix(".yaml") not in names():
        raise UserError(f"no config {name} comes with moco_dist; moco-dist configs lists them{nearest(name, names())}")
    return (FOLDER / f"{name.removesuffix('.yaml')}.yaml").read_text(encoding="utf-8")


def header(name: str) -> list[str]:
    """The comment that a packaged config begins with: what it is, its command, hardware, hours, expected result."""
    lines = []
    for line in text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines
