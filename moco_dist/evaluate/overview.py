"""Features to look at: the neighbours of a few images, and what a map of them is made of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_EXAMPLES, EXAMPLE_NEIGHBOURS = 8, 5
MAP_IMAGES = 2_000  # more points hide one another
MAP_COMPONENTS = 50  # that UMAP is given: it takes a fraction of the time that all dimensions take


@dataclass(frozen=True)
class Overview:
    """What is shown of a set of N features.

    Attributes:
        neighbours: numbers of a few images, spread evenly, to those of the nearest by cosine, nearest first.
        mapped: M numbers of images for a map, spread evenly too.
        components: float32 (M, c), their principal components, the largest first.
    """

    neighbours: dict[int, list[int]]
    mapped: list[int]
    components: Tensor


def evenly(total: int, count: int) -> Tensor:
    """int64: `count` numbers below `total`, or all, spread evenly."""
    count = min(count, total)
    return torch.arange(count) * total // max(count, 1)


def overview(chunks: Callable[[], Iterable[Tensor]], total: int) -> Overview:
    """The overview of N features in two passes over them, of which one chunk at a time is in memory.

    Args:
        chunks: begins a pass; float32 (n, D) at a time, in order.
        total: N.
    """
    queries, mapped = evenly(total, NUM_EXAMPLES), evenly(total, MAP_IMAGES)
    wanted, start, found = torch.cat([queries, mapped]), 0, []
    for chunk in chunks():
        found.append(chunk[wanted[(wanted >= start) & (wanted < start + len(chunk))].unique() - start])
        start += len(chunk)
    known = F.normalize(torch.cat(found), dim=1)
    row_of = torch.searchsorted(wanted.unique(), wanted)
    asked, k, start = known[row_of[: len(queries)]], min(EXAMPLE_NEIGHBOURS, total - 1), 0
    similarity, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for chunk in chunks():
        numbers = torch.arange(start, start + len(chunk))
        cosine = (asked @ F.normalize(chunk, dim=1).T).masked_fill(numbers == queries[:, None], -torch.inf)
        similarity = torch.cat([similarity, cosine], dim=1)
        rows = torch.cat([rows, numbers.expand(len(queries), -1)], dim=1)
        similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
        rows = rows.gather(1, best)
        start += len(chunk)
    neighbours = dict(zip(queries.tolist(), rows.tolist(), strict=True))
    return Overview(neighbours, mapped.tolist(), principal_components(known[row_of[len(queries) :]]))


def principal_components(features: Tensor) -> Tensor:
    """float32 (N, c): the features, of unit norm, along the directions in which they vary most, c <= MAP_COMPONENTS.

    Of the two senses of a direction, the one is taken in which the largest weight is positive.
    """
    values = F.normalize(features, dim=1).double()
    values = values - values.mean(0)
    directions = torch.linalg.eigh(values.T @ values)[1].flip(1)[:, :MAP_COMPONENTS]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (values @ (directions * largest.sign())).float()
