"""Networks as a user may bring them, for `model.arch module:tests.own_network:NAME`."""

import torch
import torch.nn.functional as F
from torch import nn


def build():
    """BatchNorm of maps and of vectors."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8, momentum=0.2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 24, bias=False), nn.BatchNorm1d(24),
    )  # fmt: skip


class Broken(nn.Module):
    """Features (N, 3) of the mean colour, with something that no step can be made with."""

    def __init__(self, problem):
        super().__init__()
        self.problem, self.calls = problem, 0
        self.layer, self.unused = nn.Linear(3, 3), nn.Linear(1, 1) if problem == "unused" else None
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images):
        features = self.layer(images.mean(dim=(2, 3)))
        if self.problem == "counts":
            self.calls += 1
        elif self.problem == "remembers":
            self.seen += 1
        elif self.problem == "random":
            features = F.dropout(features, 0.1, self.training)
        elif self.problem == "maps":
            return images
        return features


def counts():
    return Broken("counts")


def remembers():
    return Broken("remembers")


def random():
    return Broken("random")


def maps():
    return Broken("maps")


def unused():
    return Broken("unused")


class OwnNorm(nn.BatchNorm2d):
    """Does more than a BatchNorm."""

    def forward(self, input):
        return super().forward(input) + 1


def own_norm():
    return nn.Sequential(OwnNorm(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def no_network():
    return 3
