"""NVIDIA DALI reads, decodes and crops, on CPU threads or on the GPU.

The pipeline is driven by indices: for every image it gets a path, the region to decode and the crops of it. The file
is read inside DALI. The host reads only an image's first bytes, once, for its size, on which the boxes depend. What is
no plain and whole JPEG, the host decodes itself as the reference loader does, so that odd files look alike everywhere.

Checked against DALI 2.4. A decoder's error ends a pipeline: it is built anew, and the host decodes that batch, which
finds the file and the reason.
"""

import contextlib
import importlib
import os
import sys
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moco_dist.config.evaluate import EvalDataConfig
from moco_dist.config.loading import worker_count
from moco_dist.config.pretrain import DataConfig
from moco_dist.data.ahead import ahead
from moco_dist.data.decode import is_oblong
from moco_dist.data.images import ImageFolder
from moco_dist.data.storage import open_file
from moco_dist.data.tasks import Crop, DecodeTask, TaskOf, with_successors
from moco_dist.data.workers import Files
from moco_dist.distributed.world import World
from moco_dist.errors import InfrastructureError, UserError

T = TypeVar("T")

HEADER_BYTES = 2**16  # where a JPEG says its size, unless large metadata comes first
MARGIN = 16  # pixels around what is decoded: chroma at its edge differs, and must not be in a view
MAX_FAILURES = 3  # batches in a row that DALI may fail at although the host can decode them
END_OF_IMAGE = b"\xff\xd9"
_UNKNOWN, _ODD = 0, -1
_NOTHING = Crop((0, 0, 1, 1))  # fills the second place of an image that gives one view


class Entry(NamedTuple):
    """An image of (width, height) for the pipeline, the crops of it, and the rows of the batch that they fill."""

    path: str
    size: tuple[int, int]
    crops: list[Crop]
    rows: tuple[int, ...]


class Prepared(NamedTuple, Generic[T]):
    """A task, split into what DALI does, what the host has done, and notes on replaced files."""

    task: DecodeTask[T]
    entries: list[Entry]
    done: list[tuple[int, Tensor]]
    replaced: tuple[str, ...]


def batches_from_dali(
    folder: ImageFolder,
    task_of: TaskOf[T],
    numbers: range,
    size: int,
    data: DataConfig | EvalDataConfig,
    world: World,
    must_end: Callable[[], bool],
) -> Generator[T, None, None]:
    """The batches of `numbers`; views are on the GPU where it decodes, else in pinned memory where there is one.

    Raises:
        UserError: DALI is not installed, or there is no GPU to decode on.
    """
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise UserError(
            "data.loader dali needs NVIDIA DALI: pip install 'moco_dist[dali]' for CUDA 13 or no GPU, "
            "pip install nvidia-dali-cuda120 for CUDA 12"
        ) from error
    if data.dali.decode_on == "gpu" and world.device == "cpu":
        raise UserError("data.dali.decode_on gpu needs a GPU, and this rank runs on the CPU; cpu works everywhere")
    if not numbers:
        return
    batches = _Batches(folder, task_of, numbers[0], size, data, world)
    with contextlib.closing(ahead(batches.run(numbers), 1, must_end)) as made:
        for finish, views, replaced in made:
            if views.is_cuda:
                views.record_stream(torch.cuda.current_stream())  # it was made on the thread's stream
            yield finish(views, replaced)


