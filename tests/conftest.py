"""What every test runs under."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` say why they were skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def one_thread():
    """Two cores are shared by the ranks that tests start."""
    torch.set_num_threads(1)
