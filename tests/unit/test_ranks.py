"""Why ranks end, as a status and in words, without starting any."""

import fcntl
import resource
import signal
import socket
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moco_dist.cli.ranks import ranks
from moco_dist.config.pretrain import EngineConfig, PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.distributed.collectives import why_no_group
from moco_dist.distributed.heartbeat import Heartbeat, is_aborting, is_lost_connection
from moco_dist.distributed.world import World, world_from_env
from moco_dist.doctor import machine
from moco_dist.engine import ddp
from moco_dist.errors import UserError, cause

NCCL = "NCCL error in: ProcessGroupNCCL.cpp:94, {kind}, NCCL version 2.27.5\nncclX\nLast error:\n{last}\n"
DUPLICATE = "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"
CUDA1 = World(1, 1, 2, 2, "cuda:1")


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ([0, 0], 0),
        ([69, 2], 2),  # an image that cannot be read there; the others have lost that rank
        ([69, 73, 69], 73),
        ([69, 74], 74),
        ([69, 1], 1),
        ([75, 69], 75),
        ([137], 69),
        ([134, 0], 69),
        ([139, 69], 139),
        ([130, 69], 130),
    ],
)
def test_the_cause_decides_and_not_the_highest_status(statuses, status):
    assert cause(statuses) == cause(reversed(statuses)) == status


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (dist.DistStoreError("wait timeout after 600000ms"), 69, ["cannot meet the other 1 at", "wait timeout"]),
        (dist.DistNetworkError("The client socket has failed"), 69, ["cannot meet the other 1 at"]),
        (TimeoutError("rank 0 has not come"), 69, ["rank 0 has not come"]),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:144] no"), 69, ["cannot meet"]),
        (dist.DistBackendError(NCCL.format(kind="invalid usage", last=DUPLICATE)), 2,
         ["rank 1 cannot use cuda:1", "both on CUDA device 1000; each rank needs a GPU of its own"]),
        (dist.DistBackendError(NCCL.format(kind="unhandled system error", last="Call to ibv_create_qp failed")), 74,
         ["NCCL cannot start on rank 1: Call to ibv_create_qp failed", "NCCL_DEBUG=INFO", "TORCH_DIST_USE_NCCL2=0"]),
        (RuntimeError("NCCL Error 5: invalid usage\nLast error:\nDuplicate GPU detected"), 2, ["cannot use cuda:1"]),
        (RuntimeError("ncclCommInitRankConfig failed: internal error"), 74, ["ncclCommInitRankConfig failed"]),
        (RuntimeError("Failed to initialize NCCL communicator: invalid usage"), 2, ["needs a GPU of its own"]),
        (RuntimeError("Failed to initialize NCCL communicator: unhandled system error"), 74, ["TORCH_DIST_USE_NCCL2"]),
        (RuntimeError("Call to ibv_reg_mr failed"), 74, ["NCCL cannot start on rank 1: Call to ibv_reg_mr failed"]),
        (dist.DistBackendError("retrieving ncclUniqueId by key '0', but store->get('0') got error: wait timeout"), 69,
         ["cannot meet the other 1 at", "wait timeout"]),
        (RuntimeError("CUDA error: out of memory"), 74, ["CUDA error: out of memory"]),
        (ValueError("Error initializing torch.distributed: environment variable RANK expected"), 2, ["torchrun"]),
    ],
)  # fmt: skip
def test_what_keeps_a_group_from_being_made_is_told_as_what_it_is(error, status, words):
    told = why_no_group(error, CUDA1)
    assert told is not None
    assert told.exit_status == status
    assert all(word in str(told) for word in words)
    assert ("cannot meet the other 1" in str(told)) == (status == 69)
    assert "\n" not in str(told)


def test_an_error_that_nobody_knows_is_not_explained():
    assert why_no_group(RuntimeError("something else"), CUDA1) is None


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (dist.DistBackendError("NCCL error: ncclRemoteError: remote process exited"), True),
        (dist.DistBackendError("NCCL error: ncclInvalidUsage"), False),
        (dist.DistBackendError("NCCL error: ncclUnhandledCudaError: out of memory"), False),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("gloo/transport"), False),
    ],
)
def test_a_lost_connection_is_told_from_an_error_of_ones_own(error, is_lost):
    assert is_lost_connection(error) is is_lost


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_know_nothing_of_each_other_are_told_of_the_launcher(variable):
    """Each would take itself for the only one, and all would write into one folder."""
    with pytest.raises(UserError, match="has started 8 processes.*one torchrun on each host.*moco-dist launch slurm"):
        world_from_env("cpu", {variable: "8"})
    assert world_from_env("cpu", {variable: "1"}) == World()
    assert world_from_env("cpu", {variable: "8", "WORLD_SIZE": "2", "RANK": "1"}).world_size == 2


LAST_OF_FOUR = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}


@pytest.fixture
def visible_gpus(monkeypatch):
    """A function that says how many GPUs this process sees."""

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


