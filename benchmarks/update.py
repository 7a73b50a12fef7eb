"""Momentum update and optimiser of a ResNet-50 encoder, against the time their bytes take.

    python -m benchmarks.update [--repeats 9] [--arch resnet50] [--quick]

The floor is bytes / bandwidth: 12 bytes a float32 parameter for the momentum update, 20 for SGD with momentum, and the
bandwidth of `y += x` on large arrays, measured in the same run. Beside them the usual ways: two multi-tensor passes for
the momentum update, torch's SGD without `fused`. Seconds are medians, in turn. Half a minute on two cores.
"""

import argparse
import copy
from typing import Any, cast

import torch

from benchmarks import results
from benchmarks.timing import bytes_per_second, in_turn
from moco_dist.config.architectures import ARCHITECTURES
from moco_dist.config.pretrain import ModelConfig, OptimConfig
from moco_dist.engine.optimizer import LARS, build_optimizer
from moco_dist.method.encoder import build_encoder
from moco_dist.method.moco import momentum_update


def measure(arch: str, repeats: int, device: str, compiled: bool) -> list[dict[str, Any]]:
    """A row for each way."""
    query = build_encoder(ModelConfig.model_validate({"arch": arch}), 0).to(device)
    key = copy.deepcopy(query).requires_grad_(False)
    parameters, key_parameters = list(query.parameters()), list(key.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)

    @torch.no_grad()
    def two_passes() -> None:
        torch._foreach_mul_(key_parameters, 0.999)
        torch._foreach_add_(key_parameters, parameters, alpha=0.001)

    sgd = build_optimizer(query, OptimConfig())
    lars = build_optimizer(query, OptimConfig(optimizer="lars"))
    by_default = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4)
    compiled_lars = cast(LARS, build_optimizer(query, OptimConfig(optimizer="lars")))
    compiled_lars.compile()  # as `engine.compile: step` does
    for optimizer in (sgd, lars, compiled_lars):
        optimizer.param_groups[0]["lr"] = 1e-6
    ways = {
        "momentum update": (lambda: momentum_update(query, key, 0.999), 12),
        "momentum update in two passes": (two_passes, 12),
        "SGD": (sgd.step, 20),
        "SGD by torch's defaults": (by_default.step, 20),
        "LARS": (lars.step, 20),
        "LARS, compiled": (compiled_lars.step, 20),
    }
    if not compiled:  # takes longest
        del ways["LARS, compiled"]
    seconds = in_turn({name: way for name, (way, _) in ways.items()}, repeats, device)
    count, bandwidth = sum(p.numel() for p in parameters), bytes_per_second(device)
    return [
        {"what": name, "seconds": seconds[name], "bytes": size * count, "floor_seconds": size * count / bandwidth,
         "bandwidth_bytes_per_second": bandwidth}
        for name, (_, size) in ways.items()
    ]  # fmt: skip


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="resnet50")
    args = results.parse(parser, arch="resnet10", repeats=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = measure(args.arch, args.repeats, device, compiled=not args.quick)
    for row in rows:
        print(f"{row['what']}: {1e3 * row['seconds']:.2f} ms, floor {1e3 * row['floor_seconds']:.2f} ms")
    results.write("update", rows, device, arch=args.arch, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
