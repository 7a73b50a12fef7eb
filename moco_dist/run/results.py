"""What evaluations, and other commands, left on disk, read again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from moco_dist.config.address import Url
from moco_dist.errors import UserError
from moco_dist.files import parsed_json
from moco_dist.run.folder import RunFolder
from moco_dist.run.manifest import first_problem

T = TypeVar("T")


class Result(TypedDict):
    """What the file of an evaluation has at least."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    step: int
    num_train: int
    num_val: int
    accuracy: dict[str, float]
    curve: NotRequired[list[dict[str, float]]]


class _Neighbours(TypedDict):
    """A row of the file that `knn` writes."""

    query: str
    query_label: str
    neighbours: list[str]
    neighbour_labels: list[str]


@dataclass(frozen=True)
class NeighbourRow:
    """A test image and the training images nearest to it in the features, nearest first.

    Attributes:
        query: file of the test image; where it lies in a larger one, a name in the same form.
        query_label: its class.
        neighbours: likewise of the training images.
        neighbour_labels: their classes.
    """

    query: Path | Url
    query_label: str
    neighbours: tuple[Path | Url, ...]
    neighbour_labels: tuple[str, ...]


def read_json(path: Path, kind: type[T], remedy: str) -> T:
    """A file of JSON that this program has written.

    Args:
        path: the file.
        kind: dict, or a TypedDict or a list of them that says more.
        remedy: what a person can do where it is damaged.

    Raises:
        UserError: it is damaged.
    """
    try:
        return TypeAdapter(kind).validate_python(parsed_json(path.read_bytes()))
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {first_problem(error)}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; {remedy}") from error


def nearest_examples(run_dir: Path, before: Path | Url, now: Path | Url) -> list[NeighbourRow]:
    """Validation images with their nearest training images, as the last `run_knn` of the run found them; or none.

    Args:
        run_dir: folder of the run.
        before: where its images were.
        now: where they are.
    """
    path = RunFolder(run_dir).neighbours
    remedy = "remove it, and run moco-dist knn again"
    rows = read_json(path, list[_Neighbours], remedy) if path.is_file() else []

    def found(file: str) -> Path | Url:
        if isinstance(before, Url) or isinstance(now, Url):
            return Url(file) if "://" in file else Path(file)
        return now / Path(file).relative_to(before) if Path(file).is_relative_to(before) else Path(file)

    return [
        NeighbourRow(
            found(row["query"]), row["query_label"], tuple(found(file) for file in row["neighbours"]),
            tuple(row["neighbour_labels"]),
        )
        for row in rows
    ]  # fmt: skip


def read_results(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What evaluations of a run came to, by their files' names: `knn_trained`, `linear_untrained`, `detection`.

    Raises:
        UserError: it is not the folder of a run, or a file is damaged.
    """
    run = RunFolder(run_dir)
    run.require()
    files = [path for path in run.results() if path != run.neighbours]
    return {path.stem: read_json(path, dict, "remove it, and evaluate again") for path in files}
