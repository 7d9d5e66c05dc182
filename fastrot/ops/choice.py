"""Which form of an op runs: the PyTorch reference, or the Triton kernel. Triton itself, where there is one."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastrot.config import UsageError

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # torch's builds for the CPU come without it
    triton = tl = None

FORMS = ("reference", "triton")
_forced: list[str] = []


def kernel(function: Callable[..., Any] | None = None, **how: Any) -> Any:
    """triton.jit, with its options, of the function as it is written: tests wrap functions, and Triton reads their source."""
    if function is None:
        return functools.partial(kernel, **how)
    assert triton is not None
    return triton.jit(inspect.unwrap(function), **how)


@contextmanager
def using(form: str) -> Iterator[None]:
    """Every op inside runs in this form, on any device: for tests and benchmarks.

    It is read when an op runs, so it also holds inside what was compiled outside.
    """
    _forced.append(_checked(form, "using()"))
    try:
        yield
    finally:
        _forced.pop()


def form_for(tensor: Tensor) -> str:
    """`using`, else FASTROT_OPS, else the kernel on CUDA and the reference anywhere else."""
    if _forced:
        return _forced[-1]
    if asked := os.environ.get("FASTROT_OPS"):
        return _checked(asked, "FASTROT_OPS")
    return "triton" if tensor.is_cuda else "reference"


def _checked(form: str, setting: str) -> str:
    if form not in FORMS:
        raise UsageError(f"{setting} got {form!r}: it wants {' or '.join(FORMS)}")
    return form


def check_kernel(*dtypes: torch.dtype) -> None:
    """Refuse, in one sentence, to run a Triton kernel where there is no Triton, or on what no kernel takes."""
    if triton is None:
        raise UsageError("there is no Triton, this torch came without: set FASTROT_OPS=reference")
    for dtype in dtypes:
        if dtype not in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
            raise UsageError(f"the Triton kernels take no {dtype}: set FASTROT_OPS=reference")


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 1 without one."""
    if not tensor.is_cuda:
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
