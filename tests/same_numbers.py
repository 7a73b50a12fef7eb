"""Prints a digest of what short trainings compute: the same before and after a change that may not change numbers.

`python -m tests.same_numbers > before.json` in one checkout, the same in another, then compare the two files. Each
case trains 9 steps by the command itself, stopped after 5 and gone on. Hashed are the losses in log.jsonl and every
tensor of the last checkpoint. A CPU of another kind gives other digits.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

from moco_dist.datasets.prepare import prepare_shapes

SMALL = shlex.split("""
--model.arch resnet10 --model.head-hidden-dims [64] --model.embedding-dim 32 --model.bn-group-size 4
--moco.queue-size 88 --moco.momentum 0.9 --optim.global-batch-size 16 --optim.epochs 3 --optim.base-lr 0.5
--data.image-size 32 --data.num-workers 0 --log.every-steps 2 --checkpoint.keep-last 1 --tracking.backend none""")
CASES = {
    "plain": [],
    "accumulation": ["--optim.grad-accum-steps", "2"],
    "symmetric": ["--moco.symmetric", "true"],
    "symmetric, accumulation": ["--moco.symmetric", "true", "--optim.grad-accum-steps", "2"],
    "queue of keys": ["--moco.queue-start", "keys", "--moco.queue-size", "40"],
    "loader": ["--shuffle.exchange", "loader"],
    "all_to_all": ["--shuffle.exchange", "all_to_all"],
    "all_gather": ["--shuffle.exchange", "all_gather"],
    "bf16, lars": ["--optim.precision", "bf16", "--optim.optimizer", "lars"],
    "zero 1": ["--engine.kind", "deepspeed", "--engine.zero-stage", "1"],
    "simclr": ["--method", "simclr"],
}


def digest(run_dir: Path) -> dict[str, str]:
    """SHA-256, cut to 16 digits, of the logged losses and of each group of tensors of the last checkpoint."""
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    found = {"losses": _hash(repr([(row["step"], row["loss"]) for row in rows]).encode())}
    folder = max((run_dir / "checkpoints").glob("step_*"))
    tensors: dict[str, list[tuple[str, bytes]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in list(file.keys()):
                tensors.setdefault(name.partition(".")[0], []).append((name, file.get_tensor(name).tobytes()))
    for group, named in tensors.items():
        found[group] = _hash(b"".join(name.encode() + content for name, content in sorted(named)))
    return found


def run(case: str, ranks: int, data: Path, run_dir: Path) -> dict[str, str]:
    """Train one case on so many ranks, stopped once; what it computed."""
    words = ["-m", "moco_dist", "pretrain", *SMALL, *CASES[case], "--data.root", str(data), "--run.dir", str(run_dir)]
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    for more in (["--run.stop-at-step", "5"], []):
        command = [*(starter if ranks > 1 else [sys.executable]), *words, *more]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return digest(run_dir)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def main() -> None:
    """All cases, or those named, on one rank and on two."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare_shapes(data, num_train=48, num_val=10)
        cases = [(case, ranks) for case in sys.argv[1:] or CASES for ranks in (1, 2)]
        found = {
            f"{case}, {ranks} rank(s)": run(case, ranks, data, Path(folder) / f"run{number}")
            for number, (case, ranks) in enumerate(cases)
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
