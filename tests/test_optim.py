import copy
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from truth import golden

from fastrot import presets
from fastrot.config import RMSprop, Schedule, Sgd, UsageError
from fastrot.training.optim import (
    LRSchedule,
    load_state,
    optimizer_of,
    parameter_groups,
    set_lr,
    sgd,
    state_of,
)

ORIGINALS = {  # preset -> the original's configuration
    "rotnet-alexnet": "rot__ImageNet_RotNet_AlexNet__model",
    "rotnet-nin-cifar10": "rot__CIFAR10_RotNet_NIN4blocks__model",
    "decoupling-alexnet": "fd__ImageNet_Decoupling_AlexNet__feature",
    "supervised-nin-cifar10": "rot__CIFAR10_supervised_NIN__model",
    "probe-linear": "fd__ImageNet_LinearClassifiers_ImageNet_Decoupling_AlexNet_Features__classifier",
    "probe-linear-places205": "fd__Places205_LinearClassifiers_ImageNet_Decoupling_AlexNet_Features__classifier",
    "probe-linear-rotnet": "rot__ImageNet_LinearClassifiers_ImageNet_RotNet_AlexNet_Features__classifier",
    "probe-nonlinear": "fd__ImageNet_NonLinearClassifiers_ImageNet_Decoupling_AlexNet_Features__classifier",
    "probe-mlp-cifar10": "rot__CIFAR10_MultLayerClassifier_on_RotNet_NIN4blocks_Conv2_feats__classifier",
    "probe-conv-cifar10": "rot__CIFAR10_ConvClassifier_on_RotNet_NIN4blocks_Conv2_feats__classifier",
}


@pytest.mark.parametrize("preset", ORIGINALS)
def test_rates_are_the_originals(preset):
    arrays = golden("lr_schedules")
    schedule = presets.PRESETS[preset]().schedule
    epochs = int(arrays[f"{ORIGINALS[preset]}__epochs"])
    assert schedule.epochs == epochs
    rates = LRSchedule(schedule, epochs=epochs, batches=10, steps=epochs * 10)
    mine = [rates(epoch * 10 + k) for epoch in range(epochs + 10) for k in (0, 9)]
    np.testing.assert_array_equal(mine, np.repeat(arrays[f"{ORIGINALS[preset]}__lr"], 2))


@pytest.mark.parametrize("epochs", [1, 7, 10, 25, 49, 50, 51, 100, 333])
def test_a_table_keeps_its_shape_in_whole_numbers(epochs):
    schedule = presets.PRESETS["rotnet-alexnet"]().schedule
    rates = LRSchedule(schedule, epochs=epochs, batches=1, steps=epochs)
    for epoch in range(epochs):
        at = next((r for end, r in schedule.table if epoch * 50 < end * epochs), 1e-5)
        assert rates(epoch) == at
    assert rates(0) == 0.01


def test_as_published_keeps_the_tables_epochs():
    schedule = Schedule(as_published=True)
    rates = LRSchedule(schedule, epochs=20, batches=1, steps=20)
    assert [rates(14), rates(15), rates(19)] == [0.01, 0.001, 0.001]


@pytest.mark.parametrize("kind", ["table", "cosine", "linear", "exponential", "constant"])
def test_lr_scales_the_schedule_so_that_it_begins_with_it(kind):
    plain = LRSchedule(Schedule(kind=kind, last=0.5), epochs=50, batches=4, steps=200)
    scaled = LRSchedule(Schedule(kind=kind, last=0.5), epochs=50, batches=4, steps=200, lr=0.3)
    assert scaled(0) == pytest.approx(0.3)
    for step in (1, 60, 150, 199):
        assert scaled(step) == pytest.approx(30 * plain(step))


