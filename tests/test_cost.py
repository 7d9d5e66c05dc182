"""What a step costs, counted: against the papers' figure, against torch's own counter, against sums by hand."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import forms
from fastrot import assemble, config
from fastrot.backbones.alexnet import alexnet
from fastrot.backbones.nin import nin
from fastrot.speed import cost
from fastrot.training.loop import train_step
from fastrot.training.optim import LRSchedule
from fastrot.training.state import build

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


def test_alexnet_takes_the_papers_multiplications():
    each = cost.layers(alexnet(config.AlexNet(), 224), (4, 3, 224, 224), BF16)
    assert [*[layer.name for layer in each][:2], each[-1].name] == [
        "conv1",
        "conv2",
        "fc_block.fc2",
    ]
    times = [2 if layer.name == "conv1" else 3 for layer in each]  # no gradient of pixels
    macs = sum(layer.flop / k for layer, k in zip(each, times, strict=True)) / 2 / 4
    assert macs / 1e6 == pytest.approx(710.1, abs=0.05)
    assert sum(layer.weights for layer in each) == 4 * sum(
        p.numel() for p in alexnet(config.AlexNet(), 224).parameters()
    )


@pytest.mark.parametrize("preset", ["rotnet-alexnet", "decoupling-alexnet"])
def test_torch_counts_the_same_in_a_real_step(preset):
    cfg = forms.sized(preset, CPU, quick=True, precision="fp32", batch=4)
    view = assemble.training_view(cfg)
    loader = assemble.open_loader("synthetic:500", view, batch=4, enlarge=True)
    schedule = LRSchedule(cfg.schedule, epochs=1, batches=9, steps=9, lr=0.1)
    state = build(cfg, assemble.data_info(cfg, loader, None, CPU, FP32), schedule)
    state.method.set_schedule(1, schedule.begins)
    net, batch = state.method.net, cost.random_batch(view, 4, CPU)
    train_step(state, batch)
    random = torch.get_rng_state()
    eager = cost.step_cost(state.method, view, cfg, CPU)
    fused = cost.step_cost(state.method, view, dataclasses.replace(cfg, compile=True), CPU)
    assert torch.equal(random, torch.get_rng_state())
    with FlopCounterMode(display=False) as counted:
        train_step(state, batch)
    mine = cost.layers(net, (16, 3, 64, 64), FP32)
    whole = counted.get_total_flops()
    assert (sum(layer.flop for layer in mine), eager.flop, fused.flop) == (whole, whole, whole)
    optimiser = cost.optimiser_bytes(net, FP32, config.Sgd())
    assert eager.traffic - optimiser == sum(layer.traffic_unfused for layer in mine)
    assert fused.traffic - optimiser == sum(layer.traffic for layer in mine)
    assert all(p.device.type == "cpu" for p in net.parameters())
    assert net.training


def test_views_of_several_crops_are_counted_together():
    """As a method's with two crops, whose net takes a tuple."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, views):
            return [self.head(self.conv(each).mean(dim=(2, 3))) for each in views]

    def multiplied(*sides: int) -> int:
        return sum(
            layer.flop for layer in cost.layers(net, tuple((2, 3, s, s) for s in sides), FP32)
        )

    net = Both()
    assert multiplied(8, 6) == multiplied(8) + multiplied(6)
    views = [torch.randn(2, 3, side, side) for side in (8, 6)]
    with FlopCounterMode(display=False) as counted:
        torch.cat(net(views)).sum().backward()
    assert counted.get_total_flops() == multiplied(8, 6)


def test_a_frozen_trunk_costs_its_forward_pass_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 5))
    net[:2].requires_grad_(False)
    with FlopCounterMode(display=False) as counted:
        net(torch.randn(2, 3, 8, 8)).sum().backward()
    each = cost.layers(net, (2, 3, 8, 8), FP32)
    assert sum(layer.flop for layer in each) == counted.get_total_flops()


def test_traffic_is_the_sum_that_the_page_writes_down():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    ).append(nn.Linear(4 * 16, 5))
    conv, linear = cost.layers(net, (2, 3, 8, 8), BF16)
    n, m = 2 * 4 * 64, 2 * 4 * 16
    assert (conv.flop, linear.flop) == (2 * 2 * n * 27, 3 * 2 * 10 * 64)
    statistics, forward = 2 * n, 2 * n + 5 * m  # a value, what it was made of, its place
    sums, back = 5 * m, 2 * n + 3 * m + 2 * n
    assert conv.traffic == statistics + forward + sums + back
    bias, norm, relu, pool, flat = 3 * n, 3 * n + 5 * n, 2 * n + 3 * n, 2 * (n + m), 4 * m
    assert conv.traffic_unfused == 2 * (bias + norm + relu + pool + flat) + 2 * 8 * m
    assert (linear.traffic, linear.traffic_unfused) == (2 * 10, 2 * 10)  # the gradient of its bias
    assert conv.weights == 4 * (4 * 27 + 4 + 8)
    (whole,) = cost.layers(net[:3], (2, 3, 8, 8), BF16)
    assert whole.traffic == 2 * (n + 2 * n + 2 * n + 3 * n)
    assert cost.layers(net[:3], (2, 3, 8, 8), FP32)[0].traffic == 2 * whole.traffic
    (plain,) = cost.layers(nn.Sequential(net[0], net[2], net[3]), (2, 3, 8, 8), BF16)
    assert plain.traffic == 2 * ((n + m) + (2 * n + m))


def test_an_evaluation_is_forward_alone():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    )
    (looked,) = cost.layers(net, (2, 3, 8, 8), BF16, training=False)
    (step,) = cost.layers(net, (2, 3, 8, 8), BF16)
    n, m = 2 * 4 * 64, 2 * 4 * 16
    assert 2 * looked.flop == step.flop
    assert looked.traffic == 2 * (n + m)
    assert looked.traffic_unfused == 2 * (2 * n + 2 * n + 2 * n + n + m) + 8 * m


def test_nins_layers_are_all_seen():
    each = cost.layers(nin(config.Nin(), 32), (2, 3, 32, 32), FP32)
    assert [layer.name for layer in each][:4] == [
        "conv1.wide",
        "conv1.point1",
        "conv1.point2",
        "conv2.wide",
    ]
    assert len(each) == 12
    assert all(layer.traffic < layer.traffic_unfused for layer in each)


def test_a_product_that_is_not_called_is_told():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.unseen = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.seen(x) @ self.unseen.weight

    with pytest.raises(AssertionError, match="unseen"):
        cost.layers(Silent(), (2, 4), FP32)


def test_the_optimiser_reads_three_and_writes_two():
    net = nn.Sequential(nn.Linear(10, 6, bias=False), nn.BatchNorm1d(6))
    assert cost.optimiser_bytes(net, FP32, config.Sgd()) == 20 * (60 + 12)
    assert cost.optimiser_bytes(net, FP32, config.Sgd(momentum=0.0)) == 12 * (60 + 12)
    assert cost.optimiser_bytes(net, FP32, config.RMSprop()) == 28 * (60 + 12)
    assert cost.optimiser_bytes(net, BF16, config.Sgd()) == 20 * (60 + 12) + 12 * 60
    net[0].requires_grad_(False)
    assert cost.optimiser_bytes(net, BF16, config.Sgd()) == 20 * 12
