"""The machine code of every kernel for sm_80 and sm_90, as `make kernels` shows it."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
import kernels

from fastrot.ops import blocks, nce_kernels, norm_kernels, rotate, rows


def test_make_kernels_knows_every_kernel():
    there = {
        id(value)
        for op in (blocks, nce_kernels, norm_kernels, rotate, rows)
        for name, value in vars(op).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    }
    assert {id(each.kernel) for each in kernels.kernels()} == there
    assert {each.name.split()[0] for each in kernels.kernels()} == set(kernels.WIDE)


@pytest.mark.soak
def test_kernels_compile_without_spills_and_move_16_bytes_at_once():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, kernels.__file__], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1 + 2 * len(kernels.kernels())
