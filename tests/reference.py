"""Algorithm 1 of MoCo (arXiv 1911.05722) in plain float64 PyTorch on one process: what the program is compared with.

No code of `moco_dist.method`, `engine` or `train` is used: torchvision's ResNet with nn.BatchNorm2d run group by
group, all N x (1 + K) logits, cross_entropy, a ring buffer filled row by row.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


def rate_of_epoch(epoch, *, lr, epochs, milestones=None):
    """The learning rate of a whole epoch, as published: a tenth at each of v1's milestones, or v2's cosine."""
    if milestones is None:
        return lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    for milestone in milestones:
        if epoch >= milestone:
            lr = lr / 10
    return lr


def plain_encoder(hidden, dim, weights):
    """Torchvision's ResNet of one basic block a stage and a head, in float64, with the given parameters."""
    backbone = ResNet(BasicBlock, [1, 1, 1, 1])
    backbone.fc = nn.Identity()
    if hidden is None:
        head = nn.Sequential(nn.Linear(512, dim))
    else:
        head = nn.Sequential(nn.Linear(512, hidden), nn.ReLU(), nn.Linear(hidden, dim))
    model = nn.Sequential()
    model.add_module("backbone", backbone)
    model.add_module("head", head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # buffers become the plain mean over the calls since the last reset
    model.double().train()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not set(missing) & dict(model.named_parameters()).keys()
    return model


def encode(model, images, group):
    """Unit vectors (N, C), the BatchNorm groups one by one."""
    return torch.cat([F.normalize(model(part), dim=1) for part in images.split(group)])


class Reference:
    """One process that sees the whole global batch. `hidden` None: v1's linear head; else v2's MLP."""

    def __init__(self, weights, queue, *, hidden, dim, group, momentum, temperature, sgd_momentum, weight_decay):
        self.f_q, self.f_k = plain_encoder(hidden, dim, weights), plain_encoder(hidden, dim, weights)
        self.queue, self.ptr = queue.clone(), 0
        self.group, self.momentum, self.temperature = group, momentum, temperature
        self.sgd = torch.optim.SGD(
            self.f_q.parameters(), lr=0.0, momentum=sgd_momentum, weight_decay=weight_decay, foreach=False
        )
        self.running = {"q": self._statistics(self.f_q), "k": self._statistics(self.f_k)}

    @staticmethod
    def _statistics(model):
        return {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}

    def _encode(self, model, images, running):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        out = encode(model, images, self.group)
        for name, batch_mean in self._statistics(model).items():
            running[name] = 0.9 * running[name] + 0.1 * batch_mean
        return out

    def fill(self, batches):
        """The keys of `batches` of (x_k, shuffle) by the initial weights, in the place of the queue's random ones."""
        for x_k, shuffle in batches:
            with torch.no_grad():
                shuffled = encode(self.f_k, x_k[shuffle], self.group)
            for i in range(len(shuffle)):
                self.queue[self.ptr] = shuffled[shuffle.tolist().index(i)]
                self.ptr = (self.ptr + 1) % len(self.queue)

    def step(self, x_q, x_k, shuffle, lr):
        """One step on the global batch; returns the loss and the gradients by name."""
        self.sgd.param_groups[0]["lr"] = lr
        with torch.no_grad():
            for p_q, p_k in zip(self.f_q.parameters(), self.f_k.parameters(), strict=True):
                p_k.copy_(self.momentum * p_k + (1 - self.momentum) * p_q)
            shuffled = self._encode(self.f_k, x_k[shuffle], self.running["k"])
            k = torch.stack([shuffled[shuffle.tolist().index(i)] for i in range(len(shuffle))])
        q = self._encode(self.f_q, x_q, self.running["q"])
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.T], dim=1) / self.temperature
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))
        self.sgd.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.f_q.named_parameters()}
        self.sgd.step()
        for key in k:
            self.queue[self.ptr] = key
            self.ptr = (self.ptr + 1) % len(self.queue)
        return loss.item(), gradients