def test_a_fall_ends_at_last():
    for kind in ("cosine", "linear", "exponential"):
        rates = LRSchedule(Schedule(kind=kind, last=0.1), epochs=1, batches=100, steps=100)
        assert rates(100) == pytest.approx(0.001)
        middle = 0.1**0.5 if kind == "exponential" else 0.55
        assert rates(50) == pytest.approx(0.01 * middle)


def test_warm_up_rises_step_by_step():
    rates = LRSchedule(Schedule(kind="constant", warmup=2.0), epochs=5, batches=10, steps=50)
    assert [rates(0), rates(9), rates(19), rates(40)] == pytest.approx([0.0005, 0.005, 0.01, 0.01])


def test_words_name_each_change():
    words = list(LRSchedule(Schedule(), epochs=10, batches=3, steps=30).describe())
    assert words[0] == "learning rate 0.01 in epochs 0 to 2"
    assert len(words) == 4


def test_norms_and_biases_decay_only_where_asked():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    (all_of_them,) = parameter_groups(net, Sgd())
    assert len(all_of_them["params"]) == 4
    decayed, spared = parameter_groups(net, Sgd(decay_norms=False))
    assert [p.ndim for p in decayed["params"]] == [4]
    assert len(spared["params"]) == 3
    assert spared["weight_decay"] == 0


def test_sgd_is_the_papers():
    """v = m v + g; w -= rate (g + m v), g with weight decay, v0 = g."""
    w = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    net = nn.Module()
    net.w = w
    optimizer = sgd(net, Sgd(), 0.1)
    mine, velocity = w.detach().clone(), None
    for _ in range(5):
        optimizer.zero_grad()
        (w**3).sum().backward()
        optimizer.step()
        gradient = 3 * mine**2 + 5e-4 * mine
        velocity = gradient if velocity is None else 0.9 * velocity + gradient
        mine = mine - 0.1 * (gradient + 0.9 * velocity)
    torch.testing.assert_close(w.detach(), mine, rtol=1e-12, atol=0)


def test_an_exponential_fall_takes_the_same_share_in_each_step():
    rates = LRSchedule(Schedule(kind="exponential", last=0.01), epochs=1, batches=100, steps=100)
    shares = [rates(step + 1) / rates(step) for step in range(99)]
    assert shares == pytest.approx([0.01**0.01] * 99)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_rmsprop_is_as_its_knobs_say(momentum):
    """a = .99 a + .01 g^2; v = momentum v + g / (sqrt(a) + eps); w -= rate v."""
    w = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    net = nn.Module()
    net.w = w
    optimizer = optimizer_of(net, RMSprop(momentum=momentum, weight_decay=0.1), 0.01)
    mine, mean, velocity = w.detach().clone(), torch.zeros(1, 2), torch.zeros(1, 2)
    for _ in range(5):
        optimizer.zero_grad()
        (w**3).sum().backward()
        optimizer.step()
        gradient = 3 * mine**2 + 0.1 * mine
        mean = 0.99 * mean + 0.01 * gradient**2
        velocity = momentum * velocity + gradient / (mean.sqrt() + 1e-8)
        mine = mine - 0.01 * velocity
    torch.testing.assert_close(w.detach(), mine, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [0, 2])
def test_rmsprop_goes_on_from_what_it_saved(steps):
    first, second = a_net(), a_net()
    writer, reader = (optimizer_of(net, RMSprop(), 0.0) for net in (first, second))
    for step in range(steps):
        descend(first, writer, 0.01, step)
    second.load_state_dict(first.state_dict())
    load_state(reader, copy.deepcopy(state_of(writer)))
    for step in range(steps, 4):
        for net, optimizer in ((first, writer), (second, reader)):
            descend(net, optimizer, 0.01, step)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_rmsprop_goes_on_where_steps_are_counted_on_the_device():
    """As on a GPU, for a run that a CPU began; the meta device stands in."""
    first = a_net()
    writer = optimizer_of(first, RMSprop(), 0.01)
    descend(first, writer, 0.01, 0)
    second = a_net().to("meta")
    reader = torch.optim.RMSprop(second.parameters(), momentum=0.5, capturable=True)
    load_state(reader, state_of(writer))
    assert {kept.device.type for each in reader.state.values() for kept in each.values()} == {
        "meta"
    }
    assert reader.param_groups[0]["capturable"]


