import functools
import os
import shutil

import chaos
import pytest
import torch
from test_run import leaves
from torch import nn
from truth import GOLDEN

from fastrot import config, train
from fastrot.config import UsageError
from fastrot.training import checkpoint
from fastrot.training.optim import sgd

pytestmark = pytest.mark.usefixtures("quick_runs")


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
    assert set(os.listdir(tmp_path)) == {"last.pt", "previous.pt"}


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


NEW = {"folder": "", "budget": None, "class_names": []}


@pytest.mark.parametrize("fused", [False, None], ids=["as-then", "as-now"])
def test_a_checkpoint_of_version_2_goes_on_to_the_bits_of_the_code_that_wrote_it(
    tmp_path, fused, monkeypatch
):
    """Two of one run, by the last code that wrote that version, at steps 3 and 6: tiny decoupling, bank and all.

    That code's SGD was the plain one; to rounding today's goes on from it too.
    """
    monkeypatch.setattr("fastrot.training.optim.sgd", functools.partial(sgd, fused=fused))
    kept, last = GOLDEN / "checkpoint_v2", tmp_path / "checkpoints" / "last.pt"
    args = ["decoupling-alexnet", "--image-size", "32", "--enlarge", "--batch", "4", "--workers"]
    args += ["0", "--backbone.width", "0.0098", "--backbone.kernel", "5", "--backbone.stride", "2"]
    args += ["--method.dim", "4", "--method.negatives", "3", "--schedule.steps", "6", "--log-every"]
    args += ["2", "--checkpoint-every", "3", "--no-tensorboard", "--precision", "fp32", "--device"]
    args += ["cpu", "--data", "synthetic:24", "--out", str(tmp_path)]
    train.main([*args, "--max-steps", "1"])  # its rows-*.npy
    shutil.copyfile(kept / "at_step_3.pt", last)
    train.main(args)
    mine, theirs = checkpoint.load(last), checkpoint.load(kept / "at_step_6.pt")
    (then, now), alike = (
        (each["run_identity"] for each in (theirs, mine)),
        ("device", "torch", "threads"),
    )
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"  # as on the processor that wrote it
    if fused is not None and wide and all(then[name] == now[name] for name in alike):
        for state in (mine, theirs):
            state["config"] = config.to_plain(config.from_plain(state["config"]))  # knobs' names
            state["run_identity"] |= NEW  # not known then
        own, others = leaves(mine), leaves(theirs)
        assert own.keys() == others.keys()
        assert [name for name in own if not chaos.same(own[name], others[name])] == []
    for part in ("net", "method"):  # on another processor to its rounding
        assert mine[part].keys() == theirs[part].keys()
        for name, value in theirs[part].items():
            torch.testing.assert_close(mine[part][name], value, rtol=1e-4, atol=1e-4)
    assert mine["version"] == checkpoint.VERSION
    assert mine["progress"]["images"] == theirs["progress"]["images"]
    assert now["fingerprint"] == then["fingerprint"]


@pytest.mark.parametrize("version", [1, 999])
def test_another_version_is_refused_in_a_sentence(tmp_path, version):
    torch.save({"version": version}, tmp_path / "x.pt")
    with pytest.raises(
        UsageError, match=f"has version {version}, .* use the fastrot that wrote it"
    ):
        checkpoint.load(tmp_path / "x.pt")
