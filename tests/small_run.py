"""A run's folder with a checkpoint that no training has made."""

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.config.source import to_yaml
from moco_dist.distributed.world import World
from moco_dist.method.build import build_method
from tests.distributed.program import saver_for


def config_of(run_dir, arch="resnet18", **model):
    return PretrainConfig.model_validate({
        "run": {"dir": run_dir}, "data": {"root": "unused"}, "moco": {"queue_size": 256},
        "model": {"arch": arch, "head_hidden_dims": [], "embedding_dim": 8, **model},
    })  # fmt: skip


def draw_statistics(network):
    """Statistics that a fresh network does not have; with larger means its ReLUs would let nothing through."""
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


def make_run(run_dir, **model):
    config = config_of(run_dir, **model)
    method = build_method(config, World())
    draw_statistics(method.query_encoder)
    method.step = 7
    saver = saver_for(run_dir, World(), print, keep_last=1, keep_every_steps=0)
    saver.save(method, [])
    saver.finish()
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return method.query_encoder.eval()