def a_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def descend(net: nn.Module, optimizer, rate: float, seed: int) -> None:
    set_lr(optimizer, rate)
    optimizer.zero_grad()
    draw = torch.Generator().manual_seed(seed)
    net(torch.randn(8, 3, generator=draw)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("decay_norms", [True, False])
def test_a_fused_step_reads_its_rate_from_a_tensor(decay_norms):
    """One that is written in place: a captured graph reads it anew; to rounding the plain steps."""
    cfg = Sgd(decay_norms=decay_norms)
    plain, fused = a_net(), a_net()
    slow, fast = sgd(plain, cfg, 0.0, fused=False), sgd(fused, cfg, 0.0)  # by default
    rates = [group["lr"] for group in fast.param_groups]
    for step, rate in enumerate([0.01, 0.01, 0.005, 0.002]):
        descend(plain, slow, rate, step)
        descend(fused, fast, rate, step)
        assert all(r.dtype == torch.float32 and r.item() == np.float32(rate) for r in rates)
    assert all(group["lr"] is r for group, r in zip(fast.param_groups, rates, strict=True))
    for mine, other in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrote", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("reads", [False, True], ids=["plain", "fused"])
def test_a_state_goes_from_each_kernel_to_each(wrote, reads, tmp_path):
    """It is of plain numbers and loads without unpickling; how a step is computed stays the reader's."""
    first, second = a_net(), a_net()
    writer, reader = sgd(first, Sgd(), 0.0, fused=wrote), sgd(second, Sgd(), 0.0, fused=reads)
    descend(first, writer, 0.1, 0)
    assert all(type(g["lr"]) is float for g in state_of(writer)["param_groups"])
    torch.save(state_of(writer), tmp_path / "state.pt")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    load_state(reader, torch.load(tmp_path / "state.pt", weights_only=True))
    (group,) = reader.param_groups
    assert (group["fused"], isinstance(group["lr"], torch.Tensor)) == (reads, reads)
    assert float(group["lr"]) == pytest.approx(0.1)
    for step in (1, 2):
        descend(first, writer, 0.05, step)
        descend(second, reader, 0.05, step)
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_states_of_older_versions_load():
    """A GPU run's, as it was saved when rates were plain numbers and the writer's kernel came along."""
    net = a_net()
    old = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9, nesterov=True, fused=True)
    net(torch.ones(2, 3)).sum().backward()
    old.step()
    mine = sgd(net, Sgd(), 0.0, fused=False)
    load_state(mine, old.state_dict())
    assert not mine.param_groups[0]["fused"]
    assert mine.param_groups[0]["lr"] == 0.3
    assert torch.equal(
        mine.state[net[0].weight]["momentum_buffer"], old.state[net[0].weight]["momentum_buffer"]
    )


# ---- momenta, which are there before the first step ----


