"""One rank's step on a GPU that is not there: every method, precision, exchange and option works, and nothing waits.

What must not happen is done on purpose: each mistake is found, and named with its line.
"""

import re

import pytest
import torch

from moco_dist.cli.main import main
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.batch import CropBatch
from moco_dist.data.views import Views
from moco_dist.distributed.world import World
from moco_dist.errors import UserError
from moco_dist.method import moco
from moco_dist.method.build import build_method
from moco_dist.method.encoder import Encoder
from moco_dist.planning import arithmetic, compiled
from moco_dist.planning.dry_run import dry_run, text
from moco_dist.planning.fake_gpu import DEVICE, fake_rank
from moco_dist.planning.watch import HostWaitError, Watch
from tests.planning.config import config_of

WORLDS = {1: (1, 1), 8: (2, 4), 1024: (128, 8)}  # ranks: hosts and GPUs of each


def small(world_size, **sections):
    """A small network; 16 samples a rank, in two BN groups; one block of the shuffle over 8 ranks of 2 hosts."""
    values = config_of().model_dump(mode="json")
    given = {"optim": {}, "moco": {}, **sections}
    given["optim"] = {"global_batch_size": 16 * world_size, "precision": "fp32", **given["optim"]}
    given["moco"] = {"queue_size": 32 * world_size + 512, **given["moco"]}
    for name, settings in given.items():
        values[name] = {**values[name], **settings} if isinstance(settings, dict) else settings
    return PretrainConfig.model_validate(values)


def run(world_size, rank=0, **sections):
    return dry_run(small(world_size, **sections), *WORLDS[world_size], rank)


@pytest.fixture
def watch():
    with fake_rank(World(device=str(DEVICE))), Watch() as on:
        yield on


def nothing_waits(found):
    """But the log, in two places: for the losses, and for its other numbers."""
    return (
        found.step.host_reads == []
        and [place.split(":")[0] for place in found.log_step.host_reads] == ["moco_dist/run/logbook.py"] * 2
    )


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("method", ["moco", "symmetric", "simclr"])
def test_methods(method, world_size):
    """In the first, a middle and the last rank."""
    sections = {"moco": {}, "symmetric": {"moco": {"symmetric": True}}, "simclr": {"method": "simclr"}}[method]
    rank = {"moco": 0, "symmetric": world_size // 2, "simclr": world_size - 1}[method]
    found = run(world_size, rank, **sections)
    assert nothing_waits(found)
    assert found.memory["activations, temporary tensors"] > 0
    assert (sum(found.step.received_bytes.values()) == 0) == (world_size == 1)


OPTIONS = {
    "bf16, crops over all ranks": {"optim": {"precision": "bf16"}, "shuffle": {"exchange": "all_to_all"}},
    "fp16, crops within hosts": {"optim": {"precision": "fp16"}, "shuffle": {"exchange": "auto"}},
    "accumulation, views gathered": {"optim": {"grad_accum_steps": 2}, "shuffle": {"exchange": "all_gather"}},
    "LARS, keys decoded where needed": {"optim": {"optimizer": "lars"}, "shuffle": {"exchange": "loader"}},
    "fp64, v1's colours": {"optim": {"precision": "fp64"}, "augment": {"recipe": "v1"}},
    "SimCLR, bf16, LARS": {"method": "simclr", "optim": {"precision": "bf16", "optimizer": "lars"}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    assert nothing_waits(run(8, 5, **options))


@pytest.mark.slow
def test_what_is_compiled_is_one_graph_on_the_gpu():
    """In each world alike; LARS and the colours too."""
    found = run(8, engine={"compile": "step", "cuda_graphs": True}, optim={"optimizer": "lars"})
    assert nothing_waits(found)
    assert list(found.compiled) == ["encoder", "colours", "LARS"]
    for traced in found.compiled.values():
        assert (traced.graphs, traced.off_gpu, traced.breaks) == (1, [], [])
        assert traced.operations > 50
    (line,) = found.not_traced
    assert "nor recorded as CUDA graphs; the step above is the eager one" in line
    assert "encoder, compiled" in text(found)


def an_index_on_the_cpu(x):
    return x[torch.arange(len(x) - 1, -1, -1)]


def a_break(x):
    torch._dynamo.graph_break()
    return x * 2


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "told"), [
    (an_index_on_the_cpu, r"test_dry_run.py:\d+: lies on the CPU, and so in no CUDA graph"),
    (a_break, r"2 graphs of .*\n *broken by: .*graph_break"),
])  # fmt: skip
def test_what_no_graph_can_hold_is_told(monkeypatch, mistake, told):
    forward = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, images: mistake(forward(self, images)))
    rows = compiled.lines(compiled.traced(small(1, engine={"compile": "model"}), 16))
    assert re.search(told, "\n".join(map(" ".join, rows)))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_engine_that_is_not_traced_is_told_in_a_line_and_the_rest_is(stage):
    found = run(8, engine={"kind": "deepspeed", "zero_stage": stage})
    assert nothing_waits(found)
    (line,) = found.not_traced
    assert re.match("engine.kind deepspeed, .* by their addresses: the step above is that of ddp", line)
    assert "not traced" in text(found)


