"""Shared by all tests: kernels run in Triton's interpreter where there is no GPU; nothing is downloaded."""

import contextlib
import os
import signal
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at a process's first product

import pytest
from PIL import Image
from truth import photo

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # which a shell's & has its commands ignore

with contextlib.suppress(ModuleNotFoundError):  # torch's builds for the CPU come without Triton
    from triton.runtime import interpreter

    # 3.6's asks int() of arrays of one element, which numpy refuses from 2.5 on
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_index_too


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is none; where one is, what was measured on it decides nothing in tests."""
    if torch.cuda.is_available():
        from fastrot.training import device

        device.FORMS.clear()
    else:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def pytest_runtest_logreport(report):
    """A failure is told at once too: the end, where pytest tells it, may not come."""
    if report.failed:
        print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)


@pytest.fixture(scope="module")
def quick_runs():
    """Runs in this process draw no page and take the machine's ceilings for known: three times as fast, the same bits."""
    from fastrot.speed import bounds

    known = bounds.Ceilings(tflops=0.1, gb_per_s=10.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastrot.evals.page.draw", lambda *_, **__: None)
        patch.setattr(bounds, "ceilings", lambda *_, **__: known)
        yield


@pytest.fixture(scope="session")
def straight(pictures, tmp_path_factory) -> Path:
    """A run of test_run's 20 steps, two and a half epochs, never broken off. Not to be written into."""
    from test_run import go

    out = tmp_path_factory.mktemp("runs") / "straight"
    assert go(pictures, out) == 0
    return out


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """An image folder of three classes and 37 JPEGs and PNGs of different sizes."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(37):
        folder = root / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        picture = Image.fromarray(photo(i, 40 + i % 7 * 5, 48 + i % 5 * 9))
        if i % 6 == 5:
            picture.save(folder / f"{i:03d}.png")
        else:
            picture.save(folder / f"{i:03d}.jpg", quality=92)
    return root
