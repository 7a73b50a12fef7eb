"""Images that lie at places in remote files, fetched before they are needed.

The plan names a batch's images before they are decoded. Their ranges are fetched together, neighbours as one, by a
bounded number of requests at once. A request that fails there is made again when its image is needed, with growing
pauses that are told. An image that the store does not give ends the run: it is never skipped.
"""

import errno
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moco_dist.config.address import Url
from moco_dist.data.decode import CropsFor, cut
from moco_dist.data.images import ImageError, ImageFolder
from moco_dist.data.remote.cache import BlockCache
from moco_dist.data.remote.store import CHANGED, READ_WAITS_SECONDS, Object, read_range
from moco_dist.data.storage import patiently
from moco_dist.errors import InfrastructureError, UserError

IN_FLIGHT = 16  # requests of a process at once
MOST_GAP_BYTES = 2**15  # between two images, up to which they are fetched as one: it costs less than a request
MOST_JOINED_BYTES = 2**22
BATCHES_AHEAD = 3  # announced batches that are kept: one may have been announced in vain


class Range(NamedTuple):
    """What one request fetches: `samples` lie in file number `file` between `start` and `end`."""

    file: int
    start: int
    end: int
    samples: list[int]


class RemoteImages:
    """The images of `folder`, whose places are in remote files, as a source of the reference loader's workers.

    What `cache` holds of them is not asked for again.
    """

    def __init__(self, folder: ImageFolder, cache: BlockCache | None = None) -> None:
        assert folder.places is not None
        self.folder, self.places, self.root = folder, folder.places, folder.root
        self._cache = cache
        self._lock = threading.Lock()
        self._forget()

    def __len__(self) -> int:
        return len(self.folder.paths)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])

    def announce(self, samples: NDArray[np.int64]) -> None:
        """Fetch these images ahead, but for those that are on their way."""
        if self._process != os.getpid():
            self._forget()
        with self._lock:
            wanted = [i for i in samples.tolist() if i not in self._coming and self.places.size[i] > 0]
            wanted = [i for i in wanted if not self._problem(i)]
            for part in joined_ranges(wanted, self.places.file, self.places.offset, self.places.size):
                future = self._pool.submit(self._fetch, part)
                for sample in part.samples:
                    self._coming[sample] = future, part.start
            self._batches.append(wanted)
            if len(self._batches) > BATCHES_AHEAD:
                for sample in self._batches.popleft():  # what was not needed after all
                    self._coming.pop(sample, None)

    def cut(self, sample: int, size: int, crops_for: CropsFor) -> list[Tensor]:
        """The views of one of them, as `decode.cut`."""
        data, name = self.content(sample)
        return cut(memoryview(data), name, size, crops_for)

    def content(self, sample: int) -> tuple[bytearray, str]:
        """The bytes of one of them, and what it is called in errors.

        Raises:
            ImageError: the file has no such place.
            InfrastructureError: the store does not give it.
            UserError: the file has changed.
        """
        places, number = self.places, int(self.places.file[sample])
        name = f"{self.folder.paths[sample]} in {places.files[number]}"
        if problem := self._problem(sample):
            raise ImageError(f"cannot read image {name}: {problem}")
        start, size = int(places.offset[sample]), int(places.size[sample])
        if not size:
            return bytearray(), name
        with self._lock:
            coming = self._coming.pop(sample, None) if self._process == os.getpid() else None
        if coming is not None:
            future, first = coming
            if future.exception() is None:
                return bytearray(future.result()[start - first : start - first + size]), name
        part = Range(number, start, start + size, [sample])
        try:
            return bytearray(patiently(lambda: self._fetch(part), name, READ_WAITS_SECONDS)), name
        except OSError as error:
            if error.errno == errno.EINVAL and error.strerror == CHANGED:
                raise UserError(f"cannot read image {name}: {CHANGED}") from error
            raise InfrastructureError(f"cannot read image {name}: {error.strerror}") from error

    def _fetch(self, part: Range) -> memoryview:
        places, url = self.places, self.places.files[part.file]
        assert isinstance(url, Url)
        size, changed_ns = places.facts[part.file]
        known = Object(size, places.tags[part.file], changed_ns)

        def fetch(start: int, end: int) -> memoryview:
            return read_range(url, start, end - start, known)

        if self._cache is None:
            return fetch(part.start, part.end)
        return self._cache.read(part.file, part.start, part.end, fetch)

    def _problem(self, sample: int) -> str:
        start, size = int(self.places.offset[sample]), int(self.places.size[sample])
        inside = start >= 0 and 0 <= size <= self.places.facts[int(self.places.file[sample])][0] - start
        return "" if inside else "the file has no such place"

    def _forget(self) -> None:
        """Begin anew: what is on its way, and the threads that wait for it, stay in the process that was forked."""
        self._process = os.getpid()
        self._coming: dict[int, tuple[Future[memoryview], int]] = {}
        self._batches: deque[list[int]] = deque()
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="fetch")


def joined_ranges(
    samples: list[int], file: NDArray[np.int32], offset: NDArray[np.int64], size: NDArray[np.int64]
) -> list[Range]:
    """The requests that fetch `samples`, in the order in which the first image of each is needed.

    Images of a file between which little lies are fetched as one, up to MOST_JOINED_BYTES.
    """
    parts: list[Range] = []
    for sample in sorted(samples, key=lambda i: (file[i], offset[i])):
        start, end, number = int(offset[sample]), int(offset[sample] + size[sample]), int(file[sample])
        last = parts[-1] if parts else None
        if (
            last is not None
            and last.file == number
            and start - last.end <= MOST_GAP_BYTES
            and end - last.start <= MOST_JOINED_BYTES
        ):
            parts[-1] = last._replace(end=max(last.end, end), samples=[*last.samples, sample])
        else:
            parts.append(Range(number, start, end, [sample]))
    position = {sample: i for i, sample in enumerate(samples)}
    return sorted(parts, key=lambda part: min(position[sample] for sample in part.samples))
