"""A trace of some steps by torch.profiler (`log.profile_steps`): what the host and the GPU did in them, and when."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.distributed.world import World
from moco_dist.files import whole_file
from moco_dist.run.folder import RunFolder
from moco_dist.tracking import Tracker


class StepTrace:
    """Keeps the trace on rank 0, and does nothing elsewhere. It changes no number, and its failure ends nothing."""

    def __init__(self, config: PretrainConfig, world: World, tracker: Tracker, say: Callable[[str], None]) -> None:
        """For the run of `config`; `tracker` gets the file too, and `say` tells where it is."""
        self._first, self._last = (config.log.profile_steps if world.is_main else None) or (0, -1)
        self._run, self._device, self._tracker, self._say = RunFolder(config.run.dir), world.device, tracker, say
        self._profile: profile | None = None
        self._start = self._step = 0

    def reached(self, step: int) -> None:
        """`step` steps are done: begin before the first that is asked for, and write after the last."""
        self._step = step
        if self._profile is not None and step >= self._last:
            self.close()
        elif self._profile is None and self._first <= step + 1 <= self._last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._device.startswith("cuda")
            self._profile, self._start = profile(activities=activities, acc_events=True), step + 1
            self._try(self._profile.start)

    def close(self) -> None:
        """Write what there is, where a trace is under way: also of a run that is stopped in the midst of it."""
        if self._profile is not None:
            self._try(self._write)
            self._profile = None

    def _write(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        path = self._run.trace(self._start, self._step)
        with whole_file(path) as partial:
            packed = partial.with_suffix(".gz")  # by this ending torch compresses
            self._profile.export_chrome_trace(str(packed))
            packed.replace(partial)
        self._tracker.log_artifact(path, "profile")
        self._say(f"wrote {path}: steps {self._start} to {self._step}")

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # of the profiler, its driver, another profiler that runs, or a full disk
            self._say(f"warning: no trace of steps (log.profile_steps): {error}; training goes on")
            self._profile = None
