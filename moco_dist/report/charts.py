"""Pictures inside a page: line charts, and images as data URIs, so that a page needs no other file.

matplotlib is imported where it is used, so that a training does not wait for it.
"""

import base64
import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEGEND_CHARACTERS = 64  # in a line of the legend, beside a mark for each label
# Mid-tones that can be read on white and on black.
GRAY = "#808080"
COLOURS = ("#2f86c9", "#d9822b", "#3a9d5d", "#b0498f", "#8a6d3b", "#5a6acf", "#c9463d", "#2a9d9d")


class Picture(NamedTuple):
    """An image inside the page.

    Attributes:
        uri: of its data; None: the file cannot be read.
        alt: what it shows.
        caption: a line beside it.
        legend: CSS colours and what they stand for. On a page that is text, which a phone does not shrink.
    """

    uri: str | None
    alt: str
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()

    def png(self) -> bytes:
        """The PNG file's content."""
        return base64.b64decode((self.uri or "").partition(",")[2])


def chart(
    title: str,
    x_label: str,
    last_x: float,
    series: dict[str, tuple[list[float], list[float]]],
    reference: tuple[float, str] | None,
) -> Picture:
    """One small line chart on a transparent ground, for light and dark pages.

    Args:
        title: what y is.
        x_label: what x is.
        last_x: x goes from 0 to it, the same for all charts of a kind.
        series: label to x and y; at most as many as there are COLOURS.
        reference: a level and its label, drawn as a dashed line; None: y begins at 0.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    labels = [shortened(label) for label in series] + ([reference[1]] if reference else [])
    columns = max(1, min(3, LEGEND_CHARACTERS // (max(map(len, labels)) + 6)))
    legend_lines = -(-len(labels) // columns) if len(labels) > 1 else 0
    figure = Figure(figsize=(4.2, 2.5 + 0.16 * legend_lines), dpi=160, layout="constrained")
    axes = figure.subplots()
    for (label, (x, y)), colour in zip(series.items(), COLOURS, strict=False):
        axes.plot(
            x, y, label=shortened(label), color=colour, linewidth=1.6, marker="o" if len(x) < 12 else "", markersize=3.5
        )
    if reference is not None:
        axes.axhline(reference[0], color=GRAY, linestyle="--", linewidth=1, label=reference[1])
    if legend_lines:  # above the curves, where it covers none
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8, labelcolor=GRAY)
    axes.set_xlabel(x_label, fontsize=8, color=GRAY)
    axes.set_xlim(-0.02 * last_x, 1.02 * last_x)
    if reference is None:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=8, colors=GRAY)
    axes.grid(color=GRAY, alpha=0.25, linewidth=0.6)
    axes.spines[:].set_visible(False)
    figure.savefig(buffer := io.BytesIO(), format="png", transparent=True)
    last = ", ".join(f"{label} {y[-1]:.4g}" for label, (_, y) in series.items())
    return Picture(data_uri(buffer), f"{title}: at the end {last}", title)


def shortened(label: str) -> str:
    """The end of a long name, by which runs of one folder differ."""
    return label if len(label) <= LEGEND_CHARACTERS - 6 else f"…{label[6 - LEGEND_CHARACTERS :]}"


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """uint8 (H, W, 3) as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return data_uri(buffer)


def data_uri(png: io.BytesIO) -> str:
    """A PNG file's content as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode('ascii')}"
