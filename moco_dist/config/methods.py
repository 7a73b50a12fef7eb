"""A method's own settings, and what follows from them alone: what others ask about a method without building it.

`PretrainConfig.of_method` is the section of the method that a run uses. A further method is a section here, a file in
`moco_dist/method` and a line in `moco_dist/method/build.py`.
"""

from typing import ClassVar, Literal

from moco_dist.config.section import Section, setting

FEW_LAGS = 5  # of the key encoder over the whole run: one of 5 gained (docs/own-data.md, A small set of photographs)
FEW_TURNS = 10  # of a queue that starts with random keys, over the whole run
QUICKER = (0.996, 0.99, 0.97, 0.9)  # values of m to propose to a short run


class MocoConfig(Section):
    """The dictionary and the loss."""

    queue_size: int = setting(
        65536, "K, keys in the queue", changes="shapes", times=("step",), unit="keys", source="v1 sec. 3.3", gt=0
    )
    queue_start: Literal["random", "keys"] = setting(
        "random",
        "what the queue holds before the first step; keys: those that the untrained encoder makes of the batches that "
        "end the first epoch, ceil(K / keys of a step) of them, without a gradient",
        changes="result",
        source="the original release: random",
    )
    symmetric: bool = setting(
        False,
        "each view is query and key in turn: twice the work a step, and two keys a sample for the queue",
        changes="result",
        times=("step",),
        source="arXiv 2104.02057",
    )
    momentum: float = setting(
        0.999, "m, of the key encoder's moving average", changes="result", source="v1 eq. (2)", ge=0, lt=1
    )
    temperature: float = setting(0.2, "tau", changes="result", source="v2 Table 2; v1 uses 0.07", ge=0.01, le=10)

    title: ClassVar = "MoCo"
    paper: ClassVar = "MoCo v2 (arXiv 2003.04297)"
    chance_formula: ClassVar = "ln(K + 1)"
    num_encoders: ClassVar = 2

    @property
    def queue_keys(self) -> int:
        """Keys that are kept from step to step."""
        return self.queue_size

    @property
    def num_directions(self) -> int:
        """Views of a sample that are queries, and so go through the encoder with gradient."""
        return 2 if self.symmetric else 1

    def num_filling_batches(self, batch: int) -> int:
        """Batches of `batch` samples that fill the queue before the first step; 0 where it starts with random keys."""
        return -(-self.queue_size // (self.num_directions * batch)) if self.queue_start == "keys" else 0

    def too_short(self, batch: int, steps: int) -> list[str]:
        """Why a run of `steps` steps of `batch` samples is too short for m and K; empty where it is not.

        The key encoder lags 1 / (1 - m) steps behind, and after S steps m^S of it is still the untrained network.
        """
        found = []
        lag, turns = 1 / (1 - self.momentum), steps * self.num_directions * batch / self.queue_size
        if steps < FEW_LAGS * lag:
            fitting = [m for m in QUICKER if m < self.momentum and steps * (1 - m) >= FEW_LAGS]
            remedy = f"--moco.momentum {fitting[0]}, or more epochs" if fitting else "more epochs"
            found.append(f"the key encoder lags {lag:,.0f} steps behind (moco.momentum {self.momentum}), and the whole "
                         f"run has {steps:,}: at its end {100 * self.momentum**steps:.0f} % of the key encoder is "
                         f"still the untrained one; {remedy}")  # fmt: skip
        if self.queue_start == "random" and turns < FEW_TURNS:
            found.append(f"the queue turns over {turns:.1f} times in the whole schedule, and starts with random keys: "
                         "a smaller moco.queue_size or more epochs")  # fmt: skip
        return found

    def num_negatives(self, batch: int) -> int:
        """How many keys a query is compared with beside its positive; `batch` is the global one."""
        return self.queue_size

    def received_numbers(self, local_batch: int, dim: int) -> int:
        """Numbers of features that a rank receives from each other rank in a step: see method/infonce.py.

        q and k go to every rank, and each query's sums come back.
        """
        return self.num_directions * local_batch * (3 * dim + 1)

    def described(self) -> str:
        """The settings that characterise a run, for its line at the start."""
        return f"K {self.queue_size}, m {self.momentum}, tau {self.temperature}"

    def size_problems(self, batch: int, accum: int, world_size: int) -> list[str]:
        """What does not fit at a global batch of `batch` in `accum` micro-batches on `world_size` ranks."""
        problems = []
        if self.queue_size < (keys := self.num_directions * batch):
            symmetric = ", moco.symmetric" if self.symmetric else ""
            problems.append(
                f"moco.queue_size {self.queue_size} holds less than the {keys} keys of one step "
                f"(optim.global_batch_size {batch}{symmetric}); {keys} is the smallest that works"
            )
        if self.queue_size < world_size:
            problems.append(f"moco.queue_size {self.queue_size} is less than one key a rank on {world_size} ranks")
        return problems


class SimclrConfig(Section):
    """method simclr: the negatives are the batch itself, through one encoder, end to end."""

    temperature: float = setting(
        0.1, "tau of NT-Xent", changes="result", source="arXiv 2002.05709, sec. 5.1", ge=0.01, le=10
    )

    title: ClassVar = "SimCLR"
    paper: ClassVar = "SimCLR (arXiv 2002.05709)"
    chance_formula: ClassVar = "ln(2B − 1)"
    num_encoders: ClassVar = 1
    queue_keys: ClassVar = 0
    num_directions: ClassVar = 2

    def num_filling_batches(self, batch: int) -> int:
        """There is no queue to fill."""
        return 0

    def too_short(self, batch: int, steps: int) -> list[str]:
        """Nothing is kept from step to step."""
        return []

    def num_negatives(self, batch: int) -> int:
        """How many views a view is compared with beside its positive: all others of the batch."""
        return 2 * batch - 2

    def received_numbers(self, local_batch: int, dim: int) -> int:
        """Both views' features go to every rank, and their gradients come back: see method/ntxent.py."""
        return 4 * local_batch * dim

    def described(self) -> str:
        """The settings that characterise a run, for its line at the start."""
        return f"SimCLR, tau {self.temperature}"

    def size_problems(self, batch: int, accum: int, world_size: int) -> list[str]:
        """What does not fit."""
        if accum > 1:
            needs = "method simclr needs the whole batch at once, its negatives"
            return [f"optim.grad_accum_steps {accum}: {needs}; 1 works"]
        return []
