import numpy as np
import pytest
import torch
from torch import nn
from truth import golden

from fastrot import presets
from fastrot.config import Schedule, Sgd
from fastrot.optim import Rates, parameter_groups, sgd

ORIGINALS = {  # preset -> the original's configuration
    "rotnet-alexnet": "rot__ImageNet_RotNet_AlexNet__model",
    "rotnet-nin-cifar10": "rot__CIFAR10_RotNet_NIN4blocks__model",
    "decoupling-alexnet": "fd__ImageNet_Decoupling_AlexNet__feature",
}


@pytest.mark.parametrize("preset", ORIGINALS)
def test_rates_are_the_originals(preset):
    arrays = golden("lr_schedules")
    schedule = presets.PRESETS[preset]().schedule
    epochs = int(arrays[f"{ORIGINALS[preset]}__epochs"])
    assert schedule.epochs == epochs
    rates = Rates(schedule, epochs=epochs, batches=10, steps=epochs * 10)
    mine = [rates(epoch * 10 + k) for epoch in range(epochs + 10) for k in (0, 9)]
    np.testing.assert_array_equal(mine, np.repeat(arrays[f"{ORIGINALS[preset]}__lr"], 2))


@pytest.mark.parametrize("epochs", [1, 7, 10, 25, 49, 50, 51, 100, 333])
def test_a_table_keeps_its_shape_in_whole_numbers(epochs):
    schedule = presets.PRESETS["rotnet-alexnet"]().schedule
    rates = Rates(schedule, epochs=epochs, batches=1, steps=epochs)
    for epoch in range(epochs):
        at = next((r for end, r in schedule.table if epoch * 50 < end * epochs), 1e-5)
        assert rates(epoch) == at
    assert rates(0) == 0.01


def test_as_published_keeps_the_tables_epochs():
    schedule = Schedule(as_published=True)
    rates = Rates(schedule, epochs=20, batches=1, steps=20)
    assert [rates(14), rates(15), rates(19)] == [0.01, 0.001, 0.001]


@pytest.mark.parametrize("kind", ["table", "cosine", "linear", "constant"])
def test_lr_scales_the_schedule_so_that_it_begins_with_it(kind):
    plain = Rates(Schedule(kind=kind), epochs=50, batches=4, steps=200)
    scaled = Rates(Schedule(kind=kind), epochs=50, batches=4, steps=200, lr=0.3)
    assert scaled(0) == pytest.approx(0.3)
    for step in (1, 60, 150, 199):
        assert scaled(step) == pytest.approx(30 * plain(step))


def test_cosine_and_linear_end_at_last():
    for kind in ("cosine", "linear"):
        rates = Rates(Schedule(kind=kind, last=0.1), epochs=1, batches=100, steps=100)
        assert rates(100) == pytest.approx(0.001)
        assert rates(50) == pytest.approx(0.01 * 0.55)


def test_warm_up_rises_step_by_step():
    rates = Rates(Schedule(kind="constant", warmup=2.0), epochs=5, batches=10, steps=50)
    assert [rates(0), rates(9), rates(19), rates(40)] == pytest.approx([0.0005, 0.005, 0.01, 0.01])


def test_words_name_each_change():
    words = list(Rates(Schedule(), epochs=10, batches=3, steps=30).in_words())
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
