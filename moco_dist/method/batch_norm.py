"""BatchNorm over groups of `group_size` samples, whatever the number of GPUs (the design's idea II).

The paper normalises over the 32 samples of each of 8 GPUs. Here a rank holds one or more such groups, so 1, 8 or
64 ranks compute the same losses. Running statistics are the mean over all groups of the global batch: locally
over this rank's groups and micro-batches, and over ranks when they are needed (`running_statistics`).

Two ways to the same numbers. In eager mode each group goes through PyTorch's own kernel and the results are put
together: groups are slices along N and so need no copy going in, but putting together is one going out and one in
the backward pass, 4 tensors read or written beside the 8 of BatchNorm. One expression over all groups would be
several times slower there. Under torch.compile it is the other way about: the expression becomes the same two
fused passes for any number of groups, without those copies.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from moco_dist.errors import UserError


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of consecutive groups of samples.

    State-dict keys are those of `nn.BatchNorm2d`. With one group a call, as much work as `nn.BatchNorm2d`.

    Attributes:
        group_size: samples a group.
        update_weight: this call's share of the step's statistics: 1 / micro-batches of the step.
        is_first: whether this is the first micro-batch of the step (the one that decays the running statistics).
        then: names of submodules that what is normalised goes through, as in timm's fused BatchNorm and activation.
    """

    def __init__(self, num_features: int, group_size: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.group_size = group_size
        self.update_weight = 1.0
        self.is_first = True
        self.then: tuple[str, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W), or any other shape that begins with (N, C), to the same; N is whole groups in training.

        Raises:
            ValueError: N is not a multiple of group_size.
            UserError: a group is one value, which has no variance.
        """
        output = self._normalised(input)
        for name in self.then:
            output = self.get_submodule(name)(output)
        return output

    def _normalised(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if input.shape[0] % self.group_size:
            raise ValueError(f"{input.shape[0]} samples are not whole BN groups of {self.group_size}")
        if self.group_size == 1 and input.shape[2:].numel() == 1:
            raise UserError(
                "images end as 1 x 1 in BN groups of 1 sample (model.bn_group_size), one value a group, which has no "
                "variance: larger images (data.image_size), or groups of 2 or more"
            )
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        num_groups = input.shape[0] // self.group_size
        if num_groups == 1 and self.update_weight == 1.0:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
            )
        normalise = self._in_one_expression if torch.compiler.is_compiling() else self._group_by_group
        output, mean, var = normalise(input, num_groups)
        with torch.no_grad():
            for running, batch in ((self.running_mean, mean), (self.running_var, var)):
                if self.is_first:
                    running.mul_(1 - self.momentum)
                running.add_(batch.mean(0), alpha=self.momentum * self.update_weight)
        return output

    def _group_by_group(self, input: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised `input`, and each group's mean and unbiased variance (num_groups, C)."""
        # With momentum 1 F.batch_norm overwrites these buffers by the group's mean and unbiased variance.
        mean = self.weight.new_zeros(num_groups, self.num_features)
        var = torch.zeros_like(mean)
        groups = [
            F.batch_norm(group, mean[g], var[g], self.weight, self.bias, True, 1.0, self.eps)
            for g, group in enumerate(input.split(self.group_size))
        ]
        return groups[0] if num_groups == 1 else torch.cat(groups), mean, var

    def _in_one_expression(self, input: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a compiler to fuse. Arithmetic in the weights' dtype, as BatchNorm's kernels do."""
        x = input.view(num_groups, self.group_size, *input.shape[1:]).to(self.weight.dtype)
        shape = (-1, *[1] * (input.ndim - 2))
        var, mean = torch.var_mean(x, dim=(1, *range(3, x.ndim)), keepdim=True, correction=0)
        scale = torch.rsqrt(var + self.eps) * self.weight.view(shape)
        output = ((x - mean) * scale + self.bias.view(shape)).to(input.dtype).view(input.shape)
        count = self.group_size * input.shape[2:].numel()
        unbiased = var.detach().view(num_groups, -1) * (count / (count - 1))
        return output, mean.detach().view(num_groups, -1), unbiased


def grouped(norm: _BatchNorm, group_size: int, called: str) -> GroupedBatchNorm2d:
    """A BatchNorm over groups with the parameters, buffers and settings of another one, of whatever class.

    Args:
        norm: torch's own, for any number of dimensions or ranks, or timm's with dropout and activation in it.
        group_size: samples a group.
        called: the network and the place, for messages.

    Raises:
        UserError: it does something else than those, or has no weights, running statistics or momentum.
    """
    then = tuple(name for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module))
    is_torchs = type(norm).__module__.startswith("torch.")
    if not is_torchs and not (then and type(norm).__module__.startswith("timm.")):
        raise UserError(f"{called} is a {type(norm).__name__}, a BatchNorm of which it is not known what else it does")
    if norm.weight is None or norm.running_mean is None or norm.momentum is None:
        raise UserError(f"{called} is a BatchNorm without weights, running statistics or momentum, which has no groups")
    new = GroupedBatchNorm2d(norm.num_features, group_size, norm.eps, norm.momentum)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var, new.num_batches_tracked = (
        norm.running_mean, norm.running_var, norm.num_batches_tracked
    )  # fmt: skip
    new.then = then
    for name in then:
        new.add_module(name, norm.get_submodule(name))
    return new


def set_micro_batch(encoder: nn.Module, index: int, count: int) -> None:
    """Tell the encoder's BatchNorms that the next training forward is micro-batch `index` of `count` of a step."""
    for module in encoder.modules():
        if isinstance(module, GroupedBatchNorm2d):
            module.update_weight, module.is_first = 1 / count, index == 0


def running_statistics(encoder: nn.Module) -> dict[str, Tensor]:
    """The encoder's floating-point buffers by name: running means and variances, over this rank's groups.

    Buffers that are in no state dict are constants of the network and left out.
    """
    kept = encoder.state_dict().keys()
    return {name: buffer for name, buffer in encoder.named_buffers() if buffer.is_floating_point() and name in kept}
