"""`model.init`: a pre-training begins with exactly the weights of a file, on every rank, by every engine."""

import pytest
import torch

from moco_dist.config.pretrain import ModelConfig
from moco_dist.data.plan import Plan
from moco_dist.distributed.collectives import process_group
from moco_dist.errors import UserError
from moco_dist.method.backbone import build_resnet
from moco_dist.method.build import build_method
from moco_dist.method.encoder import build_encoder
from moco_dist.run.start import begin_with_weights
from moco_dist.run.weights import import_backbone, load_trained
from tests.distributed.program import NUM_SAMPLES, images, small_config, views_at
from tests.world import run


@pytest.fixture
def release(tmp_path):
    """A file as the original release leaves it, after a training that has moved everything, and its backbone."""
    torch.manual_seed(8)
    query, key = ({k: torch.rand_like(v.float()).to(v.dtype) for k, v in build_resnet("resnet10").state_dict().items()
                   if not k.startswith("fc.")} for _ in range(2))  # fmt: skip
    head = {"fc.0.weight": torch.rand(4, 512), "fc.0.bias": torch.rand(4), "fc.2.weight": torch.rand(2, 4)}
    state = {f"module.encoder_q.{name}": value for name, value in (query | head).items()}
    state |= {f"module.encoder_k.{name}": value for name, value in (key | head).items()}
    state |= {"module.queue": torch.rand(2, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    path = tmp_path / "moco_v2_200ep_pretrain.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet10", "state_dict": state, "optimizer": {"lr": 0.03}}, path)
    return path, {name: value for name, value in query.items() if "num_batches" not in name}


def begin(world, path, method="moco", kind="ddp", arch="resnet10", then_a_step=False):
    """Every encoder's state before and after, and what is said; only rank 0 can see the file."""
    config = small_config(
        model={"arch": arch, "init": path if world.is_main else path.with_name("not here")},
        optim={"precision": "fp32"},
        engine={"kind": kind, "zero_stage": int(kind == "deepspeed")},
    ).model_copy(update={"method": method})
    with process_group(world, alone_too=kind == "deepspeed"):
        built = build_method(config, world)
        drawn = states(built)
        said = begin_with_weights(built, config, world)
        if then_a_step:
            views = views_at(images(torch.float32), Plan(NUM_SAMPLES, 64, 3), 0, world)
            built.train_step(views, 0.0, False)
        return drawn, states(built), said


def states(method):
    return {name: {key: value.clone() for key, value in encoder.state_dict().items()}
            for name, encoder in method.encoders.items()}  # fmt: skip


@pytest.mark.parametrize(("world_size", "method"), [(1, "simclr"), (2, "moco")])
def test_all_encoders_begin_with_exactly_these_weights(release, world_size, method):
    path, expected = release
    outcomes = run(begin, world_size, path, method)
    for drawn, state, said in outcomes:
        assert set(state) == ({"query_encoder", "key_encoder"} if method == "moco" else {"query_encoder"})
        for name, encoder in state.items():
            for key, value in expected.items():
                assert torch.equal(encoder[f"backbone.{key}"], value), (name, key)
            heads = {key for key in encoder if key.startswith("head.")}
            assert heads
            assert all(torch.equal(encoder[key], drawn[name][key]) for key in heads)
            assert len(encoder) == len(heads) + len(expected) + sum("num_batches" in key for key in encoder)
        assert len(said) == 1
    assert outcomes[0][2] == [
        f"begins with the weights of {path}: all {len(expected)} tensors of the backbone were there and fit; left out: "
        "module.encoder_k, module.encoder_q.fc, module.queue, module.queue_ptr; the head is drawn by the seed"
    ]


@pytest.mark.slow
def test_zero_s_own_copy_of_the_weights_is_of_the_file_too(release):
    """A step of learning rate 0 writes back what the engine steps from: the weights of the file."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    path, expected = release
    for _, state, _ in run(begin, 2, path, "moco", "deepspeed", "resnet10", True):
        for key, value in expected.items():
            if "running" not in key:
                assert torch.equal(state["query_encoder"][f"backbone.{key}"], value), key


def test_a_mistake_is_one_of_all_ranks(release):
    path, _ = release
    with pytest.raises(UserError, match=r"model\.init .* holds no resnet18: .*; with --model\.arch resnet10 it fits"):
        run(begin, 2, path, "moco", "ddp", "resnet18")


def imported(world, run_dir):
    encoder = build_encoder(ModelConfig(arch="resnet10"), 1)
    assert load_trained(encoder, run_dir if world.is_main else run_dir / "not here", world) == 0
    return {name: value.clone() for name, value in encoder.backbone.state_dict().items()}


def test_an_imported_backbone_is_read_by_one_rank(release, tmp_path):
    path, expected = release
    import_backbone(path, "resnet10", tmp_path / "data", tmp_path / "run")
    for state in run(imported, 2, tmp_path / "run"):
        assert all(torch.equal(state[name], value) for name, value in expected.items())
