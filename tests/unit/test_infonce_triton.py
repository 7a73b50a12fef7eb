"""The GPU kernel in Triton's interpreter, on the CPU; on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from moco_dist.method.infonce import _by_blocks

SHAPES = [(1, 1, 16), (5, 64, 128), (70, 1000, 128), (64, 129, 100)]


def check(device, tolerance):
    from moco_dist.method.infonce_triton import weighted_sums

    for num_q, num_keys, dim in SHAPES:
        q, keys = (F.normalize(torch.randn(n, dim, device=device), dim=1) for n in (num_q, num_keys))
        exact = _by_blocks(q.double(), keys.double(), 0.2)
        ours = weighted_sums(q, keys, 0.2, "ieee").double()
        assert ((ours - exact).abs() / exact[:, -1:]).max() < tolerance, (num_q, num_keys, dim)


def test_in_the_interpreter():
    """In a process of its own: TRITON_INTERPRET counts when triton is imported."""
    code = "import tests.unit.test_infonce_triton as t; t.check('cpu', 1e-5)"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_on_a_gpu():
    check("cuda", 1e-5)
