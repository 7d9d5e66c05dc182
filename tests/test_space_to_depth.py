"""The first convolution over cells of pixels: the plain one's numbers and parameters, in views of both kinds."""

import copy
import json
from pathlib import Path

import pytest
import torch
from test_backbones import MEAN, STAGES, STD, TOLERANCE, small_alexnet, views, weights
from torch import nn
from truth import golden

import fastrot
from fastrot import config, train
from fastrot.backbones import alexnet
from fastrot.backbones.space_to_depth import (
    SpaceToDepthConv2d,
    space_to_depth_of,
    space_to_depth_weight,
)
from fastrot.backbones.staged import Staged
from fastrot.config import UsageError
from fastrot.core import Batch
from fastrot.evals.picture import first_filters
from fastrot.evals.rotation import rotation_guesses
from fastrot.evals.trained import trained_method
from fastrot.ops.rotate import SpaceToDepth, rotated_views
from fastrot.training import checkpoint
from fastrot.training.foreign import from_original

CONVOLUTIONS = [  # size, kernel, stride, padding
    pytest.param(64, 11, 4, 2, id="paper"),
    pytest.param(63, 11, 4, 2, id="paper-least"),
    pytest.param(65, 11, 4, 2, id="pixels-left-over"),
    pytest.param(29, 5, 2, 2, id="small-kernel-least"),
    pytest.param(32, 5, 2, 2, id="small-kernel"),
    pytest.param(20, 3, 1, 1, id="stride-1"),
    pytest.param(21, 3, 3, 1, id="kernel-is-stride"),
    pytest.param(21, 3, 4, 1, id="kernel-under-stride"),
    pytest.param(20, 4, 3, 2, id="even-kernel"),
    pytest.param(20, 1, 2, 0, id="point"),
    pytest.param(20, 8, 4, 2, id="whole-cells"),
]


def both(kernel: int, stride: int, padding: int) -> tuple[nn.Conv2d, SpaceToDepthConv2d]:
    """A plain convolution and one over cells of the same weights, in float64."""
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 5, kernel, stride, padding)
    by_cells = SpaceToDepthConv2d(3, 5, kernel, stride, padding)
    by_cells.load_state_dict(plain.state_dict())
    return plain.double(), by_cells.double()