UUIDS = [f"GPU-{number}0c0ffee-1111-2222-3333-444444444444" for number in range(4)]


@pytest.mark.parametrize(
    "names",
    [["0"] * 4, ["0", "1", "2", "3"], UUIDS, [f"MIG-{uuid[4:]}" for uuid in UUIDS],
     [f"MIG-GPU-{uuid[4:]}/3/0" for uuid in UUIDS]],
    ids=["by a cgroup", "numbers", "UUIDs", "MIG", "MIG by its older name"],
)  # fmt: skip
def test_each_task_of_srun_takes_the_gpu_that_it_was_given(names, monkeypatch):
    """`srun --gpus-per-task=1` on a host of four: each rank calls its GPU cuda:0, and the doctor is content.

    torch counts as it does in front of a driver; what the driver would say is said here.
    """
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: UUIDS)
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: 1 if names[1] == "0" else 4)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 1)  # CUDA shows a process one MIG device at most
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(machine, "_has_nvidia_driver", lambda: True)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    config = PretrainConfig.model_validate({"run": {"dir": "r", "device": "cuda"}, "data": {"root": "d"}})
    for rank, name in enumerate(names):
        of_rank = {"RANK": f"{4 + rank}", "WORLD_SIZE": "8", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": "4",
                   "CUDA_VISIBLE_DEVICES": name}  # fmt: skip
        for variable, value in of_rank.items():
            monkeypatch.setenv(variable, value)
        world = world_from_env("cuda")
        assert (world.device, world.rank, world.local_rank) == ("cuda:0", 4 + rank, rank)
        found = machine.gpus(config, world.local_world_size)
        assert (found.level, found.text) == ("ok", "1 x NVIDIA H100 for each rank")


def test_a_process_that_sees_its_own_gpu_alone_takes_it(visible_gpus, monkeypatch):
    """And wraps the encoder for it."""
    visible_gpus(4)
    assert world_from_env("cuda", LAST_OF_FOUR).device == "cuda:3"
    visible_gpus(1)
    world = world_from_env("cuda", LAST_OF_FOUR)
    assert (world.device, world.local_rank) == ("cuda:0", 3)
    given = {}
    monkeypatch.setattr(ddp, "DistributedDataParallel", lambda module, **settings: given.update(settings) or module)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: None)
    model = nn.Linear(2, 2)
    ddp.DDPEngine(model, torch.optim.SGD(model.parameters()), torch.bfloat16, EngineConfig(), world)
    assert given["device_ids"] == [torch.device("cuda:0")]


def test_one_gpu_for_the_processes_of_a_torchrun_is_a_mistake(visible_gpus):
    """They share their environment, so they see the same GPU."""
    visible_gpus(1)
    with pytest.raises(UserError, match="local rank 3 has no GPU: 1 found"):
        world_from_env("cuda", {**LAST_OF_FOUR, "TORCHELASTIC_RUN_ID": "none"})
    visible_gpus(2)
    with pytest.raises(UserError, match="local rank 3 has no GPU: 2 found"):
        world_from_env("cuda", LAST_OF_FOUR)


@pytest.mark.parametrize(
    ("blocked", "aborts"),
    [({signal.SIGABRT}, True), (signal.valid_signals(), False), ({signal.SIGTERM}, False), (set(), False)],
    ids=["in its handler", "a library's thread that blocks all", "another", "none"],
)
def test_an_abort_is_told_from_threads_that_block_signals_for_good(blocked, aborts):
    """As the allocator does that MLflow's packages bring along; it would end every run of several ranks."""
    is_blocked, is_seen = threading.Event(), threading.Event()

    def block():
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        is_blocked.set()
        is_seen.wait()

    thread = threading.Thread(target=block)
    thread.start()
    is_blocked.wait()
    try:
        assert is_aborting() == aborts
    finally:
        is_seen.set()
        thread.join()


def test_the_end_of_the_store_is_seen_by_a_rank_with_thousands_of_open_files():
    """Among 512 ranks it has them, and `select` takes no file above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    here, there = socket.socketpair()
    heartbeat, ends = Heartbeat(World(1, 1, 2, 2), 5.0), []

    def end(word, tell):
        ends.append(word)
        heartbeat._quit.set()

    heartbeat._line, heartbeat._ears = [socket.socket(fileno=fcntl.fcntl(here, fcntl.F_DUPFD, 1500))], dist.HashStore()
    heartbeat._holder, heartbeat._end = "rank 0 on host a", end
    try:
        there.close()
        heartbeat._listen()
    finally:
        heartbeat._line[0].close()
        here.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ends == ["rank 0 on host a, which holds the rendezvous store, has ended without a word"]


def test_a_command_that_trains_may_open_as_many_files_as_the_hard_limit_says(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    monkeypatch.setenv("LOCAL_RANK", "none")  # so that the command goes no further
    config = read_config(PretrainConfig, None, ["--run.dir", "r", "--data.root", "d"])
    try:
        with pytest.raises(UserError, match="LOCAL_RANK is 'none'"), ranks(config):
            pass
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
