"""What import-linter cannot say: who talks to torch.distributed, that help needs no torch, how long a file may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

MOST_LINES = 400
ALLOWED = {
    "distributed/collectives.py",
    "distributed/heartbeat.py",  # talks to the store, and calls no collective
    "distributed/meeting.py",  # likewise
    "distributed/once.py",  # likewise
    "engine/ddp.py",
    "launchers/torchrun.py",  # is torchrun, and no rank
    "planning/fake_gpu.py",  # makes a group that sends nothing
    "planning/watch.py",  # counts collectives, and calls none
    "run/checkpoint.py",
    "run/tensors.py",
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_collectives_are_in_one_module():
    root = Path("moco_dist")
    for path in root.rglob("*.py"):
        if any(name.startswith("torch.distributed") for name in imported(path)):
            assert str(path.relative_to(root)) in ALLOWED, path


# What the terminal waits for before anything else happens. None of these words needs more than the settings.
AT_ONCE = [
    (["--help"], 0),
    (["pretrain", "--help"], 0),
    (["pretrain", "--nonsense", "1"], 2),
    (["configs"], 0),
    (["configs", "show", "demo"], 0),
    (["launch", "slurm", "mocov2_r50_200ep", "--gpus-per-node", "8", "--dry-run"], 0),
    (["launch", "local", "mocov2_r50_200ep", "--gpus-per-node", "8", "--dry-run"], 0),
    (["doctor", "demo", "--optim.epohcs", "3"], 1),
    (["doctor", "linear_r50_100ep"], 0),
]
SLOW_TO_IMPORT = ("torch", "torchvision", "mlflow", "matplotlib", "PIL", "pandas")


def test_what_a_terminal_waits_for_imports_nothing_slow():
    """One process for all of them: what one has imported would be found after it, and named with it."""
    code = f"""if True:
        import sys
        from moco_dist.cli.main import main
        for words, expected in {AT_ONCE!r}:
            status = main(words)
            found = [name for name in {SLOW_TO_IMPORT!r} if name in sys.modules]
            assert (status, found) == (expected, []), (words, status, found)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_doctor_imports_no_torch_where_no_gpu_is_looked_at(tmp_path):
    """A whole config, its images in a folder, and a checkpoint's size: seconds of imports for a dozen lines."""
    for split in ("train", "val"):
        (tmp_path / split / "cats").mkdir(parents=True)
        (tmp_path / split / "cats" / "one.jpg").touch()
    code = f"""if True:
        import sys
        from moco_dist.cli.main import main
        main(["doctor", "demo", "--run.device", "cpu", "--data.root", {str(tmp_path)!r}])
        found = [name for name in {(*SLOW_TO_IMPORT, "moco_dist.run.checkpoint")!r} if name in sys.modules]
        assert found in ([], ["PIL"]), found
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 images are less than one batch" in done.stdout


def test_decoding_imports_no_compiler():
    """Neither in a worker of the loader nor where a data set is looked at, and the mark that stands for it holds."""
    code = """if True:
        import sys
        from moco_dist.data import colours, sources, tasks, workers
        assert not {"torch._dynamo", "torchvision"} & set(sys.modules)
        import torch
        marked = torch.compiler.assume_constant_result(lambda: None)
        assert vars(marked).items() <= vars(colours._neighbours).items()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_is_too_long_to_be_read_at_once():
    for path in [*Path("moco_dist").rglob("*.py"), *Path("tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= MOST_LINES, path


def test_tests_import_no_other_test_file():
    """What two of them need is a module of its own: a test that moves breaks no other."""
    for path in Path("tests").rglob("*.py"):
        for name in imported(path):
            assert not any(part.startswith("test_") for part in name.split(".")[1:-1]), (path, name)
            assert not re.match(r"tests\..*\btest_\w+$", name), (path, name)
