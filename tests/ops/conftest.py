"""What torch.empty gives is filled with NaN, so that an output left unwritten is seen; all of it hangs on versions."""

import pytest
import torch


def pytest_itemcollected(item):
    item.add_marker(pytest.mark.versions)


def poisoned(make):
    def filled(*args, **kwargs):
        out = make(*args, **kwargs)
        if out.is_floating_point():
            out.fill_(float("nan"))
        elif out.dtype != torch.bool:
            out.fill_(torch.iinfo(out.dtype).max)
        return out

    return filled


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    # `with torch.device(...)` notes once what makes tensors: not while empty is another
    torch.utils._device._device_constructors()
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
