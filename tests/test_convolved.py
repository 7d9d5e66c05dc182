"""AlexNet with `fuse`: outputs, gradients, running statistics, checkpoints as without it; the bias's gradient is zero."""

import copy
import subprocess
import sys

import pytest
import torch
from test_run import assert_same_bits, go
from torch import nn
from truth import golden

from fastrot import config
from fastrot.backbones import alexnet, convolved
from fastrot.backbones.staged import Classifier
from fastrot.config import UsageError
from fastrot.training import checkpoint
from fastrot.training.foreign import from_original

STAGES = ["conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc_block"]
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}  # of outputs and statistics, by their largest
GRADIENTS = {torch.float64: 1e-10, torch.float32: 1e-3}  # of gradients, which eight layers amplify


def pair(dtype: torch.dtype = torch.float32, width: float = 0.1, size: int = 64):
    """A plain and a fused AlexNet of the same weights, and pictures."""
    nets = []
    for fuse in (False, True):
        torch.manual_seed(0)
        cfg = config.AlexNet(width=width, kernel=5, stride=2, fuse=fuse)
        nets.append(Classifier(alexnet.alexnet(cfg, size), 4).to(dtype))
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, size, size, generator=draw).to(dtype)
    return *nets, images.contiguous(memory_format=torch.channels_last)


def near(mine: torch.Tensor, other: torch.Tensor, bound: float, name: str = "") -> None:
    scale = other.abs().max().clamp_min(1e-3)
    torch.testing.assert_close(
        mine / scale, other / scale, rtol=0, atol=bound, msg=lambda text: f"{name}: {text}"
    )


def counted(monkeypatch) -> list[bool]:
    """What norm_relu was asked for: with a pool, or without."""
    calls, ours = [], convolved.norm_relu

    def told(*args, pool, **more):
        calls.append(pool)
        return ours(*args, pool=pool, **more)

    monkeypatch.setattr(convolved, "norm_relu", told)
    return calls


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_outputs_gradients_and_statistics_are_those_of_the_plain_net(dtype, monkeypatch):
    plain, fused, images = pair(dtype)
    calls = counted(monkeypatch)
    outs = [net(images) for net in (plain, fused)]
    assert calls == [True, True, False, False, True]
    near(outs[1], outs[0], BOUNDS[dtype])
    for out in outs:
        out.square().sum().backward()
    for (name, mine), (_, other) in zip(
        fused.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert mine.grad is not None
        if name.endswith("conv.bias"):
            assert not mine.grad.any()
            assert other.grad.abs().max() < 1e-4  # rounding: the truth is zero
        else:
            near(mine.grad, other.grad, GRADIENTS[dtype], name)
    for (name, mine), (_, other) in zip(fused.named_buffers(), plain.named_buffers(), strict=True):
        near(mine.double(), other.double(), BOUNDS[dtype], name)
    assert fused.trunk.conv1.bn.num_batches_tracked == 1


def test_steps_and_then_eval_stay_together():
    """Momentum and weight decay reach the bias as before; both in float64, six steps."""
    plain, fused, images = pair(torch.float64)
    rule = dict(lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for net in (plain, fused):
        descent = torch.optim.SGD(net.parameters(), **rule)
        for _ in range(6):
            descent.zero_grad()
            nn.functional.cross_entropy(net(images), torch.arange(6) % 4).backward()
            descent.step()
    for name, value in plain.state_dict().items():
        near(fused.state_dict()[name].double(), value.double(), 1e-9, name)
    with torch.no_grad():
        near(fused.eval()(images), plain.eval()(images), 1e-9)


@pytest.mark.parametrize("kind", ["f32", "f64"])
@torch.no_grad()
def test_training_gives_the_originals_numbers(kind):
    from test_backbones import compare, small_alexnet, views, weights

    file = golden("alexnet_small")
    net = small_alexnet(file, kind).train()
    for stage in net.children():
        if isinstance(stage, convolved.Convolved):
            stage.fuse = True
    compare(net(views(file, kind)), file[f"train_{kind}_fc_block"], kind)
    state = {**weights(file, "sd__"), **weights(file, f"train_{kind}_after__")}
    after = from_original(state)
    for name, value in net.state_dict().items():
        if "running" in name:
            compare(value, after[name].numpy(), kind)


def test_keys_and_first_weights_are_those_of_the_plain_net():
    plain, fused, _ = pair()
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert "trunk.conv1.conv.bias" in fused.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value)


@torch.no_grad()
def test_a_stage_that_is_asked_for_is_there(monkeypatch):
    plain, fused, images = pair(torch.float64)
    for names in (STAGES, ["conv1", "fc_block"], ["pool2"], ["pool5", "conv5"], ["conv2"]):
        pairs = zip(
            plain.trunk.outputs(images, names), fused.trunk.outputs(images, names), strict=True
        )
        for name, (other, mine) in zip(names, pairs, strict=True):
            near(mine, other, 1e-12, name)
    calls = counted(monkeypatch)
    fused.trunk.outputs(images, ["pool5", "conv2"])
    assert calls == [True, False, False, False, True]


@torch.no_grad()
def test_eval_and_frozen_norms_go_the_plain_way(monkeypatch):
    _, fused, images = pair()
    calls = counted(monkeypatch)
    fused.eval()(images)
    fused.train()
    for name in ("conv1", "conv3"):
        fused.trunk.get_submodule(name).get_submodule("bn").eval()
    fused(images)
    assert calls == [True, False, True]  # conv2, conv4, conv5


def test_other_pools_are_not_joined():
    _, fused, _ = pair()
    stage = fused.trunk.get_submodule("conv1")
    assert stage.joins(nn.MaxPool2d(3, 2))
    for other in (
        nn.MaxPool2d(2, 2), nn.MaxPool2d(3), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, dilation=2),
        nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(3, 2), nn.MaxPool2d(3, 2, return_indices=True),
    ):  # fmt: skip
        assert not stage.joins(other)


