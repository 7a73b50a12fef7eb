"""What every test runs under."""

import os
import signal
import subprocess

import hypothesis
import psutil
import pytest
import torch

from moco_dist.datasets.prepare import prepare_shapes
from tests.faults.processes import command

# An example may take any time: others use the machine too.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")
# A shell starts what it puts into the background with SIGINT ignored, and tests of Ctrl-C would pass that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same of nohup and a closed terminal's signal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` say why they were skipped where there is none; drivers and cards may warn of anything."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def one_thread():
    """Two cores are shared by the ranks that tests start."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """80 pictures to train on and 20 more."""
    return prepare_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=80, num_val=20)


@pytest.fixture
def start(tiny_data):
    """A function as `processes.command`, without `data`, that starts it with its output in a pipe."""
    started = []

    def start_one(*args, **more) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        words = command(tiny_data, *args, **more)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(words, env=environment, **pipes))
        return started[-1]

    yield start_one
    for process in started:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
        if not process.stdout.closed:
            process.communicate()