def test_the_numbers_are_those_of_the_plan():
    """Of bytes and of memory, which `arithmetic` counts from sizes alone."""
    config = small(8, shuffle={"exchange": "all_to_all"})
    planned, found = arithmetic.sizes(config, 8, 4), dry_run(config, *WORLDS[8])
    received = found.step.received_bytes
    features = received["all-gather"] + received["reduce-scatter"]
    assert received["all-reduce"] == pytest.approx(planned.received()["gradients"], rel=1e-5)
    assert features == planned.received()["features"]
    assert received["all-to-all"] == pytest.approx(planned.received()["images"], rel=0.2)  # of one step, and the mean
    for name, count in planned.memory().items():
        if name in found.memory:
            assert found.memory[name] == pytest.approx(count, rel=0.01), name
    activations = planned.memory()["activations kept for backward"]
    temporary = planned.memory()["gradients"]  # before they are in their buckets
    assert activations < found.memory["activations, temporary tensors"] < activations + temporary
    assert found.step.kernels >= sum(found.step.operations.values()) / 2
    assert found.step.flops > 0


def test_a_step_leaves_no_memory_behind(watch):
    """Or steps would need more and more."""
    method = build_method(small(1), World(device=str(DEVICE)))
    left = []
    for _ in range(3):
        views, order = torch.empty(16, 3, 32, 32, device=DEVICE), torch.empty(16, dtype=torch.int64, device=DEVICE)
        method.train_step(Views(views, views, order), 0.1, False)
        del views, order
        left.append(watch.memory.bytes_now)
    assert left[1] == left[2]


# Mistakes, each made on purpose.


def order_left_on_the_cpu(monkeypatch):
    to = CropBatch.to

    def all_but_the_order(batch, device):
        moved = to(batch, device)
        object.__setattr__(moved, "key_order", batch.key_order)
        return moved

    monkeypatch.setattr(CropBatch, "to", all_but_the_order)


def in_the_loss(mistake):
    def make(monkeypatch):
        info_nce = moco.info_nce

        def loss_of(q, *others):
            mistake(q)
            return info_nce(q, *others)

        monkeypatch.setattr(moco, "info_nce", loss_of)

    return make


MISTAKES = {
    "an index left on the CPU": (order_left_on_the_cpu, r"method/infonce.py:\d+: an index that stayed on the CPU"),
    "a value that is read": (in_the_loss(lambda q: q.sum().item()), r"method/moco.py:\d+: reads a value"),
    "a shape that depends on data": (in_the_loss(lambda q: q[q > 0]), r"method/moco.py:\d+: an index by a mask"),
}


