"""What every loader yields: the contract between decoding (host) and colours (device)."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class CropBatch:
    """This rank's share of one step: cropped, flipped, not yet coloured.

    Attributes:
        view_q: uint8 (n, 3, S, S), RGB, channels-last, on the CPU, or on the GPU where the loader decodes there.
        view_k: uint8 (m, 3, S, S), the key views that this rank makes; m is n unless crops travel within hosts and not
            between them. Row i is of another sample than row i of view_q. `KeyExchange` makes of them the n that this
            rank encodes, in the order of `Plan.key_indices`.
        samples_q, samples_k: int64 (n,) and (m,), indices into the data set, of the rows of view_q and view_k.
        colours_q, colours_k: float32 (n, P), photometric parameters (`colours.COLOUR_COLUMNS`) of the views as they
            will be coloured: keys after they have travelled, with `all_gather` before.
        key_order: int64 (B,), `Plan.key_permutation` of the step.
        replaced: files that could not be read, with the reason; their successors took their places.
    """

    view_q: Tensor
    view_k: Tensor
    samples_q: Tensor
    samples_k: Tensor
    colours_q: Tensor
    colours_k: Tensor
    key_order: Tensor
    replaced: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "CropBatch":
        """The batch on `device`; from pinned memory, without waiting for the copy."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "CropBatch":
        """The batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the batch's memory until what `stream` has been given so far is done, whoever drops the batch."""
        self._map(lambda x: x.record_stream(stream))

    def _map(self, function) -> "CropBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "replaced"}
        return replace(self, **{name: function(x) for name, x in tensors.items()})


def to_device(array: NDArray[np.int64 | np.bool_], device: str | torch.device) -> Tensor:
    """A small array as a tensor on `device`. The host does not wait, as it would for a copy from pageable memory."""
    tensor = torch.from_numpy(array)
    return tensor if torch.device(device).type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
