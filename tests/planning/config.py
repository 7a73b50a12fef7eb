"""A small pre-training, to be planned."""

from moco_dist.config.pretrain import PretrainConfig


def config_of(**sections):
    return PretrainConfig.model_validate({
        "run": {"dir": "r", "device": "cpu"}, "data": {"root": "d", "image_size": 32},
        "model": {"arch": "resnet10", "head_hidden_dims": [64], "bn_group_size": 8},
        "moco": {"queue_size": 512}, "optim": {"global_batch_size": 64}, **sections,
    })  # fmt: skip
