"""The GPU kernel in Triton's interpreter, on the CPU; compiled for GPUs that are not there; on one where there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moco_dist.method.infonce import _by_blocks

SHAPES = [(1, 1, 16), (5, 64, 128), (70, 1000, 128), (64, 129, 100), (33, 40, 200)]
# Shared memory that a block may take, in bytes: T4; the smallest of cards since Ampere, which run sm_80's; H100; B200.
SHARED_BYTES = {75: 65_536, 80: 101_376, 90: 232_448, 100: 232_448}


def check(device, tolerance, precision="ieee"):
    from moco_dist.method.infonce_triton import weighted_sums

    for num_q, num_keys, dim in SHAPES:
        q, keys = (F.normalize(torch.randn(n, dim, device=device), dim=1) for n in (num_q, num_keys))
        exact = _by_blocks(q.double(), keys.double(), 0.2)
        ours = weighted_sums(q, keys, 0.2, precision).double()
        assert ((ours - exact).abs() / exact[:, -1:]).max() < tolerance, (num_q, num_keys, dim)


def test_in_the_interpreter():
    """In a process of its own: TRITON_INTERPRET counts when triton is imported."""
    code = "import tests.unit.test_infonce_triton as t; t.check('cpu', 1e-5)"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_registers_and_shared_memory_suffice(tmp_path, architecture, precision):
    """By the compiler that a GPU's driver would be given the kernel by."""
    check_compiled(tmp_path, architecture, precision, 128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "precision", "dim"),
    [(75, "ieee", 128), *[(a, p, d) for a in (80, 90, 100) for p in ("tf32", "ieee") for d in (16, 64, 256)]],
)
def test_other_cards_and_embeddings_too(tmp_path, architecture, precision, dim):
    check_compiled(tmp_path, architecture, precision, dim)


def check_compiled(folder, architecture, precision, dim):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moco_dist.method.infonce_triton import _kernel, launch_options

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file() or not tool.with_name("ptxas").is_file():
        pytest.skip("triton has no ptxas and cuobjdump here")
    options = launch_options(dim, precision)
    constants = {name: options.pop(name) for name in _kernel.arg_names if name in options}
    types = {"q_ptr": "*fp32", "keys_ptr": "*fp32", "sums_ptr": "*fp32", "scale": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in _kernel.arg_names}
    # As at a launch: memory is aligned, and sizes are multiples of 16.
    is_multiple = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind in ("*fp32", "i32")
    }
    source = ASTSource(_kernel, signature, constants, is_multiple)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    done = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    usage = re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", done.stdout + done.stderr)
    assert usage == [("0", "0")], done.stdout  # in registers, all of it
    assert compiled.metadata.shared <= SHARED_BYTES[architecture]
    assert "ld.global.v4" in compiled.asm["ptx"] or "cp.async.cg" in compiled.asm["ptx"]  # 16 bytes at a time


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("ieee", 1e-5), ("tf32", 2e-2)])
def test_on_a_gpu(precision, tolerance):
    check("cuda", tolerance, precision)
