"""What exchanging key crops within a host costs on CPUs: gloo, and memory that the ranks share.

    python -m benchmarks.host_exchange [--ranks 4] [--crops 64] [--rounds 9] [--quick]

Each rank sends each rank an equal share of its crops, 224 px, uint8. "gloo" is how `shuffle.exchange: auto` does it.
"shared memory": each rank writes its crops into a file that is mapped by all, and copies what the others have for it
out of theirs, with a barrier before and after. CPU time of all ranks' processes, in turn; medians over the rounds.
"""

import argparse
import mmap
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.loader import SIZE
from benchmarks.ranks import run_ranks
from moco_dist.distributed.collectives import barrier, group_of, start_all_to_all_rows
from moco_dist.distributed.world import World

REPEATS = 5  # exchanges of a reading


def readings_of_rank(world: World, crops: int, rounds: int, folder: str) -> list[list[float]]:
    """CPU seconds of this rank's exchanges: by gloo, and by shared memory."""
    own = torch.randint(0, 256, (crops, SIZE, SIZE, 3), dtype=torch.uint8)
    share = crops // world.world_size
    group = group_of(range(world.world_size))
    mapped = []
    place = Path(folder) / str(world.rank)
    place.write_bytes(bytes(own.nbytes))
    barrier(world)
    for rank in range(world.world_size):
        with (Path(folder) / str(rank)).open("r+b") as file:
            memory = mmap.mmap(file.fileno(), own.nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        mapped.append(torch.frombuffer(memory, dtype=torch.uint8).view(own.shape))

    def gloo() -> torch.Tensor:
        counts = [share] * world.world_size
        return start_all_to_all_rows(own, counts, counts, group)()

    def shared() -> torch.Tensor:
        mapped[world.rank].copy_(own)
        barrier(world)
        received = torch.cat([theirs[world.rank * share : (world.rank + 1) * share] for theirs in mapped])
        barrier(world)
        return received

    assert torch.equal(gloo(), shared())
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for found, exchange in zip(seconds, (gloo, shared), strict=True):
            barrier(world)
            started = time.process_time()
            for _ in range(REPEATS):
                exchange()
            found.append(time.process_time() - started)
    return seconds


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--crops", type=int, default=64, help="of a rank")
    parser.add_argument("--rounds", type=int, default=9)
    args = results.parse(parser, ranks=2, crops=8, rounds=1)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        of_ranks = run_ranks(readings_of_rank, args.ranks, crops=args.crops, rounds=args.rounds, folder=folder)
    rows = []
    for way, name in enumerate(("gloo", "shared memory")):
        ms = [1000 * sum(rank[way][n] for rank in of_ranks) / (REPEATS * args.ranks * args.crops)
              for n in range(args.rounds)]  # fmt: skip
        rows.append({"way": name, "cpu_ms_per_crop": round(statistics.median(ms), 4), "lowest": round(min(ms), 4),
                     "highest": round(max(ms), 4)})  # fmt: skip
        print(rows[-1])
    results.write("host_exchange", rows, ranks=args.ranks, crops_per_rank=args.crops, rounds=args.rounds,
                  crop_size=SIZE)  # fmt: skip


if __name__ == "__main__":
    main()
