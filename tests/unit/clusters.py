"""Features whose classes can be told apart, though not without errors."""

import torch

CLASSES = 5


def clusters(num, dim, seed):
    """Features around one centre a class, overlapping, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, CLASSES, (num,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(num, dim, generator=generator), labels
