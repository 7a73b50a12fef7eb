"""RUN, the folder of a run: what lies in it, what each file means, and who writes it.

Nobody else spells these names. Where a docstring names no writer, it is rank 0 of the pre-training, which holds the
lock. MLflow's record, mlflow.json and mlflow/, is named in tracking/server.py: the tracker of each command writes it.
"""

from dataclasses import dataclass
from pathlib import Path

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.errors import UserError
from moco_dist.provenance import __version__


@dataclass(frozen=True)
class RunFolder:
    """The paths in one run's folder; none has to be there."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved settings, written anew at every start. A folder that has this file is the folder of a run."""
        return self.root / "config.yaml"

    @property
    def lock(self) -> Path:
        """Locked by the one process that trains; says which one that is. It stays when the process ends."""
        return self.root / ".lock"

    def token(self, name: str) -> Path:
        """A file for a moment at the start: rank 0 writes it, and every rank looks whether it sees the same folder.

        It lies where all ranks write, which may be a link to a disk that RUN itself is not on.
        """
        return self.checkpoints / f".start_{name}"

    @property
    def log(self) -> Path:
        """A line of JSON for each log interval and each accuracy during training."""
        return self.root / "log.jsonl"

    def trace(self, first: int, last: int) -> Path:
        """What torch.profiler saw of some steps, for chrome://tracing or ui.perfetto.dev."""
        return self.root / "profile" / f"steps_{first}_{last}.json.gz"

    def images(self, hash_of_list: str) -> Path:
        """The paths of the images that a run goes over, one a line, compressed; the name has their hash."""
        return self.root / f"images_{hash_of_list[:16]}.txt.gz"

    @property
    def indices(self) -> Path:
        """A folder with the index of each large data set that cannot be written; the first rank of a host writes it."""
        return self.root / "index"

    @property
    def stopped(self) -> Path:
        """It is there while a run has been stopped early and has not gone on: launchers then queue it again."""
        return self.root / "preempted.json"

    @property
    def checkpoints(self) -> Path:
        """Folders of checkpoints; all ranks write into the newest, and rank 0 decides when it is complete."""
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.checkpoints / f"step_{step:08d}"

    @property
    def backbone(self) -> Path:
        """The trained backbone, written at the end of a pre-training, or by `moco-dist import`."""
        return self.root / "backbone.safetensors"

    def result(self, kind: str, encoder: str, variant: str = "") -> Path:
        """What an evaluation came to; its rank 0 writes it.

        Args:
            kind: knn, linear or finetune.
            encoder: trained, untrained or pixels.
            variant: says which part of the labels or of the head was used.
        """
        return self._evaluations / f"{kind}_{encoder}{variant}.json"

    def results(self) -> list[Path]:
        """Every JSON file of the evaluations that there are, sorted by name."""
        return sorted(self._evaluations.glob("*.json"))

    @property
    def detection(self) -> Path:
        """What `moco-dist detect` came to."""
        return self._evaluations / "detection.json"

    @property
    def neighbours(self) -> Path:
        """A few test images and their nearest training images, of `moco-dist knn`."""
        return self._evaluations / "neighbours.json"

    @property
    def map(self) -> Path:
        """Principal components of some test images' features and their labels, of `moco-dist knn`."""
        return self._evaluations / "map.safetensors"

    def features(self, key: str) -> Path:
        """The folder of encoded features; `key` is a hash of all that they depend on. All ranks write into it."""
        return self._evaluations / "features" / key

    def progress(self, kind: str, encoder: str, key: str) -> Path:
        """An evaluation's training that is under way; `key` is a hash of all that it depends on."""
        return self._evaluations / f".{kind}_{encoder}_{key}.safetensors"

    @property
    def data_roots(self) -> Path:
        """Where evaluations have found their data, one folder a line."""
        return self._evaluations / ".data_roots"

    @property
    def report(self) -> Path:
        """The page that `moco-dist report` writes, and a pre-training that MLflow tracks."""
        return self.root / "report" / "index.html"

    @property
    def views(self) -> Path:
        """A picture of pairs of views, of a pre-training that MLflow tracks."""
        return self.root / "report" / "views.png"

    @property
    def _evaluations(self) -> Path:
        return self.root / "eval"

    def require(self, called: str = "") -> None:
        """Refuse what is not the folder of a run.

        Args:
            called: the setting that gave it, for the message.

        Raises:
            UserError: it has no config.yaml.
        """
        if not self.config.is_file():
            raise UserError(f"{called} {self.root} is not the folder of a run: it has no {self.config.name}".lstrip())

    def settings(self, called: str = "") -> PretrainConfig:
        """The settings of the pre-training.

        Raises:
            UserError: it is not the folder of a run, or the settings do not fit this version; the file is named.
        """
        self.require(called)
        try:
            return read_config(PretrainConfig, self.config, [])
        except UserError as error:
            ours, problems = __version__, str(error).replace("\n", "; ")
            raise UserError(f"{self.config} does not fit moco_dist {ours}: {problems}; another version has written it, "
                            "or somebody has changed it") from error  # fmt: skip
