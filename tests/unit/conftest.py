"""What tests of loaders and of storage share."""

import pytest

from moco_dist.data import storage


@pytest.fixture
def waits(monkeypatch):
    """Waits for storage, which are only counted."""
    counted = []
    monkeypatch.setattr(storage.time, "sleep", counted.append)
    monkeypatch.setattr(storage, "_last_told", -1e9)
    return counted


@pytest.fixture(params=["torchvision", "dali", "ffcv"])
def loader(request):
    """Every `data.loader` that is installed."""
    return _installed(request.param)


@pytest.fixture(params=["torchvision", "dali"])
def folder_loader(request):
    """Those that read files. What cannot be read is left out when packing for the third."""
    return _installed(request.param)


def _installed(name):
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="needs pip install 'moco_dist[dali]'")
    return name
