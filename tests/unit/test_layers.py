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
    "run/checkpoint.py",
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


def test_help_and_wrong_flags_need_no_torch():
    code = """if True:
        import sys
        from moco_dist.cli.main import main
        assert main(["pretrain", "--help"]) == 0
        assert main(["pretrain", "--nonsense", "1"]) == 2
        assert "torch" not in sys.modules and "mlflow" not in sys.modules
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
