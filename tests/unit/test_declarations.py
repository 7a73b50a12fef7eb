"""What every setting was declared to change, and the lists that follow from it, against lists written down here."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

from moco_dist.config.evaluate import DetectConfig, FinetuneConfig, KnnConfig, LinearConfig
from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.section import COMPUTED, Section, setting
from moco_dist.config.source import declarations, flatten, read_config, what_is_computed
from moco_dist.data.images import ImageFolder
from moco_dist.data.names import Names
from moco_dist.planning.measurements import settings_of
from moco_dist.run.resume import facts_to_agree_on

MAY_CHANGE = [
    "run.dir", "run.device", "run.stop_at_step", "run.resume", "run.peer_timeout_seconds", "data.loader",
    "data.num_workers", "data.prefetch_batches", "data.cache_*", "data.dali.*", "data.root", "log.*", "checkpoint.*",
    "tracking.*", "optim.grad_accum_steps", "engine.*", "shuffle.exchange",
]  # fmt: skip
SHAPES = ["method", "model.arch", "model.stem", "model.head_hidden_dims", "model.embedding_dim", "moco.queue_size"]
NOT_COMPARED = ["run.dir", "run.resume", "run.stop_at_step", "tracking.*", "log.*", "checkpoint.*"]
PER_HOST = [
    "data.root", "data.num_workers", "data.cache_dir", "data.cache_bytes", "run.dir", "run.device", "run.resume",
]  # fmt: skip
STEP = [
    "method", "data.image_size", "augment.*", "model.arch", "model.stem", "model.head_hidden_dims",
    "model.embedding_dim", "model.bn_group_size", "moco.queue_size", "moco.symmetric", "optim.optimizer",
    "optim.grad_accum_steps", "optim.precision", "engine.*",
]  # fmt: skip
LOADER = ["data.loader", "data.root", "data.image_size", "data.dali.*", "augment.crop_scale", "shuffle.*"]
EVALUATION = [
    "run_dir", "encoders", "device", "tracking", "data.root", "data.num_workers", "data.prefetch_batches",
    "data.cache_*", "data.dali.*", "data.batch_size",
]  # fmt: skip
DETECTION = ["run_dir", "weights", "device", "tracking", "data.root", "data.num_workers"]


def those(schema, test):
    return {name for name, setting in declarations(schema).items() if test(setting)}


def matching(schema, patterns):
    names = declarations(schema)
    assert all(any(fnmatch(name, pattern) for name in names) for pattern in patterns)
    return {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)}


@pytest.mark.parametrize(
    ("schema", "test", "patterns"),
    [
        (PretrainConfig, lambda setting: setting["changes"] not in COMPUTED, MAY_CHANGE),
        (PretrainConfig, lambda setting: setting["changes"] == "shapes", SHAPES),
        (PretrainConfig, lambda setting: setting["changes"] == "record", NOT_COMPARED),
        (PretrainConfig, lambda setting: setting["per_host"], PER_HOST),
        (PretrainConfig, lambda setting: "step" in setting["times"], STEP),
        (PretrainConfig, lambda setting: "loader" in setting["times"], LOADER),
        (KnnConfig, lambda setting: setting["changes"] not in COMPUTED, EVALUATION),
        (LinearConfig, lambda setting: setting["changes"] not in COMPUTED, EVALUATION),
        (FinetuneConfig, lambda setting: setting["changes"] not in COMPUTED, EVALUATION),
        (DetectConfig, lambda setting: setting["changes"] not in COMPUTED, DETECTION),
    ],
)
def test_lists_that_follow_from_the_declarations(schema, test, patterns):
    assert those(schema, test) == matching(schema, patterns)


def test_what_is_computed_is_told_in_sections():
    linear = LinearConfig(run_dir=Path("r"))
    data = {"root", "num_workers", "prefetch_batches", "cache_dir", "cache_bytes", "dali", "batch_size"}
    free = {"run_dir": True, "encoders": True, "device": True, "tracking": True, "data": data}
    assert what_is_computed(linear) == linear.model_dump(mode="json", exclude=free)
    detect = read_config(DetectConfig, None, ["--run-dir", "r", "--data.root", "d"])
    assert "test_sets" in what_is_computed(detect)["data"]
    assert "test_sets" not in what_is_computed(detect, without=["data.test_sets"])["data"]


def test_ranks_agree_on_all_but_what_hosts_may_have_of_their_own():
    config = read_config(PretrainConfig, None, ["--run.dir", "r", "--data.root", "d"])
    facts = facts_to_agree_on(config, ImageFolder(Path("d"), Names.of(["a.jpg"]), [0], ["class"]))
    assert flatten(config).keys() - facts.keys() == set(PER_HOST)
    assert settings_of(config).keys() == matching(PretrainConfig, [*STEP, *LOADER])


def test_a_setting_of_which_nobody_says_what_it_changes_is_refused_at_its_declaration():
    with pytest.raises(TypeError, match="changes"):
        setting(1, "a number")
    with pytest.raises(TypeError, match="Sizes.height: setting"):

        class Sizes(Section):
            height: int = 1

    with pytest.raises(TypeError, match="Words.word: setting"):

        class Words(Section):
            word: str = setting("a", "a word", changes="colour")
