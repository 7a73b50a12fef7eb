"""What follows from the sizes alone: parameters, memory, bytes on the network, decodes. Nothing here is a time."""

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moco_dist.config.pretrain import PretrainConfig
from moco_dist.data.traffic import KeyTraffic, key_traffic
from moco_dist.method.encoder import Encoder

FLOAT_BYTES = 4
DDP_FIRST_BUCKET_BYTES, DDP_BUCKET_BYTES = 2**20, 25 * 2**20  # torch's DistributedDataParallel


@dataclass(frozen=True)
class Sizes:
    """What one rank of `world_size` has, with `local_world_size` of them on a host.

    Attributes:
        parameters: of one encoder.
        activation_bytes: saved for the backward pass of one micro-batch.
        local_batch: samples of a rank in a step.
    """

    config: PretrainConfig
    world_size: int
    local_world_size: int
    parameters: int
    activation_bytes: int
    local_batch: int

    def memory(self) -> dict[str, int]:
        """Bytes of a rank by part, without those of temporary buffers and of the CUDA context."""
        c, floats = self.config, self.parameters * FLOAT_BYTES
        stage = c.engine.zero_stage
        size = c.data.image_size
        pixels = 2 * self.local_batch * 3 * size * size
        return {
            "query encoder's weights": floats,
            "key encoder's weights": (c.of_method.num_encoders - 1) * floats,
            "gradients": floats // (self.world_size if stage >= 2 else 1),
            "optimiser's momentum": c.optim.state_numbers * floats // (self.world_size if stage >= 1 else 1),
            "queue shard": -(-c.of_method.queue_keys // self.world_size) * self.key_bytes,
            "crops (uint8) and views": pixels * (1 + dtype_of(c).itemsize),
            "activations kept for backward": self.activation_bytes,
        }

    def received(self) -> dict[str, int]:
        """Bytes that a rank receives in a step, without headers; all-reduce as a ring."""
        others, n, w = self.world_size - 1, self.local_batch, self.world_size
        c = self.config
        features = others * c.of_method.received_numbers(n, c.model.embedding_dim) * FLOAT_BYTES
        return {
            "gradients": 2 * others * self.parameters * FLOAT_BYTES // w,
            "features": features,
            "images": self.keys.received_bytes,
        }

    def into_host(self) -> dict[str, int]:
        """Bytes that come over a host's link in a step: a ring crosses it once, an all-to-all for each of its ranks."""
        hosts = self.world_size // self.local_world_size
        received = self.received()
        if hosts == 1:
            return dict.fromkeys(received, 0)
        return {**received, "images": self.keys.into_host_bytes}

    @property
    def keys(self) -> KeyTraffic:
        """Decodes and bytes of key views."""
        return key_traffic(self.config, self.local_batch, self.world_size, self.local_world_size)

    @property
    def key_bytes(self) -> int:
        """Bytes of one embedding."""
        return self.config.model.embedding_dim * FLOAT_BYTES

    @property
    def last_bucket_share(self) -> float:
        """Share of the gradients whose all-reduce can begin only when the backward pass has ended."""
        total = self.parameters * FLOAT_BYTES
        rest = (total - DDP_FIRST_BUCKET_BYTES) % DDP_BUCKET_BYTES
        return min(1.0, rest / total) if total > DDP_FIRST_BUCKET_BYTES else 1.0

    @property
    def decodes(self) -> float:
        """Files that a rank decodes in a step."""
        return self.local_batch * self.keys.decodes


def sizes(config: PretrainConfig, world_size: int, local_world_size: int) -> Sizes:
    """Count by building the encoder and running it forward on tensors that have a shape and no memory."""
    local_batch = config.optim.global_batch_size // world_size
    with FakeTensorMode():
        encoder = Encoder(config.model, config.data.image_size)
        micro_batch = local_batch // config.optim.grad_accum_steps * config.of_method.num_directions
        side = config.data.image_size
        images = torch.zeros(micro_batch, 3, side, side).contiguous(memory_format=torch.channels_last)
        activations = saved_bytes(encoder, images, dtype_of(config))
    return Sizes(
        config, world_size, local_world_size,
        parameters=sum(p.numel() for p in encoder.parameters()),
        activation_bytes=activations, local_batch=local_batch,
    )  # fmt: skip


def saved_bytes(encoder: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, the weights left out.

    Each memory is counted once, whatever views of it are kept.
    """
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {p.untyped_storage()._cdata for p in encoder.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    is_autocast = dtype in (torch.bfloat16, torch.float16)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(images.device.type, dtype, enabled=is_autocast),
    ):
        encoder(images)
    return sum(storage.nbytes() for storage in kept.values())


def dtype_of(config: PretrainConfig) -> torch.dtype:
    """The dtype that the encoders compute in; `auto` is bf16, as on the GPUs of a cluster, and fp32 on a CPU."""
    precision, is_cpu = config.optim.precision, config.run.device == "cpu"
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
             "auto": torch.float32 if is_cpu else torch.bfloat16}  # fmt: skip
    return names[precision]
