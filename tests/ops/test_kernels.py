"""The machine code of every kernel for sm_80 and sm_90, as `make kernels` shows it."""

import os
import subprocess
import sys
from dataclasses import replace

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


def test_warps_of_an_sm_are_those_of_nvidias_occupancy_calculator():
    for registers, shared, warps, held in (
        (152, 0, 8, 8),
        (128, 0, 8, 16),
        (96, 0, 4, 20),
        (32, 0, 4, 64),
        (32, 0, 1, 32),
        (32, 40_000, 4, 20),
    ):
        assert kernels.warps_an_sm(registers, shared, warps, 90) == held


def test_a_kernel_that_leaves_an_sm_few_warps_or_spills_is_named():
    good = kernels.Report(
        kernel="unpack_crops ycc", target=90, registers=128, spills=0, shared=0, warps=16, load=8, store=4,
        instructions=9,
    )  # fmt: skip
    assert not good.faults()
    assert replace(good, warps=8).faults() == ["unpack_crops ycc on sm_90: warps is 8, not 16"]
    assert replace(good, spills=8).faults() == ["unpack_crops ycc on sm_90: spills is 8, not 0"]


@pytest.mark.soak
def test_kernels_compile_without_spills_and_move_16_bytes_at_once():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, kernels.__file__], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1 + 2 * len(kernels.kernels())
