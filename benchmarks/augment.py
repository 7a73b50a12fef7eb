"""The colours of a batch of views: this program's module, torchvision's image by image, and kornia's batched ones.

    python -m benchmarks.augment [--views 64 --size 224 --repeats 7] [--quick]      # kornia: pip install kornia

All get the same parameters, drawn once from the v2 recipe. On a CPU one thread each; on a GPU the bytes that have to
move (uint8 in, bf16 out) over the time give the share of the memory's rate. They run in turn; medians are kept.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from benchmarks import results
from moco_dist.config.pretrain import AugmentConfig
from moco_dist.data import counter_rng
from moco_dist.data.colours import apply_colours, draw_colours

CONFIG = AugmentConfig()
KERNEL = 13  # torchvision's and kornia's blur: ours reaches as far, 3 sigma of the largest


def ours(views: Tensor, colours: Tensor) -> Tensor:
    """The batch through `moco_dist.data.colours`."""
    return apply_colours(views, colours, CONFIG)


def torchvision_each(views: Tensor, colours: Tensor) -> Tensor:
    """One image after the other, only the operations that it drew, on float images."""
    jitter = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    out = []
    for view, row in zip(views, colours.tolist(), strict=True):
        x = tv.to_dtype(view, torch.float32, scale=True)
        if row[:4] != [1.0, 1.0, 1.0, 0.0]:
            for operation in map(int, row[4:8]):
                x = jitter[operation](x, row[operation])
        if row[8]:
            x = tv.rgb_to_grayscale(x, 3)
        if row[9]:
            x = tv.gaussian_blur(x, [KERNEL, KERNEL], [row[9], row[9]])
        out.append(tv.normalize(x, list(CONFIG.mean), list(CONFIG.std)))
    return torch.stack(out)


def kornia_batch(views: Tensor, colours: Tensor) -> Tensor:
    """Batched functions with a factor a sample. kornia has one order a batch, so this is its default one."""
    from kornia import enhance, filters

    x = views.float() / 255
    gray = (x * x.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    x = enhance.adjust_brightness_accumulative(x, colours[:, 0])
    x = enhance.adjust_contrast_with_mean_subtraction(x, colours[:, 1])
    x = enhance.adjust_saturation_with_gray_subtraction(x, colours[:, 2])
    x = enhance.adjust_hue(x, 2 * torch.pi * colours[:, 3])
    x = torch.where(colours[:, 8, None, None, None] > 0, gray, x)
    sigma = colours[:, 9, None].clamp_min(1e-3).expand(-1, 2)
    x = filters.gaussian_blur2d(x, (KERNEL, KERNEL), sigma)
    return enhance.normalize(x, torch.tensor(CONFIG.mean, device=x.device), torch.tensor(CONFIG.std, device=x.device))


def seconds(function: Callable[[], Tensor], device: str) -> float:
    """Processor time of this thread's process on a CPU, wall-clock on a GPU."""
    if device == "cpu":
        started = time.process_time()
        function()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    args = results.parse(parser, views=4, size=32, repeats=1)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shape = (args.views, 3, args.size, args.size)
    views = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    views = views.contiguous(memory_format=torch.channels_last)
    colours = draw_colours(CONFIG, 0, 0, np.arange(args.views), counter_rng.STREAM_COLOUR_Q).to(device)
    ways: dict[str, Callable[[], Tensor]] = {
        "moco_dist": lambda: ours(views, colours),
        "torchvision, image by image": lambda: torchvision_each(views, colours),
    }
    if device == "cuda":
        compiled = torch.compile(apply_colours, dynamic=False)
        ways["moco_dist, compiled"] = lambda: compiled(views, colours, CONFIG, torch.bfloat16)
    try:
        import kornia  # noqa: F401

        ways["kornia, batched"] = lambda: kornia_batch(views, colours)
    except ImportError:
        print("kornia is not installed: left out")
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for repeat in range(args.repeats + 1):
            for name, function in ways.items():
                taken = seconds(function, device)
                if repeat:  # the first is a warm-up
                    times[name].append(taken)
    first = statistics.median(times["moco_dist"])
    rows = []
    for name, taken in times.items():
        median = statistics.median(taken)
        row = {"way": name, "milliseconds_a_view": 1000 * median / args.views, "times_moco_dist": median / first}
        if device == "cuda":
            row["gigabytes_per_second"] = views.numel() * (1 + 2) / median / 1e9
        rows.append(row)
        print(row)
    what = "own processor time, one thread" if device == "cpu" else "wall-clock time"
    results.write("augment", rows, device, views=args.views, image_size=args.size, time=what)


if __name__ == "__main__":
    main()
