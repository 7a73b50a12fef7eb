"""The key encoder: a moving average of the query encoder (v1 eq. 2)."""

import copy

import torch
from torch import nn


def key_encoder_of(query_encoder: nn.Module) -> nn.Module:
    """A copy with equal weights, no gradients, and its own BatchNorm statistics (always in training mode)."""
    key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
    return key_encoder.train()


@torch.no_grad()
def momentum_update(query_encoder: nn.Module, key_encoder: nn.Module, momentum: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q, on parameters (v1 eq. 2). BatchNorm buffers are the key encoder's own.

    Reads both sets of weights and writes one: 12 bytes a float32 parameter.
    """
    torch._foreach_lerp_(list(key_encoder.parameters()), list(query_encoder.parameters()), 1 - momentum)
