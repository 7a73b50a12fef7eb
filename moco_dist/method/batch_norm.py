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


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics in training are those of consecutive groups of samples.

    State-dict keys are those of `nn.BatchNorm2d`. With one group a call, as much work as `nn.BatchNorm2d`.

    Attributes:
        group_size: samples a group.
        update_weight: this call's share of the step's statistics: 1 / micro-batches of the step.
        is_first: whether this is the first micro-batch of the step (the one that decays the running statistics).
    """

    def __init__(self, num_features: int, group_size: int) -> None:
        super().__init__(num_features)
        self.group_size = group_size
        self.update_weight = 1.0
        self.is_first = True

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same; N is a whole number of groups in training.

        Raises:
            ValueError: N is not a multiple of group_size.
        """
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if input.shape[0] % self.group_size:
            raise ValueError(f"{input.shape[0]} samples are not whole BN groups of {self.group_size}")
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
        var, mean = torch.var_mean(x, dim=(1, 3, 4), keepdim=True, correction=0)
        scale = torch.rsqrt(var + self.eps) * self.weight[:, None, None]
        output = ((x - mean) * scale + self.bias[:, None, None]).to(input.dtype).view(input.shape)
        count = self.group_size * input.shape[2] * input.shape[3]
        unbiased = var.detach().view(num_groups, -1) * (count / (count - 1))
        return output, mean.detach().view(num_groups, -1), unbiased


def set_micro_batch(encoder: nn.Module, index: int, count: int) -> None:
    """Tell the encoder's BatchNorms that the next training forward is micro-batch `index` of `count` of a step."""
    for module in encoder.modules():
        if isinstance(module, GroupedBatchNorm2d):
            module.update_weight, module.is_first = 1 / count, index == 0


def running_statistics(encoder: nn.Module) -> dict[str, Tensor]:
    """The encoder's floating-point buffers by name: running means and variances, over this rank's groups."""
    return {name: buffer for name, buffer in encoder.named_buffers() if buffer.is_floating_point()}
