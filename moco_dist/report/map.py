"""Maps on which images whose features are alike lie near one another: of a run's test images, and of any images."""

import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moco_dist.data.images import ImageFolder
from moco_dist.errors import UserError
from moco_dist.files import parsed_json, write_whole
from moco_dist.provenance import package_versions
from moco_dist.report.charts import GRAY, Picture, data_uri, png_uri
from moco_dist.report.html import rendered
from moco_dist.run.folder import RunFolder

FEWEST_FOR_UMAP = 20
MOST_COLOURS = 20  # that can be told apart


def map_of_run(run_dir: Path) -> Picture | None:
    """A map of the test images, as the last `moco-dist knn` of the run has found their features; None without one."""
    path = RunFolder(run_dir).map
    try:
        with safetensors.safe_open(path, "pt") as file:
            points, by = in_two_dimensions(file.get_tensor("components"))
            labels, classes = file.get_tensor("labels").numpy(), parsed_json(file.metadata()["classes"])
        if labels.shape != points.shape[:1] or (labels >= len(classes)).any():
            raise ValueError("its labels are not of its images and classes")
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged: {error}; remove it, and run moco-dist knn again") from error
    return scatter(f"the features by {by}", points, labels, classes)


def write_features_page(
    path: Path,
    summary: Sequence[str],
    images: ImageFolder,
    neighbours: dict[int, list[int]],
    mapped: list[int],
    components: Tensor,
    thumbnails_of: Callable[[list[int]], dict[int, NDArray[np.uint8]]],
) -> None:
    """One self-contained page of what the features of any images are like.

    Args:
        path: the file to write.
        summary: lines about the backbone and the images.
        images: all of them.
        neighbours: numbers of some images to those of the nearest to each.
        mapped: M numbers of the images on the map.
        components: (M, c), their principal components.
        thumbnails_of: gives pictures, uint8 (S, S, 3), of images by their numbers.
    """
    labels, classes = images.labels, images.classes
    points, by = in_two_dimensions(components)
    on_top = {row: mapped[row] for row in one_a_cell(points)}
    thumbnails = thumbnails_of(sorted({*on_top.values(), *neighbours, *itertools.chain(*neighbours.values())}))

    def picture(number: int) -> Picture:
        name = images.paths[number]
        return Picture(png_uri(thumbnails[number]), name, name)

    def is_right(query: int, found: int) -> bool | None:
        return bool(labels[query] == labels[found]) if min(labels[query], labels[found]) >= 0 else None

    pictures = {row: thumbnails[number] for row, number in on_top.items()}
    page = rendered(
        "features.html",
        name=path.stem,
        summary=summary,
        reload_seconds=0,
        map=scatter(f"the features by {by}", points, labels[mapped], classes, pictures),
        neighbours=[(picture(q), [(picture(n), is_right(q, n)) for n in found]) for q, found in neighbours.items()],
        has_classes=bool(classes),
        versions=package_versions(),
    )
    write_whole(path, page.encode("utf-8", "replace"))


def in_two_dimensions(components: Tensor) -> tuple[NDArray[np.float32], str]:
    """A map of principal components (N, c): by UMAP (arXiv 1802.03426) if umap-learn is installed, else the first two.

    Returns:
        float32 (N, 2), the same for the same components, and by what it was made.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numba's of the compiler, and UMAP's that a seed takes one thread
            if len(components) >= FEWEST_FOR_UMAP:
                from umap import UMAP  # pyright: ignore[reportMissingImports]

                return np.asarray(UMAP(random_state=0).fit_transform(components.numpy()), np.float32), "UMAP"
    except ImportError:
        pass
    return F.pad(components, (0, 2))[:, :2].numpy(), "principal components"


def scatter(
    title: str,
    points: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    thumbnails: dict[int, NDArray[np.uint8]] | None = None,
) -> Picture:
    """A map: a dot for each image in its class's colour, under pictures of some of them.

    Args:
        title: what it is.
        points: (N, 2).
        labels: (N,) numbers into `classes`; -1 for images of none.
        classes: names; there is a legend for as many as can be told apart.
        thumbnails: rows of `points` to pictures (S, S, 3), drawn where they lie.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex, to_rgba
    from matplotlib.figure import Figure
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    figure = Figure(figsize=(6.4, 4.9), dpi=160, layout="constrained")
    axes = figure.subplots()
    present = np.unique(labels[labels >= 0])
    are_few = len(present) <= MOST_COLOURS
    colour_of = colormaps[("tab20" if len(present) > 10 else "tab10") if are_few else "hsv"]
    shades = colour_of(np.arange(len(present)) if are_few else np.linspace(0, 1, len(present)))
    colours = np.full((len(labels), 4), to_rgba(GRAY))
    colours[labels >= 0] = shades[np.searchsorted(present, labels[labels >= 0])]
    axes.scatter(points[:, 0], points[:, 1], s=14, c=colours, linewidths=0)
    axes.margins(0.06)
    for row, pixels in (thumbnails or {}).items():
        box = AnnotationBbox(OffsetImage(pixels, zoom=26 / len(pixels)), tuple(points[row]), frameon=False, pad=0)
        box.set_in_layout(False)
        axes.add_artist(box)
    axes.set_axis_off()
    figure.savefig(buffer := io.BytesIO(), format="png", transparent=True)
    names = [classes[int(label)] for label in present]
    legend = tuple(zip(map(to_hex, shades), names, strict=True)) if are_few else ()
    return Picture(data_uri(buffer), f"{title}: {len(points)} images", title, legend)


def one_a_cell(points: NDArray[np.float32], cells: int = 10) -> list[int]:
    """Rows of points (N, 2) whose pictures do not cover one another: the first in each cell of a square grid."""
    low, high = points.min(0), points.max(0)
    place = np.minimum((points - low) / np.maximum(high - low, 1e-12) * cells, cells - 1).astype(np.int64)
    return np.unique(place @ [cells, 1], return_index=True)[1].tolist()