class _Batches(Generic[T]):
    """Prepares tasks, keeps some of them in DALI's queue, and puts their batches together."""

    def __init__(
        self,
        folder: ImageFolder,
        task_of: TaskOf[T],
        first: int,
        size: int,
        data: DataConfig | EvalDataConfig,
        world: World,
    ) -> None:
        self.first = first
        self.files, self.task_of, self.size, self.data, self.world = Files(folder), task_of, size, data, world
        self.on_gpu = data.dali.decode_on == "gpu"
        self.sizes = np.zeros((len(folder.paths), 2), dtype=np.int32)  # (width, height), as far as they are known
        self.num_threads = max(1, worker_count(data.num_workers, world.local_world_size))
        self.pool = ThreadPoolExecutor(self.num_threads)
        self.stream = torch.cuda.Stream(world.device) if self.on_gpu else None
        self.views_per_image = 1

    def run(self, numbers: range) -> Generator[tuple[Any, Tensor, tuple[str, ...]], None, None]:
        """What is left to do for each batch: finish(views, replaced)."""
        tasks = map(self.task_of, numbers)
        redo: deque[Prepared[T]] = deque()
        waiting: deque[Prepared[T]] = deque()  # given to DALI, or with nothing for it to do, in order

        def next_arguments() -> list[Any]:
            """The pipeline's inputs for its next batch; called ahead of time. StopIteration ends it."""
            while True:
                prepared = redo.popleft() if redo else self._prepare(next(tasks))
                waiting.append(prepared)
                if prepared.entries:
                    return _arguments(prepared.entries, self.size, self.views_per_image)

        pipe, failures = None, 0
        # A pipeline ends here, not when its garbage is collected: that may be in a forked process, which has none of
        # the threads that a pipeline waits for.
        with self.pool, contextlib.ExitStack() as pipelines:
            while True:
                if pipe is None:
                    pipe = self._pipeline(next_arguments)
                    pipelines.callback(pipe._shutdown)
                try:
                    outputs = pipe.run()
                    failures = 0
                except StopIteration:
                    break
                except RuntimeError as error:
                    pipelines.close()
                    pipe, failures = None, failures + 1
                    if failures == MAX_FAILURES:
                        kind = InfrastructureError if "CUDA" in str(error) else UserError
                        raise kind(f"DALI cannot decode these files: {' '.join(str(error).split())}") from error
                    text = f"DALI failed at a batch, which the host decodes ({str(error).strip().splitlines()[-2:][0]})"
                    print(f"[rank {self.world.rank}] warning: {text}", file=sys.stderr, flush=True)
                    given = next(i for i, prepared in enumerate(waiting) if prepared.entries)
                    waiting[given] = self._prepare(waiting[given].task, on_host=True)
                    redo.extend(waiting)
                    waiting.clear()
                    continue
                while not waiting[0].entries:
                    yield self._finish(waiting.popleft(), [])
                yield self._finish(waiting.popleft(), list(outputs))
            while waiting:
                yield self._finish(waiting.popleft(), [])

    def _prepare(self, task: DecodeTask[T], on_host: bool = False) -> Prepared[T]:
        """Sizes, crops, and the views of images that DALI is not given (`on_host`: of all)."""
        images = range(len(task.samples))
        notes: list[list[str]] = [[] for _ in images]

        def one(i: int) -> tuple[list[Entry], list[tuple[int, Tensor]]]:
            def attempt(sample: int) -> tuple[list[Entry], list[tuple[int, Tensor]]]:
                path = self.files.folder.disk_root / self.files.folder.paths[sample]
                width, height = (_ODD, _ODD) if on_host else self._size_of(sample)
                crops = [] if width == _ODD else task.crops(i, width, height)
                if not crops or any(map(is_oblong, crops)):
                    views = self.files.cut(sample, self.size, lambda w, h: task.crops(i, w, h))
                    return [], list(zip(task.rows[i], views, strict=True))
                size, rows = (width, height), task.rows[i]
                if self.views_per_image == 2:
                    return [Entry(str(path), size, crops, rows)], []
                return [Entry(str(path), size, [crop], (row,)) for crop, row in zip(crops, rows, strict=True)], []

            return with_successors(
                int(task.samples[i]), len(self.files), self.files.root, self.data.on_error, attempt, notes[i]
            )

        parts = list(self.pool.map(one, images))
        return Prepared(
            task,
            [entry for entries, _ in parts for entry in entries],
            [view for _, views in parts for view in views],
            tuple(note for image in notes for note in image),
        )

    def _size_of(self, sample: int) -> tuple[int, int]:
        """(width, height), or _ODD twice for what is no plain and whole JPEG, or cannot be read just now."""
        if self.sizes[sample, 0] == _UNKNOWN:
            try:
                head, tail = _ends(self.files.folder.disk_root / self.files.folder.paths[sample])
            except OSError:
                return _ODD, _ODD  # the host's way waits for storage, and says what is wrong
            self.sizes[sample] = _ODD
            with contextlib.suppress(ValueError):
                height, width, colours, _ = simplejpeg.decode_jpeg_header(head)
                is_plain = colours in ("YCbCr", "Gray") and tail == END_OF_IMAGE
                if is_plain and int(width) * int(height) <= (Image.MAX_IMAGE_PIXELS or np.inf):
                    self.sizes[sample] = int(width), int(height)
        return int(self.sizes[sample, 0]), int(self.sizes[sample, 1])

    def _pipeline(self, next_arguments: Callable[[], list[Any]]) -> Any:
        task = self.task_of(self.first)
        # Decode once where most images give two views.
        self.views_per_image = 2 if task.num_rows > 1.5 * len(task.samples) else 1
        return _pipeline(
            next_arguments, self.size, self.views_per_image, task.most_rows or task.num_rows, self.num_threads,
            self.data, torch.device(self.world.device).index if self.on_gpu else None,
        )  # fmt: skip

    def _finish(self, prepared: Prepared[T], outputs: list[Any]) -> tuple[Any, Tensor, tuple[str, ...]]:
        if self.stream is None:
            return prepared.task.finish, self._views(prepared, outputs), prepared.replaced
        with torch.cuda.stream(self.stream):
            views = self._views(prepared, outputs)
        self.stream.synchronize()  # DALI takes its memory back
        return prepared.task.finish, views, prepared.replaced

    def _views(self, prepared: Prepared[T], outputs: list[Any]) -> Tensor:
        """uint8 (R, 3, S, S), channels-last."""
        device = self.world.device if self.on_gpu else "cpu"
        pinned = not self.on_gpu and self.world.device != "cpu"
        views = torch.empty(
            prepared.task.num_rows, self.size, self.size, 3, dtype=torch.uint8, device=device, pin_memory=pinned
        )
        for place, output in enumerate(outputs):
            taken = [(i, entry.rows[place]) for i, entry in enumerate(prepared.entries) if place < len(entry.rows)]
            index, rows = (torch.tensor(part, device=device) for part in zip(*taken, strict=True))
            views[rows] = torch.from_dlpack(output.as_tensor())[index]
        for row, view in prepared.done:
            views[row] = view.permute(1, 2, 0).to(device)
        return views.permute(0, 3, 1, 2)


