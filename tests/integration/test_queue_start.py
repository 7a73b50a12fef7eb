"""`moco.queue_start keys` by the command itself: filled once, before the first step, whatever interrupts the run."""

import json

import pytest

from moco_dist import train
from moco_dist.cli.main import main
from moco_dist.datasets.prepare import prepare_shapes
from moco_dist.distributed.stop import FAILED, STOP
from moco_dist.errors import EXIT_MISTAKE, EXIT_PREEMPTED, EXIT_UNREACHABLE


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory):
    """A function that trains 6 steps into a folder of that name: its exit status, and the losses so far."""
    folder = tmp_path_factory.mktemp("start")
    data = prepare_shapes(folder / "shapes", num_train=50, num_val=10)
    small = [
        "--data.root", str(data), "--data.image-size", "32", "--data.num-workers", "0", "--model.arch", "resnet10",
        "--model.head-hidden-dims", "[16]", "--model.bn-group-size", "4", "--optim.global-batch-size", "16",
        "--optim.epochs", "2", "--moco.queue-size", "40", "--log.every-steps", "1", "--tracking.backend", "none",
    ]  # fmt: skip

    def losses(name, *flags):
        run_dir = folder / name
        status = main(["pretrain", *small, "--run.dir", str(run_dir), *flags])
        rows = (run_dir / "log.jsonl").read_text().splitlines() if (run_dir / "log.jsonl").is_file() else []
        return status, [row["loss"] for row in map(json.loads, rows) if "loss" in row]

    return losses


KEYS = ("--moco.queue-start", "keys")


@pytest.mark.slow
def test_it_is_filled_once_and_the_run_goes_on_as_if_never_stopped(pretrain, monkeypatch, capsys):
    status, whole = pretrain("whole", *KEYS)
    assert (status, len(whole)) == (0, 6)
    assert "fills the queue with the keys of 3 batches before the first step" in capsys.readouterr().out
    assert abs(whole[0] - pretrain("random")[1][0]) > 0.1  # real keys are not told apart by an untrained network

    assert pretrain("parts", *KEYS, "--run.stop-at-step", "3") == (0, whole[:3])
    capsys.readouterr()
    assert pretrain("parts", *KEYS) == (0, whole)
    assert "fills the queue" not in capsys.readouterr().out

    with monkeypatch.context() as patch:  # a scheduler asks to stop while the queue is being filled
        patch.setattr(train.StopRequest, "agreed", lambda self, step: STOP)
        assert pretrain("asked", *KEYS) == (EXIT_PREEMPTED, [])
        patch.setattr(train.StopRequest, "agreed", lambda self, step: FAILED)  # another rank has no loader any more
        assert pretrain("asked", *KEYS) == (EXIT_UNREACHABLE, [])
        assert "another rank cannot load; saved at step 0" in capsys.readouterr().err
    assert pretrain("asked", *KEYS) == (0, whole)


def test_a_queue_that_an_epoch_does_not_fill_is_refused(pretrain, capsys):
    assert pretrain("large", *KEYS, "--moco.queue-size", "64")[0] == EXIT_MISTAKE
    assert "takes 4 batches of 16, and an epoch has 3; random works, or a smaller moco.queue_size" in (
        capsys.readouterr().err
    )
