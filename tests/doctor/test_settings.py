"""What is allowed and does not work well is said in one line that has the cure."""

import pytest

from moco_dist.config.evaluate import FinetuneConfig, LinearConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import read_config
from moco_dist.doctor.settings import finetune, linear, pretraining

NEEDED = ["--run.dir", "r", "--data.root", "d"]


def findings(*flags, world_size=1, local_world_size=None, num_images=1_281_167):
    config = read_config(PretrainConfig, None, [*NEEDED, *flags])
    found = pretraining(config, world_size, local_world_size or world_size, num_images)
    return [(f.level, f"{f.about}: {f.text}") for f in found]


def test_the_published_recipe_has_nothing_unusual():
    assert findings(world_size=8) == [("ok", "settings: sizes fit 8 rank(s), and nothing is unusual")]


@pytest.mark.parametrize(
    ("flags", "facts", "level", "expected"),
    [
        ([], {"num_images": 60_000}, "warning", "larger than the data set (60000)"),
        (["--optim.epochs", "1", "--moco.momentum", "0.9"], {"num_images": 80_000}, "warning",
         "too short: the queue turns over 1.2 times"),
        (["--moco.queue-size", "1024"], {"num_images": 1100}, "warning",
         "too short: the key encoder lags 1,000 steps behind (moco.momentum 0.999), and the whole run has 800: at its "
         "end 45 % of the key encoder is still the untrained one; --moco.momentum 0.99, or more epochs"),
        ([], {"world_size": 16}, "error", "512 is the smallest that is"),
        (["--model.bn-group-size", "256"], {}, "warning", "--model.bn-group-size 32"),
        (["--model.bn-group-size", "4"], {}, "warning", "noisy"),
        (["--moco.queue-size", "512"], {}, "warning", "only 2.0 batches"),
        (["--moco.temperature", "0.07"], {}, "warning", "0.07 62.9 %"),
        (["--optim.base-lr", "30"], {}, "warning", "pre-training takes 0.03"),
        (["--optim.global-batch-size", "4096"], {}, "warning", "no warm-up"),
        (["--optim.schedule", "step", "--optim.epochs", "150"], {}, "warning", "[160] lie past the end"),
        (["--data.image-size", "32"], {}, "warning", "--model.stem cifar"),
        (["--optim.global-batch-size", "512"], {"world_size": 16, "local_world_size": 4}, "warning",
         "within 256 samples, on 8 ranks of several hosts; shuffle.exchange auto: 1.50 decodes a sample, 1.8 MB of key "
         "views to a rank and step, 0.0 MB into a host; a host has 128 samples of a step: --shuffle.block-size 128"),
    ],
)  # fmt: skip
def test_unusual_settings(flags, facts, level, expected):
    (found,) = [finding for finding in findings(*flags, **facts) if finding[0] != "ok"]
    assert found[0] == level
    assert expected in found[1]


def test_linear_evaluation():
    def lines(*flags):
        return [(f.level, f.text) for f in linear(read_config(LinearConfig, None, ["--run-dir", "r", *flags]))]

    ((level, text),) = lines()
    assert level == "ok"
    assert "lr 30 looks large and is right" in text
    assert lines("--lr", "0.1")[0][0] == "warning"
    assert "[60, 80] lie past the end" in lines("--epochs", "50")[0][1]
    assert lines("--weight-decay", "0.0001")[-1][0] == "warning"


def test_fine_tuning():
    def lines(*flags):
        return [(f.level, f.text) for f in finetune(read_config(FinetuneConfig, None, ["--run-dir", "r", *flags]))]

    assert [level for level, _ in lines()] == ["ok"]
    assert lines("--classifier-lr", "0.001")[0][0] == "warning"
    assert "[12, 16] lie past the end" in lines("--epochs", "10")[1][1]
