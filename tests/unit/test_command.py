"""The end of the `moco-dist` process."""

import subprocess
import sys

import pytest

ENDS = {
    "what is registered": "atexit.register(print, 'the last word')",
    "a thread that works": "threading.Thread(target=lambda: (time.sleep(0.3), print('the last word'))).start()",
}
COMMANDS = [
    (["configs"], 0),
    (["plan", "demo"], 0),
    (["plan", "demo", "--optim.epohcs", "3"], 2),
]  # the second by torch


@pytest.mark.parametrize(("words", "status"), COMMANDS)
@pytest.mark.parametrize("what", list(ENDS))
def test_it_waits_for(what, words, status):
    code = f"""if True:
        import atexit, threading, time
        from moco_dist.cli import main as commands
        of_command = commands.main
        def main():
            status = of_command()
            {ENDS[what]}
            return status
        commands.main = main
        commands.command()"""
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (ended.returncode, bool(ended.stderr)) == (status, bool(status)), ended.stderr
    assert ended.stdout.splitlines()[-1] == "the last word"
