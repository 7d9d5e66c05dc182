import os

import pytest
import torch
from torch import nn

from fastrot.config import UsageError
from fastrot.training import checkpoint


def written(path):
    checkpoint.save(path, {"net": {"w": torch.arange(5000.0)}, "step": 7})
    return path


def test_a_checkpoint_comes_back(tmp_path):
    state = checkpoint.load(written(tmp_path / "a" / "last.pt"))
    assert state["step"] == 7
    assert torch.equal(state["net"]["w"], torch.arange(5000.0))
    assert os.listdir(tmp_path / "a") == ["last.pt"]


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1], ids=lambda n: f"{n}-bytes")
def test_a_checkpoint_cut_short_is_refused(tmp_path, keep):
    path = written(tmp_path / "last.pt")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"last\.pt"):
        checkpoint.load(path)


def test_a_flipped_bit_in_the_weights_is_refused(tmp_path):
    path = written(tmp_path / "last.pt")
    data = bytearray(path.read_bytes())
    at = data.index(torch.arange(5000.0).numpy().tobytes()[400:800])
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UsageError, match="changed"):
        checkpoint.load(path)


@pytest.mark.parametrize("reader", ["zipfile.ZipFile.testzip", "torch.load"])
def test_a_want_of_memory_is_no_damage(tmp_path, monkeypatch, reader):
    def fails(*_, **__):
        raise MemoryError

    path = written(tmp_path / "last.pt")
    monkeypatch.setattr(reader, fails)
    with pytest.raises(MemoryError):
        checkpoint.load(path)


def test_another_version_is_refused(tmp_path):
    torch.save({"version": 999}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="version 999"):
        checkpoint.load(tmp_path / "x.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    torch.save({"version": checkpoint.VERSION, "x": Evil()}, tmp_path / "x.pt")
    with pytest.raises(UsageError):
        checkpoint.load(tmp_path / "x.pt")
    assert not (tmp_path / "was-run").exists()


def test_what_a_killed_write_left_is_swept(tmp_path):
    path = written(tmp_path / "last.pt")
    (tmp_path / ".last.pt.0123abcd.tmp").write_bytes(b"half a checkpoint")
    written(path)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = written(tmp_path / "last.pt")
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        checkpoint.save(path, {"net": lambda: 0})  # cannot be pickled
    assert checkpoint.load(path)["step"] == 7
    assert os.listdir(tmp_path) == ["last.pt"]


def test_weights_that_do_not_fit_are_named():
    net = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="missing"):
        checkpoint.load_weights(net, {"weight": torch.zeros(2, 3)}, "x.pt")
    with pytest.raises(UsageError, match="weight is"):
        checkpoint.load_weights(net, {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "x.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_all_finite_sees_one_bad_number(bad):
    good = [torch.zeros(3), torch.arange(4), torch.zeros(0)]
    assert checkpoint.all_finite(good)
    assert not checkpoint.all_finite([*good, torch.tensor([0.0, bad])])


def test_random_numbers_go_on_where_they_were():
    cpu = torch.device("cpu")
    states = checkpoint.random_state(cpu)
    first = torch.rand(3)
    checkpoint.set_random_state(states, cpu)
    assert torch.equal(torch.rand(3), first)
