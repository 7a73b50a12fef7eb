"""A small set of real images, and what a pre-training on it gains: configs/patches.yaml with several seeds.

    apt-get install -y --no-install-recommends mate-backgrounds plasma-workspace-wallpapers lomiri-wallpapers-16.04
    python -m benchmarks.patches [--data data/patches] [--variants recipe ...] [--seeds 0 1 2]
        [--earlier drop|keep|replace] [--quick]

A class is one of the photographs of these packages of Debian, an image a patch of it of 64 px. A photograph is a grid
of 4 x 4 cells; of each row and of each column one cell is for validation, and no patch leaves its cell. The same
packages give the same patches. A variant is the recipe with one thing changed. A result is written after each run.
--quick: an epoch on a few patches of generated pictures.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks import results
from benchmarks.photos import noise

CONFIG, LINEAR = "configs/patches.yaml", "configs/patches_linear.yaml"
SIDE, GRID = 64, 4  # pixels of a patch; cells of a photograph, each way
NUM_TRAIN, NUM_VAL = 100, 40  # patches of a photograph
SHARE = (0.4, 0.9)  # range of a patch's side, as a share of its cell's shorter one
MATE = "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower"
PLASMA = ("BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path "
          "summer_1am")  # fmt: skip
LOMIRI = ("Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace "
          "Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich friends_by_Aitzol_Berasategi "
          "greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi "
          "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi")  # fmt: skip
PHOTOGRAPHS = {  # those of the packages' pictures that a camera took
    **{name: f"/usr/share/backgrounds/mate/nature/{name}.jpg" for name in MATE.split()},
    **{name: f"/usr/share/wallpapers/{name}/contents/images/2560x1600.jpg" for name in PLASMA.split()},
    **{name: f"/usr/share/backgrounds/{name}.jpg" for name in LOMIRI.split()},
}
VARIANTS = {  # flags of the pre-training, over the recipe's settings
    "recipe": [],
    "demo's colours": ["--augment.jitter", "[0.4, 0.4, 0.4, 0.1]", "--augment.grayscale-probability", "0.3",
                       "--augment.blur-probability", "0.2"],
    "hue turned by 0.1": ["--augment.jitter", "[0.2, 0.2, 0.2, 0.1]"],
    "0.3 of the views gray": ["--augment.grayscale-probability", "0.3"],
    "no jitter": ["--augment.jitter-probability", "0"],
    "tau 0.2": ["--moco.temperature", "0.2"],
    "random keys at the start": ["--moco.queue-start", "random"],
    "half the epochs": ["--optim.epochs", "9"],
}  # fmt: skip
QUICK = {  # flags of each command
    "pretrain": ["--model.bn-group-size", "4", "--moco.queue-size", "32", "--optim.global-batch-size", "16",
                 "--optim.epochs", "1", "--optim.warmup-epochs", "0", "--log.every-steps", "1"],
    "knn": ["--neighbours", "[1, 20]"],
    "linear": ["--epochs", "1", "--milestones", "[]", "--global-batch-size", "8"],
}  # fmt: skip


def photographs() -> dict[str, Image.Image]:
    """Names and photographs; ends the program, with what to install, where one is missing."""
    if missing := sorted(path for path in PHOTOGRAPHS.values() if not Path(path).exists()):
        install = next(line.strip() for line in (__doc__ or "").splitlines() if "apt-get" in line)
        sys.exit(f"{missing[0]} is not here, nor are {len(missing) - 1} others: {install}")
    return {name: Image.open(path) for name, path in PHOTOGRAPHS.items()}


def cut(root: Path, pictures: dict[str, Image.Image], num_train: int, num_val: int) -> None:
    """Write patches into ROOT/train/CLASS and ROOT/val/CLASS as JPEGs; a class is a picture."""
    for number, (name, opened) in enumerate(pictures.items()):
        rng, picture = np.random.default_rng(number), opened.convert("RGB")
        width, height = picture.width // GRID, picture.height // GRID  # of a cell
        columns_of_val = rng.permutation(GRID)  # by rows
        for split, count in (("train", num_train), ("val", num_val)):
            cells = [(row, column) for row in range(GRID) for column in range(GRID)
                     if (columns_of_val[row] == column) == (split == "val")]  # fmt: skip
            folder = root / split / name
            folder.mkdir(parents=True)
            for patch in range(count):
                row, column = cells[patch % len(cells)]  # every cell in turn
                side = int(min(width, height) * rng.uniform(*SHARE))
                left = column * width + int(rng.integers(width - side + 1))
                top = row * height + int(rng.integers(height - side + 1))
                # Cut first: resize's own box lets the filter reach a few pixels past it, into the neighbouring cell.
                cut_out = picture.crop((left, top, left + side, top + side))
                resized = cut_out.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                resized.save(folder / f"{patch:03d}.jpg", quality=95)


def command(*words: str | Path) -> None:
    """`moco-dist WORDS`; ends with its status if that is not 0."""
    if status := subprocess.run([sys.executable, "-m", "moco_dist", *map(str, words)]).returncode:
        sys.exit(status)


def measured(data: Path, run_dir: Path, variant: str, seed: int, quick: bool) -> dict[str, Any]:
    """A pre-training and its evaluations: the row of a result; accuracies are in percent.

    The untrained network and raw pixels are evaluated beside the recipe alone: they are the same for every variant. CPU
    seconds are those of all processes: they hardly depend on what else runs.
    """
    flags = QUICK if quick else {name: [] for name in QUICK}
    run = ["--run-dir", run_dir, "--tracking", "none"]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command("pretrain", CONFIG, "--data.root", data, "--run.dir", run_dir, "--run.seed", str(seed),
            "--tracking.backend", "none", *VARIANTS[variant], *flags["pretrain"])  # fmt: skip
    middle = resource.getrusage(resource.RUSAGE_CHILDREN)
    size = str(yaml.safe_load(Path(LINEAR).read_text())["data"]["image_size"])  # kNN sees what linear sees
    encoders = ["--encoders", "[pixels, untrained, trained]" if variant == "recipe" else "[trained]"]
    command("knn", *run, *encoders, "--data.num-workers", "0", "--data.image-size", size, *flags["knn"])
    command("linear", LINEAR, *run, *encoders, *flags["linear"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row: dict[str, Any] = {"variant": variant, "seed": seed}
    for path in sorted((run_dir / "eval").glob("*.json")):
        name = {"knn": "knn_top1_k20", "linear": "linear_top1"}.get(path.stem.partition("_")[0])
        if name and name in (found := json.loads(path.read_text()).get("accuracy", {})):
            row[path.stem] = found[name]
    row["seconds"] = time.perf_counter() - started
    row["pretrain_cpu_seconds"] = middle.ru_utime + middle.ru_stime - before.ru_utime - before.ru_stime
    row["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return row


def main() -> None:
    """Measure, and write the results file after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/patches"), help="where patches are, or are put")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["recipe"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: make the patches alone")
    results.add_earlier(parser)
    args = results.parse(parser, seeds=[0])
    settings = {path: yaml.safe_load(Path(path).read_text()) for path in (CONFIG, LINEAR)}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "patches" if args.quick else args.data
        if args.quick:
            cut(data, {f"noise{seed}": noise(seed) for seed in range(2)}, num_train=24, num_val=8)
        elif not data.exists():
            partial = data.with_name(f"{data.name}.partial")  # a set that was cut by half is not taken for one
            shutil.rmtree(partial, ignore_errors=True)
            cut(partial, photographs(), NUM_TRAIN, NUM_VAL)
            partial.rename(data)
        rows = [] if args.earlier == "drop" else results.earlier_rows("patches", "cpu", settings=settings)
        known = [] if args.earlier == "replace" else [(row["variant"], row["seed"]) for row in rows]
        wanted = [(variant, seed) for variant in args.variants for seed in args.seeds]
        for number, (variant, seed) in enumerate(run for run in wanted if run not in known):
            row = measured(data, Path(scratch) / f"run{number}", variant, seed, args.quick)
            if args.earlier != "drop":  # read again: calls side by side add to one result
                rows = [other for other in results.earlier_rows("patches", "cpu", settings=settings)
                        if (other["variant"], other["seed"]) != (variant, seed)]  # fmt: skip
            rows.append(row)
            print(json.dumps(rows[-1]), flush=True)
            results.write("patches", rows, settings=settings)


if __name__ == "__main__":
    main()
