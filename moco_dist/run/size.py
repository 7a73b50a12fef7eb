"""How large a checkpoint is, before there is one; for the usual networks without torch, so that `doctor` is quick."""

import itertools

from moco_dist.config.architectures import ARCHITECTURES
from moco_dist.config.pretrain import ModelConfig, PretrainConfig

FLOAT_BYTES = 4
EXPANSION = {"BasicBlock": 1, "Bottleneck": 4}  # channels that leave a block of torchvision, for each of its planes


def checkpoint_bytes(config: PretrainConfig, world_size: int) -> int:
    """A checkpoint's tensors: encoders, momentum, queue if there is one; their statistics, by rank and averaged."""
    method = config.of_method
    # A line of ARCHITECTURES that says more than this, such as a width, is counted by building the network.
    is_counted = {"block", "layers"} == set(ARCHITECTURES.get(config.model.arch, ()))
    parameters, statistics = _of_resnet(config.model) if is_counted else _of_built(config)
    queue = method.queue_keys * config.model.embedding_dim
    weights = (method.num_encoders + config.optim.state_numbers) * parameters
    return (weights + method.num_encoders * (world_size + 1) * statistics + queue) * FLOAT_BYTES


def _of_resnet(model: ModelConfig) -> tuple[int, int]:
    """Parameters, and BatchNorms' running statistics, of an encoder whose backbone is a ResNet of ARCHITECTURES."""
    arguments = ARCHITECTURES[model.arch]
    expansion = EXPANSION[arguments["block"]]
    convolutions = [(3, 64, 3 if model.stem == "cifar" else 7)]  # channels in, channels out, side of the kernel
    into = 64
    for stage, blocks in enumerate(arguments["layers"]):
        planes = 64 * 2**stage
        out = planes * expansion
        for block in range(blocks):
            path = [(into, planes, 1), (planes, planes, 3), (planes, out, 1)]
            convolutions += path if expansion > 1 else [(into, planes, 3), (planes, planes, 3)]
            if block == 0 and (stage > 0 or into != out):
                convolutions.append((into, out, 1))  # the shortcut, where size or channels change
            into = out
    channels = sum(out for _, out, _ in convolutions)  # each has a BatchNorm: two weights, two statistics a channel
    head = itertools.pairwise([into, *model.head_hidden_dims, model.embedding_dim])
    parameters = sum(fan_in * out * side**2 for fan_in, out, side in convolutions) + 2 * channels
    return parameters + sum((fan_in + 1) * fan_out for fan_in, fan_out in head), 2 * channels


def _of_built(config: PretrainConfig) -> tuple[int, int]:
    """The same of any encoder: it is built of tensors that have a shape and no memory."""
    import torch

    from moco_dist.method.encoder import Encoder

    with torch.device("meta"):
        encoder = Encoder(config.model, config.data.image_size)
    parameters = sum(p.numel() for p in encoder.parameters())
    return parameters, sum(b.numel() for b in encoder.buffers() if b.is_floating_point())