def results(layer: nn.Conv2d, images: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients."""
    images = images.detach().requires_grad_()
    out = layer(images)
    assert layer.bias is not None
    wanted = (layer.weight, layer.bias, images)
    return [out, *torch.autograd.grad(out, wanted, upstream)]


# ---- the convolution ----


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CONVOLUTIONS)
def test_it_equals_the_plain_convolution_forward_and_backward(size, kernel, stride, padding):
    plain, by_cells = both(kernel, stride, padding)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    upstream = torch.randn_like(plain(images))
    want = results(plain, images, upstream)
    for mine, its in zip(results(by_cells, images, upstream), want, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)
    cells = space_to_depth_of(size, kernel, stride, padding)
    if stride == 1:
        assert cells is None  # cells of one pixel
        return
    assert cells is not None
    given = results(by_cells, cells(images), upstream)
    for mine, its in zip(given[:3], want[:3], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)
    assert by_cells(images).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_stays_within_rounding_of_the_plain_one(dtype):
    plain, by_cells = both(11, 4, 2)
    images = torch.randn(4, 3, 64, 64).to(dtype)
    upstream = torch.randn(4, 5, 15, 15).to(dtype)
    exact = results(plain, images.double(), upstream.double())
    mine = results(by_cells.to(dtype), images, upstream)
    wide = results(both(11, 4, 2)[0].to(dtype), images, upstream)
    for name, a, b, truth in zip("owbi", mine, wide, exact, strict=True):
        scale = truth.abs().max()
        off, plain_off = ((each.double() - truth).abs().max() / scale for each in (a, b))
        assert off <= max(2 * plain_off, 4 * torch.finfo(dtype).eps), name


def test_its_weight_is_padded_behind_and_cut_up_as_the_views_are():
    weight = torch.arange(2 * 3 * 11 * 11).view(2, 3, 11, 11).double() + 1
    cut = space_to_depth_weight(weight, 4)
    assert cut.shape == (2, 48, 3, 3)
    assert cut.is_contiguous(memory_format=torch.channels_last)
    assert (cut == 0).sum() == 2 * 3 * (144 - 121)
    for c, y, x in [(0, 0, 0), (2, 3, 4), (1, 10, 7), (2, 10, 10)]:
        place = (y % 4 * 4 + x % 4) * 3 + c
        assert (cut[:, place, y // 4, x // 4] == weight[:, c, y, x]).all()


def test_the_papers_cells():
    assert space_to_depth_of(224, 11, 4, 2) == SpaceToDepth(side=4, pad=2, count=57)
    assert tiny(True, 224).space_to_depth == SpaceToDepth(4, 2, 57)
    assert tiny(False, 224).space_to_depth is None


# ---- in AlexNet ----


def tiny(by_cells: bool, size: int = 64, **more: int) -> Staged:
    torch.manual_seed(0)
    return alexnet.alexnet(config.AlexNet(width=0.05, space_to_depth=by_cells, **more), size)


def test_its_checkpoint_is_the_plain_ones_both_ways():
    plain, by_cells = tiny(False), tiny(True)
    assert plain.state_dict().keys() == by_cells.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, by_cells.state_dict()[name]), name  # the same draws too
    assert by_cells.state_dict()["conv1.conv.weight"].shape[1:] == (3, 11, 11)
    for one, other in ((plain, by_cells), (by_cells, plain)):
        one.load_state_dict({k: v + 1 for k, v in other.state_dict().items()})


def test_the_original_network_is_the_one_over_cells_at_every_stage():
    file = golden("alexnet_small")
    plain = small_alexnet(file, "f64").eval()
    by_cells = alexnet.alexnet(config.AlexNet(space_to_depth=True), 224, (4, 6, 8, 5, 5), 48)
    by_cells.load_state_dict(from_original(weights(file, "sd__")))
    by_cells = by_cells.double().eval()
    images = views(file, "f64")
    assert by_cells.space_to_depth is not None
    with torch.no_grad():
        want = plain.outputs(images, STAGES)
        for given in (images, by_cells.space_to_depth(images)):
            for stage, mine, its in zip(STAGES, by_cells.outputs(given, STAGES), want, strict=True):
                torch.testing.assert_close(mine, its, **TOLERANCE["f64"], msg=stage)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(63, 11, 4), (66, 11, 4), (29, 5, 2), (50, 5, 2), (20, 3, 1)]
)
def test_alexnet_takes_turned_views_in_its_cells(size, kernel, stride):
    by_cells = tiny(True, size, kernel=kernel, stride=stride).double().eval()
    plain = tiny(False, size, kernel=kernel, stride=stride).double().eval()
    images = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    rest = ((0, 1, 2, 3), MEAN, STD, torch.float64)
    with torch.no_grad():
        want = plain(rotated_views(images, *rest))
        mine = by_cells(rotated_views(images, *rest, space_to_depth=by_cells.space_to_depth))
    torch.testing.assert_close(mine, want, **TOLERANCE["f64"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_it_trains_as_the_plain_one_within_rounding(precision, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    nets = [
        tiny(by_cells).to(device, memory_format=torch.channels_last) for by_cells in (False, True)
    ]  # type: ignore[call-overload]
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, device=device)
    grads = []
    for net in nets:
        views = rotated_views(images, (0, 1, 2, 3), MEAN, STD, precision, net.space_to_depth)
        with torch.autocast(device, torch.bfloat16, enabled=precision is torch.bfloat16):
            out = net.outputs(views, ("conv1",))[0]
        out.float().square().mean().backward()
        grads.append(net.conv1.conv.weight.grad)
    loose = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[precision]
    assert (grads[0] - grads[1]).norm() <= loose * grads[0].norm()
    assert grads[0].norm() > 0


def test_filters_are_shown_as_the_plain_ones():
    plain, by_cells = first_filters(tiny(False)), first_filters(tiny(True))
    assert by_cells is not None
    assert (by_cells == plain).all()


def test_it_can_be_copied_and_keeps_its_cells():
    by_cells = tiny(True)
    assert copy.deepcopy(by_cells).space_to_depth == by_cells.space_to_depth


# ---- in a run ----


def go(pictures, out, *more: str) -> int:
    """A run of two steps of 32 pixels, judged on all that is held out."""
    tiny = ["demo", "--image-size", "32", "--batch", "4", "--backbone.width", "0.1", "--enlarge"]
    tiny += ["--schedule.steps", "20", "--max-steps", "2", "--log-every", "1", "--workers", "0"]
    tiny += ["--no-tensorboard", "--device", "cpu", "--precision", "fp32"]
    return train.main([*tiny, "--data", str(pictures), "--out", str(out), *more])


def saved(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "checkpoints" / "last.pt")["net"]


def test_runs_with_and_without_it_begin_with_each_others_weights(pictures, tmp_path):
    plain, by_cells = tmp_path / "plain", tmp_path / "by_cells"
    assert go(pictures, plain) == 0
    assert go(pictures, by_cells, "--backbone.space-to-depth") == 0
    logs = [json.loads((run / "summary.json").read_text()) for run in (plain, by_cells)]
    assert logs[0]["val_loss"] == pytest.approx(logs[1]["val_loss"], rel=1e-3)
    assert (by_cells / "plots").is_dir()  # its filters among them
    method = trained_method(by_cells, torch.device("cpu"))
    assert method.net.get_submodule("trunk").space_to_depth is not None
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    nothing = torch.zeros(2, dtype=torch.int64)
    assert rotation_guesses(method, Batch((images,), nothing, nothing, nothing)) is not None
    for source, other in (
        (plain, ["--backbone.space-to-depth"]),
        (by_cells, ["--backbone.no-space-to-depth"]),
    ):
        with pytest.raises(UsageError, match=r"--backbone\.space-to-depth was .*--start-from"):
            go(pictures, source, *other)
        out = tmp_path / f"{source.name}-on"
        more = ["--start-from", str(source), "--max-steps", "1", "--lr", "1e-9"]
        assert go(pictures, out, *other, *more) == 0
        for name, value in saved(source).items():
            if name.endswith("weight"):
                torch.testing.assert_close(saved(out)[name], value, atol=1e-6, rtol=0)
        # both kinds give the same features of the same weights, from pictures of any size
        mine, theirs = (fastrot.load(run) for run in (source, out))
        theirs.net.load_state_dict(mine.net.state_dict())
        for given in (images, images[:, :31, :31]):
            stage = "conv5" if given is images else "conv1"
            torch.testing.assert_close(
                mine.features(given, stage), theirs.features(given, stage), rtol=1e-4, atol=1e-5
            )