@pytest.mark.parametrize(("mistake", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_step_is_found(monkeypatch, mistake, told):
    mistake(monkeypatch)
    with pytest.raises(UserError, match=rf"a step of this config fails as rank 3 of 8: \S*{told}"):
        run(8, 3)


def test_an_order_left_on_the_cpu_is_found_in_simclr_too(monkeypatch):
    order_left_on_the_cpu(monkeypatch)
    with pytest.raises(UserError, match=r"rank 0 of 1: moco_dist/method/ntxent.py:\d+: .*cpu"):
        run(1, method="simclr")


WAITS = {
    "item": lambda x, cpu: x.sum().item(),
    "float": lambda x, cpu: float(x[0, 0]),
    "bool": lambda x, cpu: bool(x.sum() > 0),
    "if": lambda x, cpu: 1 if (x > 0).any() else 0,
    "tolist": lambda x, cpu: x.tolist(),
    "equal": lambda x, cpu: torch.equal(x, x),
    "cpu": lambda x, cpu: x.cpu(),
    "copy to the host": lambda x, cpu: cpu.copy_(x),
    "a copy that is waited for": lambda x, cpu: cpu.pin_memory().to(DEVICE),
    "a copy from pageable memory": lambda x, cpu: cpu.to(DEVICE, non_blocking=True),
    "a constant made on the host": lambda x, cpu: torch.tensor([1.0, 2.0], device=DEVICE),
    "nonzero": lambda x, cpu: x.nonzero(),
    "mask": lambda x, cpu: x[x > 0],
    "masked_select": lambda x, cpu: x.masked_select(x > 0),
    "unique": lambda x, cpu: x.unique(),
    "repeat_interleave": lambda x, cpu: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=DEVICE), 0),
    "index from the CPU": lambda x, cpu: x[torch.tensor([1, 2])],
    "assignment by an index from the CPU": lambda x, cpu: x.index_put_((torch.tensor([1, 2]),), x[:2]),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_what_makes_the_host_wait_is_found(watch, wait):
    x, cpu = torch.empty(4, 4, device=DEVICE), torch.zeros(4, 4)
    with watch.counting(may_wait=False), pytest.raises(HostWaitError, match=r"^test_dry_run.py:\d+: "):
        wait(x, cpu)


def test_two_devices_in_an_operation_are_found(watch):
    x, cpu = torch.empty(4, 4, device=DEVICE), torch.zeros(4, 4)
    with pytest.raises(RuntimeError, match="same device|different devices"):
        x + cpu


def test_what_waits_for_nothing_is_let_through(watch):
    x, cpu = torch.empty(4, 4, device=DEVICE), torch.zeros(4, 4)
    with watch.counting(may_wait=False) as count:
        moved = cpu.pin_memory().to(DEVICE, non_blocking=True)
        x[torch.arange(2, device=DEVICE)] = moved[:2] * 2.0
        x.new_full((), 0.1)
        assert int(torch.zeros((), dtype=torch.int64)) == 0  # the queue's pointer is on the CPU
        assert (x @ moved).sum().is_cuda
    assert count.host_reads == []
    assert count.flops == 2 * 4**3


def test_the_process_is_as_it_was_before():
    """Real tensors compute, and nothing of torch stays replaced."""
    before = torch.Tensor._make_subclass, torch.Tensor.pin_memory, torch.cuda.Stream, torch.cuda.current_stream
    with fake_rank(World(rank=3, local_rank=3, world_size=8, local_world_size=8, device=str(DEVICE))):
        assert torch.distributed.get_world_size() == 8
    assert before == (torch.Tensor._make_subclass, torch.Tensor.pin_memory, torch.cuda.Stream,
                      torch.cuda.current_stream)  # fmt: skip
    assert not torch.distributed.is_initialized()
    x = torch.ones(3, requires_grad=True)
    (x * x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


FLAGS = ["--model.arch", "resnet10", "--data.image-size", "32", "--moco.queue-size", "512", "--run.dir", "r",
         "--model.head-hidden-dims", "[64]", "--optim.global-batch-size", "64", "--model.bn-group-size", "8",
         "--data.root", "nowhere", "--dry-run"]  # fmt: skip


def test_the_command(capsys):
    assert main(["plan", *FLAGS, "--nodes", "2", "--gpus-per-node", "2"]) == 0
    out = capsys.readouterr().out
    assert "on 2 host(s) x 2: one rank's step works" in out
    for line in ("memory a GPU, at the peak", "  queue shard", "kernels a step", "  all-gather", "waits for the GPU"):
        assert line in out


def test_the_command_says_in_one_line_why_not(capsys):
    assert main(["plan", *FLAGS, "--gpus-per-node", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "optim.global_batch_size" in line


@pytest.mark.slow
def test_resnet50_on_1024_ranks():
    config = PretrainConfig.model_validate({
        "run": {"dir": "r"}, "data": {"root": "d"}, "optim": {"global_batch_size": 32 * 1024, "precision": "bf16"},
    })  # fmt: skip
    found = dry_run(config, 128, 8, rank=1023)
    assert nothing_waits(found)
    # 4.1 billion multiplications and additions an image: two forward passes, and a backward pass of twice one.
    assert found.step.flops == pytest.approx(2 * 4.1e9 * 32 * 4, rel=0.02)
    assert 1e9 < sum(found.memory.values()) < 5e9
    assert found.step.received_bytes["all-reduce"] == pytest.approx(2 * 27.97e6 * 4, rel=0.01)