def _ends(path: Path) -> tuple[bytes, bytes]:
    """The first HEADER_BYTES of a file and its last two."""
    with open_file(path) as file:
        head = file.read(HEADER_BYTES)
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2))
        return head, file.read()


# What the pipeline is given of each image: the file, the region to decode, and for each view the crop in the region,
# the corners of it in the order that mirrors it or not, the size to make of it, and where the view starts in that.
_OF_IMAGE = {"path": np.uint8, "start": np.int32, "end": np.int32}
_OF_VIEW = {"low": np.int32, "high": np.int32, "from": np.float32, "to": np.float32, "target": np.float32,
            "corner": np.int32}  # fmt: skip


def _arguments(entries: list[Entry], size: int, views: int) -> list[Any]:
    """Values for _OF_IMAGE and, for each view, _OF_VIEW: one row an image."""
    crops = [(entry.crops + [_NOTHING] * views)[:views] for entry in entries]
    boxes = np.array([[crop.box for crop in image] for image in crops])
    used = np.array([[crop is not _NOTHING for crop in image] for image in crops])
    start = np.where(used[..., None], boxes[..., :2], np.iinfo(np.int32).max).min(axis=1)
    end = np.where(used[..., None], boxes[..., 2:], 0).max(axis=1)
    start = np.maximum(start - MARGIN, 0)
    end = np.minimum(end + MARGIN, [entry.size for entry in entries])
    values: list[NDArray[Any]] = [start, end]
    for place in range(views):
        offset = np.where(used[:, place, None], start, 0)  # a view that is not used is the region's first pixel
        low, high = boxes[:, place, :2] - offset, boxes[:, place, 2:] - offset
        extent = (high - low)[:, ::-1]
        mirrored = np.array([[False, image[place].flip] for image in crops])
        target = np.array([image[place].resized or (size, size) for image in crops])
        corner = np.round((target - size) / 2)
        values += [low, high, np.where(mirrored, extent, 0), np.where(mirrored, 0, extent), target, corner]
    kinds = [*_OF_IMAGE.values(), *list(_OF_VIEW.values()) * views][1:]
    paths = [np.frombuffer(entry.path.encode("utf-8", "surrogateescape"), np.uint8) for entry in entries]
    return [paths, *(np.ascontiguousarray(v, dtype=kind) for v, kind in zip(values, kinds, strict=True))]


def _pipeline(
    next_arguments: Callable[[], list[Any]],
    size: int,
    views: int,
    capacity: int,
    num_threads: int,
    data: DataConfig | EvalDataConfig,
    device_id: int | None,
) -> Any:
    """A pipeline to (N, S, S, 3) for each of `views`, for at most `capacity` images; on the CPU where no device is."""
    fn, types = importlib.import_module("nvidia.dali.fn"), importlib.import_module("nvidia.dali.types")
    settings = {"device": "cpu"}
    if device_id is not None:
        settings = {
            "device": "mixed",
            "hw_decoder_load": data.dali.hw_decoder_load,
            "device_memory_padding": data.dali.device_padding_bytes,
            "host_memory_padding": data.dali.host_padding_bytes,
            "jpeg_fancy_upsampling": True,  # as libjpeg-turbo does it
        }
    pipe = importlib.import_module("nvidia.dali").Pipeline(
        batch_size=capacity, num_threads=num_threads, device_id=device_id,
        prefetch_queue_depth=data.prefetch_batches, seed=0,
    )  # fmt: skip
    with pipe:
        kinds = [*_OF_IMAGE.values(), *list(_OF_VIEW.values()) * views]
        path, start, end, *of_views = fn.external_source(
            source=next_arguments, num_outputs=len(kinds), batch=True, dtype=[types.to_dali_type(k) for k in kinds],
            ndim=[1] * len(kinds),
        )  # fmt: skip
        images = fn.decoders.image_slice(
            fn.io.file.read(path), start=start, end=end, axis_names="WH", output_type=types.RGB,
            adjust_orientation=False, **settings,
        )  # fmt: skip
        made = []
        for place in range(views):
            low, high, corner_from, corner_to, target, corner = of_views[place * len(_OF_VIEW) :][: len(_OF_VIEW)]
            crop = fn.slice(images, start=low, end=high, axis_names="WH")
            resized = fn.resize(
                crop, size=target, roi_start=corner_from, roi_end=corner_to, interp_type=types.INTERP_LINEAR,
                antialias=True,
            )  # fmt: skip
            made.append(fn.slice(resized, start=corner, shape=[size, size], axis_names="HW"))
        pipe.set_outputs(*made)
    pipe.build()
    return pipe
