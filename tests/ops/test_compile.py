"""The machine code of every kernel for sm_80 and sm_90, as `make kernels` shows it."""

import os
import re
import subprocess
import sys

import pytest

from fastrot.ops import compile as compiler

WIDE = {  # bytes a thread loads or stores at once
    "rotated_views": dict(store=16),
    "space_to_depth": dict(store=16),
    "nce": dict(load=16),
    "infonce": dict(load=16),
    "update_rows": dict(load=16),
    "unpack_crops": dict(load=8, store=4),  # a thread's pixels are four, so that decoding fits
    "norm_statistics": dict(load=16),
    "norm_relu": dict(load=16, store=16),
    "norm_sums": dict(load=16),
    "norm_back": dict(load=16, store=16),
    "norm_finish_statistics": dict(load=16),
    "norm_finish_sums": dict(load=16),
}


@pytest.mark.slow
def test_kernels_compile_without_spills_and_move_16_bytes_at_once():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", compiler.__name__], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr  # 1 where a kernel spills
    head, *lines = done.stdout.splitlines()
    columns = head.split()[2:]  # after kernel and target
    seen = set()
    for line in lines:
        name, target, *numbers = _cells(line)
        told = dict(zip(columns, map(int, numbers), strict=True))
        kind = name.split()[0]
        seen.add((kind, target))
        assert told["spills"] == 0
        for what, width in WIDE[kind].items():
            assert told[what] == width, line
    assert seen == {(kind, f"sm_{target}") for kind in WIDE for target in compiler.TARGETS}


def _cells(line: str) -> list[str]:
    """The name, the target, and numbers."""
    found = re.fullmatch(r"(.+?)\s+(sm_\d+)\s+([\d\s]+)", line)
    assert found, line
    return [found[1], found[2], *found[3].split()]