def test_a_convolution_with_a_forward_of_its_own_is_asked_without_its_bias():
    class Powers(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            assert bias is None
            return super()._conv_forward(input, weight**3, bias)

    conv = Powers(3, 4, 3)
    views = torch.randn(2, 3, 8, 8)
    bare = nn.functional.conv2d(views, conv.weight**3)
    want = nn.functional.batch_norm(bare, None, None, training=True).relu()
    near(convolved.Convolved(conv, fuse=True)(views), want, 1e-4)


def off_float32(device: str) -> dict[str, float]:
    """How far the head's gradient in bfloat16 is from float32's, of the plain net and the fused one."""
    plain, fused, images = pair()
    for net in (plain, fused):
        net.to(device, memory_format=torch.channels_last)
    truth, images, off = copy.deepcopy(plain), images.to(device), {}
    truth(images).square().sum().backward()
    for name, net in (("plain", plain), ("fused", fused)):
        with torch.autocast(device, torch.bfloat16):
            out = net(images)
        out.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        off[name] = (net.head.weight.grad - truth.head.weight.grad).norm().item()
    return off


def test_bfloat16_on_a_cpu_is_as_near_to_float32_as_the_plain_nets():
    off = off_float32("cpu")
    assert 0 < off["fused"] < 1.5 * off["plain"]


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_as_near_to_float32_as_the_plain_nets():
    off = off_float32("cuda")
    assert 0 < off["fused"] < 1.5 * off["plain"]


@pytest.mark.gpu
def test_a_fused_step_waits_for_nothing():
    _, fused, images = pair()
    fused, images = fused.cuda(), images.cuda()
    for turn in range(4):
        if turn == 3:
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                fused(images).square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert fused.head.weight.grad.isfinite().all()


# ---- runs ----


@pytest.mark.soak
def test_a_fused_run_resumes_to_the_same_bits_and_not_as_another(pictures, tmp_path):
    fuse = ["--backbone.fuse"]
    assert go(pictures, tmp_path / "straight", *fuse) == 0
    assert go(pictures, tmp_path / "broken", *fuse, "--max-steps", "7") == 0
    assert go(pictures, tmp_path / "broken", *fuse) == 0
    last = [tmp_path / name / "checkpoints" / "last.pt" for name in ("straight", "broken")]
    assert_same_bits(*last)
    saved = checkpoint.load(last[0])["net"]
    biases = [name for name in saved if name.endswith("conv.bias")]
    assert len(biases) == 5
    with pytest.raises(UsageError, match=r"--backbone\.fuse"):
        go(pictures, tmp_path / "broken", "--backbone.no-fuse")


TRACE = """
import copy, torch
from fastrot import config
from fastrot.backbones.alexnet import alexnet
from fastrot.backbones.staged import Classifier

torch.manual_seed(0)
eager = Classifier(alexnet(config.AlexNet(width=0.05, kernel=5, stride=2, fuse=True), 64), 4)
compiled = copy.deepcopy(eager)
step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
images = torch.randn(4, 3, 64, 64)
for turn in range(2):
    for net in (eager, step):
        net(images).square().sum().backward()
for (name, mine), other in zip(compiled.named_parameters(), eager.parameters()):
    torch.testing.assert_close(mine.grad, other.grad, msg=name)
    assert name.endswith("conv.bias") != bool(mine.grad.any())
for mine, other in zip(compiled.buffers(), eager.buffers()):
    torch.testing.assert_close(mine, other)
assert compiled.trunk.conv1.bn.num_batches_tracked == 2
"""


@pytest.mark.soak
@pytest.mark.versions
def test_a_fused_net_trains_compiled_as_one_graph():
    # in a process of its own: the shape checks that tests switch on cannot be traced
    done = subprocess.run([sys.executable, "-c", TRACE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
