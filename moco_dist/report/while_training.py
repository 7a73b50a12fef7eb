"""What MLflow shows of a run from its first minutes on: settings, data set, views, how far it is, and its report page.

Rank 0's thread makes the pictures: a step does not wait for them, and a picture that cannot be made is told and hurts
nothing.
"""

import json
import shlex
import threading
import time
from collections.abc import Callable

from torch import Tensor

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.images import ImageFolder
from moco_dist.data.pairs import view_pairs
from moco_dist.report.contact_sheet import save_sheet
from moco_dist.report.page import write_report
from moco_dist.run.folder import RunFolder
from moco_dist.tracking import Tracker

FIRST_SECONDS, LONGEST_SECONDS = 30.0, 3600.0  # until the first page; pauses double from then on
PAIRS = 8
MODEL = "backbone_weights"  # not `backbone`, the artifact that the registry is given
END_SECONDS, CLOSE_SECONDS = 20, 5  # the longest waits for a page, at the end of a run and of one that is stopped


class Showing:
    """Tells a run's tracker what is more than numbers; does nothing without a tracked run."""

    def __init__(
        self,
        config: PretrainConfig,
        images: ImageFolder,
        tracker: Tracker,
        steps_per_epoch: int,
        total_steps: int,
        say: Callable[[str], None],
    ) -> None:
        """Begin: settings and data set at once, the picture of views by the thread.

        Args:
            config: of the run; RUN/config.yaml is written.
            images: what is trained on.
            tracker: of the run.
            steps_per_epoch: of the run.
            total_steps: of the whole schedule.
            say: tells what could not be made.
        """
        self._config, self._tracker, self._say = config, tracker, say
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._run = RunFolder(config.run.dir)
        self._pairs: Tensor | None = None
        self._thread: threading.Thread | None = None
        self._pause = FIRST_SECONDS
        self._next = time.monotonic() + self._pause
        if not tracker.is_on:
            return
        tracker.log_artifact(self._run.config)
        facts = {"images": len(images.paths), "classes": len(images.classes), "sha256_of_list": images.list_hash}
        tracker.log_dataset(str(config.data.root), images.list_hash, facts)
        self._begin(self._make_views)

    def reached(self, step: int) -> None:
        """The run can go on from `step`: its description says how far that is, and by which command."""
        done, whole = step / self._steps_per_epoch, self._config.optim.epochs
        command = f"moco-dist pretrain {shlex.quote(str(self._run.config.resolve()))}"
        if step == self._total_steps:
            command = f"moco-dist linear --run-dir {shlex.quote(str(self._run.root.resolve()))}"
        self._tracker.describe({
            "how far": f"step {step:,} of {self._total_steps:,}, epoch {done:.1f} of {whole}",
            "to go on": f"`{command}`, as many processes as you like",
        })  # fmt: skip

    def logged(self) -> None:
        """The log has a new row: the page is made anew if it is old, and the one before it is ready."""
        if self._tracker.is_on and time.monotonic() >= self._next and not self._is_making():
            self._pause = min(2 * self._pause, LONGEST_SECONDS)
            self._next = time.monotonic() + self._pause
            self._begin(self._make_page)

    def finish(self, step: int) -> None:
        """The last page and the backbone, of a run that has come to its end at `step`."""
        if not self._tracker.is_on:
            return
        if not self._is_making(END_SECONDS):
            self._begin(self._make_page)
            self._is_making(END_SECONDS)
        config, augment = self._config, self._config.augment
        facts = {"arch": config.model.arch, "image_size": config.data.image_size, "mean": augment.mean,
                 "std": augment.std, "format": "safetensors with the names of the network's library"}  # fmt: skip
        params = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
        self._tracker.log_model(self._run.backbone, MODEL, step, params, "backbone")

    def close(self) -> None:
        """Wait a little for what is being made, since a thread that a process ends amid may end it badly."""
        self._is_making(CLOSE_SECONDS)

    def _is_making(self, wait_seconds: float = 0) -> bool:
        if self._thread is not None:
            self._thread.join(wait_seconds)
        return self._thread is not None and self._thread.is_alive()

    def _begin(self, make: Callable[[], None]) -> None:
        def make_or_tell() -> None:
            try:
                make()
            except Exception as error:  # of any library that draws or reads
                self._say(f"note: no picture of the run for MLflow: {error}; training goes on")

        self._thread = threading.Thread(target=make_or_tell, name="pictures", daemon=True)
        self._thread.start()

    def _make_views(self) -> None:
        data = self._config.data
        # DALI would take memory of the GPU that trains; the views are the same.
        data = data.model_copy(update={"loader": "torchvision"}) if data.loader == "dali" else data
        self._pairs = view_pairs(self._config.model_copy(update={"data": data}), PAIRS, self._run.indices)
        save_sheet(self._pairs, self._run.views)
        self._tracker.log_artifact(self._run.views)

    def _make_page(self) -> None:
        page = write_report(self._run.root, self._pairs)
        self._tracker.log_artifact(page, "report")