@pytest.mark.parametrize("fused", [False, True])
def test_momenta_that_begin_at_zero_are_torchs_own(fused):
    mine, torchs = a_net(), a_net()
    own = sgd(mine, Sgd(), 0.1, fused=fused)
    rule = {k: v for k, v in own.param_groups[0].items() if k != "params"}
    made = torch.optim.SGD(torchs.parameters(), **rule)
    for step in range(3):
        descend(mine, own, 0.1, step)
        descend(torchs, made, 0.1, step)
    for one, two in zip(mine.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(own.state[one]["momentum_buffer"], made.state[two]["momentum_buffer"])


@pytest.mark.parametrize("loaded", [False, True])
def test_an_overflow_in_the_first_step_leaves_momenta_at_zero(loaded):
    """float16's: torch's fused kernel makes momenta of any content, and writes none where a gradient is not finite."""
    net = a_net()
    optimizer, scaler = sgd(net, Sgd(), 0.1, fused=True), torch.amp.GradScaler("cpu")
    if loaded:  # of a run that was saved before its first step that did not overflow
        state = state_of(optimizer)
        state["state"] = {}
        load_state(optimizer, state)
    before = copy.deepcopy(net.state_dict())
    scaler.scale(net(torch.full((8, 3), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    assert not any(momentum.any() for momentum in momenta(optimizer))
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])


def test_a_fused_kernel_finds_loaded_momenta_in_their_places():
    """It goes through memory: weights lie with their channels last, in whatever layout momenta were saved."""
    net = nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = sgd(net, Sgd(), 0.1)
    for momentum in momenta(optimizer):
        momentum.copy_(torch.arange(momentum.numel()).view(momentum.shape))
    state = copy.deepcopy(state_of(optimizer))
    for each in state["state"].values():
        each["momentum_buffer"] = each["momentum_buffer"].contiguous()
    load_state(optimizer, state)
    for p, momentum in zip(net.parameters(), momenta(optimizer), strict=True):
        assert momentum.stride() == p.stride()
        assert torch.equal(momentum, torch.arange(float(p.numel())).view(p.shape))


def test_no_momentum_is_none():
    net = a_net()
    optimizer = sgd(net, Sgd(momentum=0.0), 0.1)
    load_state(optimizer, state_of(optimizer))
    descend(net, optimizer, 0.1, 0)
    assert not any(optimizer.state.values())


def momenta(optimizer) -> list[torch.Tensor]:
    return [optimizer.state[p]["momentum_buffer"] for p in optimizer.param_groups[0]["params"]]


# ---- apex ----


def installed(monkeypatch, **of_optimizers) -> None:
    """A package called apex with these names in apex.optimizers."""
    for name in ("apex", "apex.optimizers"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["apex.optimizers"]).update(of_optimizers)


class Told(torch.optim.SGD):
    """NVIDIA's name and arguments, torch's arithmetic."""

    def __init__(
        self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False
    ):  # and none of torch's own: foreach, fused
        self.told = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)


def test_apex_is_used_where_it_is(monkeypatch):
    """The switch and its arguments; that NVIDIA's kernel computes the same was not measured."""
    installed(monkeypatch, FusedSGD=Told)
    mine, others = a_net(), a_net()
    cfg = Sgd(kernel="apex", momentum=0.8, weight_decay=0.01, decay_norms=False)
    plain = Sgd(momentum=0.8, weight_decay=0.01, decay_norms=False)
    apex, plain = sgd(mine, cfg, 0.1), sgd(others, plain, 0.1, fused=False)
    assert isinstance(apex, Told)
    assert apex.told == {"lr": 0.1, "momentum": 0.8, "nesterov": True}
    assert [g["weight_decay"] for g in apex.param_groups] == [0.01, 0.0]
    for step in range(3):
        descend(mine, apex, 0.1, step)
        descend(others, plain, 0.1, step)
    load_state(apex, state_of(plain))
    for one, two in zip(mine.parameters(), others.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("module", ["apex", "apex.optimizers", None])
def test_without_nvidias_apex_the_way_out_is_said(monkeypatch, module):
    installed(monkeypatch)  # another package of that name
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"^--optim.kernel apex wants NVIDIA.*torch$") as told:
        sgd(a_net(), Sgd(kernel="apex"), 0.1)
    assert "\n" not in str(told.value)


def test_an_apex_without_its_kernels_is_refused(monkeypatch):
    def unbuilt(*_, **__):
        raise RuntimeError("apex.optimizers.FusedSGD requires cuda extensions")

    installed(monkeypatch, FusedSGD=unbuilt)
    with pytest.raises(UsageError, match=r"requires cuda extensions.*--optim.kernel torch"):
        sgd(a_net(), Sgd(kernel="apex"), 0.1)
