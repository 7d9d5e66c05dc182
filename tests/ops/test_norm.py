"""norm_relu: torch's batch_norm, relu and max_pool2d in float64 are the truth, down to who wins among equals."""

import pytest
import torch
from test_nce import BOTH, interpreted, needs_cuda, shapes_unchecked
from torch.nn import functional as F

from fastrot.config import UsageError
from fastrot.ops import norm as op
from fastrot.ops import norm_kernels as kernels
from fastrot.ops.choice import using
from fastrot.ops.norm import norm_relu

__all__ = ["shapes_unchecked"]  # a fixture

SHAPES = [
    pytest.param((2, 16, 7, 7), id="odd"),
    pytest.param((2, 48, 9, 6), id="three-blocks-of-channels"),
    pytest.param((3, 13, 8, 11), id="channels-of-no-power"),
    pytest.param((2, 64, 13, 13), id="several-tiles"),
    pytest.param((2, 100, 3, 4), id="one-window-and-a-ragged-block"),
]
POOL = pytest.mark.parametrize("pool", [True, False], ids=["pooled", "not-pooled"])
NAMES = ("out", "running_mean", "running_var", "dy", "dweight", "dbias", "dshift")


class Case:
    """y and what goes with it, on purpose with equals, constant channels, weights of zero and below."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device="cpu"):
        draw = torch.Generator().manual_seed(sum(shape))
        c = shape[1]
        y = 2 * torch.randn(shape, generator=draw) + 3
        y[:, 1] = 5.0  # constant
        y[:, 2:4] = y[:, 2:4].round()  # many equals
        weight, bias, shift = (torch.randn(c, generator=draw) for _ in range(3))
        weight[3:5], bias[3] = 0, 0.5
        weight[5] = -2
        bias[6] = -30  # ReLU cuts it all
        mean, var = torch.randn(c, generator=draw), torch.rand(c, generator=draw)
        self.y = y.to(device, dtype).contiguous(memory_format=torch.channels_last)
        self.rest = [each.to(device) for each in (weight, bias, mean, var, shift)]
        self.draw = draw

    def run(self, of, dtype: torch.dtype | None = None, pool: bool = True, shift: bool = True):
        """out, running statistics and gradients, by name; of `of` in one dtype, or in those of the case."""
        y, *rest = [each.detach().clone() for each in (self.y, *self.rest)]
        if dtype is not None:
            y, *rest = [each.to(dtype) for each in (y, *rest)]
        weight, bias, mean, var, less = rest
        leaves = [each.requires_grad_() for each in (y, weight, bias, less)]
        given = dict(shift=less if shift else None, pool=pool)
        out = of(y, weight, bias, mean, var, **given)
        pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grads = torch.autograd.grad(out, leaves, pull, allow_unused=True)
        return dict(zip(NAMES, (out.detach(), mean, var, *grads), strict=True))


def literal(y, weight, bias, mean, var, *, shift, pool):
    whole = y if shift is None else y + shift[:, None, None]
    out = F.batch_norm(whole, mean, var, weight, bias, training=True).relu()
    return F.max_pool2d(out, 3, 2) if pool else out


def assert_near(got: dict, want: dict, tolerance: float):
    """Each channel by the largest of its numbers there, or by one."""
    for name in NAMES[:-1]:
        mine, other = (each[name].double().cpu() for each in (got, want))
        if mine.ndim == 4:
            mine, other = (each.transpose(0, 1).flatten(1) for each in (mine, other))
        scale = other.abs().amax(-1, keepdim=True).clamp_min(1)
        torch.testing.assert_close(mine / scale, other / scale, rtol=0, atol=tolerance, msg=name)


# ---- both forms against the truth ----


@POOL
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_in_float64_is_torchs_own(shape, pool):
    case = Case(shape, torch.float64)
    assert_near(
        case.run(norm_relu, torch.float64, pool), case.run(literal, torch.float64, pool), 1e-12
    )


@pytest.mark.parametrize("form", BOTH)
@POOL
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_near_the_truth(shape, pool, form):
    """The constant channel's y is 5 and its rstd 316: the reference's form of one multiply-add leaves 1e-4 there."""
    case = Case(shape)
    with using(form):
        got = case.run(norm_relu, pool=pool)
    assert_near(got, case.run(literal, torch.float64, pool), 2e-4 if form == "reference" else 2e-5)
    assert got["out"].is_contiguous(memory_format=torch.channels_last)
    assert got["dy"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got["dshift"], torch.zeros(shape[1]))


@pytest.mark.parametrize("form", BOTH)
@POOL
def test_without_a_shift_the_mean_is_that_of_y(form, pool):
    case = Case((2, 16, 7, 7))
    with using(form):
        got = case.run(norm_relu, pool=pool, shift=False)
    assert got["dshift"] is None
    assert_near(got, case.run(literal, torch.float64, pool, shift=False), 2e-4)


# the interpreter cuts bfloat16 off instead of rounding it, hence float16
@interpreted
@POOL
def test_half_precision_rounds_once_and_takes_float32s_winners(pool):
    case = Case((2, 48, 9, 6), torch.float16)
    with using("triton"):
        got = case.run(norm_relu, pool=pool)
    assert got["out"].dtype == got["dy"].dtype == torch.float16
    assert got["dweight"].dtype == torch.float32
    assert_near(got, case.run(literal, torch.float64, pool), 2e-3)


@interpreted
@POOL
def test_many_small_tiles_and_shares_are_merged_to_the_same(pool, monkeypatch):
    case = Case((2, 64, 13, 13))
    for name, value in dict(TILE=512, PER_PROCESSOR=21, SHARES=4, WINDOWS=256, BLOCKS=256).items():
        monkeypatch.setattr(kernels, name, value)
    assert kernels._shared_out(case.y, 338) == (64, 2, 9, 19)
    with using("triton"):
        got = case.run(norm_relu, pool=pool)
    assert_near(got, case.run(literal, torch.float64, pool), 2e-5)


@pytest.mark.parametrize("form", BOTH)
def test_a_mean_far_off_costs_no_digits(form):
    """Sums of squares in float32 would be wrong by some percent."""
    y = torch.randn(4, 16, 20, 20, generator=torch.Generator().manual_seed(0)) + 1000
    y[0, :, 0, 0] = 0  # and the first row tells nothing
    y = y.contiguous(memory_format=torch.channels_last)
    with using(form):
        mean, var = op._batch_statistics(y, torch.zeros(16), torch.ones(16), None, 0.1)
    wide = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), wide[0], rtol=1e-5, atol=0)
    near = 2e-6 if form == "reference" else 2e-7  # torch's own mean is no nearer
    torch.testing.assert_close(mean.double(), wide[1], rtol=near, atol=0)


@pytest.mark.parametrize("form", BOTH)
def test_winners_are_the_first_in_scan_order(form):
    y = torch.zeros(1, 16, 5, 5)
    y[:, :, 1, 1] = y[:, :, 1, 2] = y[:, :, 2, 1] = 1  # equals, within windows and between them
    y[:, 8:] *= -1
    weight = torch.ones(16)
    weight[8:] = -1  # there too they are the largest
    weight[7] = 0
    bias = torch.zeros(16)
    bias[7] = 1
    y = y.contiguous(memory_format=torch.channels_last)
    eps = 2**-10  # torch 2.11 wants one above 0; with this variance the scale is exactly 1
    mean, var = torch.zeros(16), torch.ones(16) - eps
    with using(form):
        out, peak, winner = op._norm_relu(y, weight, bias, None, mean, var, eps, True)
    assert winner[0, 0].tolist() == winner[0, 9].tolist() == [[4, 3], [1, kernels.CUT_OFF]]
    assert winner[0, 7].tolist() == [[0, 0], [0, 0]]
    assert out[0, 0].tolist() == out[0, 9].tolist() == [[1, 1], [1, 0]]
    assert peak[0, 9, 0, 0] == -1


@pytest.mark.parametrize("form", BOTH)
@POOL
def test_one_number_that_is_not_finite_spoils_its_channel_and_is_seen(form, pool):
    for bad in (float("nan"), float("inf")):
        y = torch.randn(2, 16, 7, 7).contiguous(memory_format=torch.channels_last)
        y[1, 4, 3, 3] = bad
        ones = torch.ones(16)
        with using(form):
            out = norm_relu(y, ones, ones * 0, ones * 0, ones.clone(), pool=pool)
        assert out[:, 4].isnan().all()
        assert out[:, [3, 5]].isfinite().all()


# ---- on a GPU ----

LAYERS = [(64, 55, True), (192, 27, True), (256, 13, True), (384, 13, False), (256, 13, False)]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "side", "pool"), LAYERS)
def test_the_kernel_is_near_the_truth_at_alexnets_sizes(channels, side, pool, dtype):
    case = Case((32, channels, side, side), dtype, "cuda")
    want = case.run(literal, torch.float64, pool)
    bound = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert_near(case.run(norm_relu, pool=pool), want, bound)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("shape", SHAPES)
@POOL
def test_the_kernel_is_near_the_truth_at_odd_sizes_on_a_gpu(shape, pool):
    case = Case(shape, device="cuda")
    assert_near(case.run(norm_relu, pool=pool), case.run(literal, torch.float64, pool), 5e-5)


@pytest.mark.gpu
@needs_cuda
def test_the_same_bits_again_and_nothing_waits_on_a_gpu():
    case = Case((64, 192, 27, 27), torch.bfloat16, "cuda")
    y = case.y.clone().requires_grad_()
    weight, bias, mean, var, shift = case.rest
    found = []
    for turn in range(3):
        if turn:
            torch.cuda.set_sync_debug_mode("error")
        try:
            out = norm_relu(y, weight, bias, mean.clone(), var.clone(), shift=shift, pool=True)
            found.append((out, *torch.autograd.grad(out, y, torch.ones_like(out))))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for mine in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(mine, found[0], strict=True))


@pytest.mark.gpu
@needs_cuda
def test_more_than_two_to_the_31_elements():
    some = Case((3, 64, 55, 55), torch.bfloat16, "cuda")
    y = some.y.repeat(3700, 1, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias, mean, var, _ = some.rest
    out = norm_relu(y, weight, bias, mean, var, pool=True)
    (dy,) = torch.autograd.grad(out, y, out.detach())
    assert y.numel() > 2**31
    for each in (out, dy):
        assert torch.equal(each[:3], each[-3:])
    assert dy[-3:].any()


# ---- as an operator ----


@POOL
def test_the_operators_keep_torchs_rules(pool):
    y = torch.randn(2, 16, 7, 6).contiguous(memory_format=torch.channels_last)
    draw = torch.Generator().manual_seed(0)
    weight, bias, shift, mean = (torch.randn(16, generator=draw) for _ in range(4))
    var = torch.rand(16, generator=draw) + 0.5
    torch.library.opcheck(op._batch_statistics, (y, mean.clone(), var.clone(), shift, 0.1))
    leaves = [each.clone().requires_grad_() for each in (y, weight, bias, shift)]
    torch.library.opcheck(op._norm_relu, (*leaves, mean, var, 1e-5, pool))
    out, peak, winner = op._norm_relu(y, weight, bias, shift, mean, var, 1e-5, pool)
    given = (torch.ones_like(out), y, weight, bias, mean, var, peak, winner, 1e-5, pool)
    torch.library.opcheck(op._norm_relu_back, given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(y=torch.zeros(4, 16)), r"y is torch.float32 \(4, 16\): .* \[N, C, H, W\]"),
        (dict(y=torch.zeros(2, 16, 7, 7).int()), "y is torch.int32"),
        (dict(y=torch.zeros(1, 16, 1, 1), pool=False), "two values a channel .* --batch 2"),
        (dict(y=torch.zeros(4, 16, 2, 7)), "y is 2 x 7 pixels"),
        (dict(weight=torch.zeros(15)), r"weight is \(15,\): y of 16 channels"),
        (dict(shift=torch.zeros(1)), r"shift is \(1,\)"),
        (dict(bias=torch.zeros(16, device="meta")), "on cpu and meta"),
    ],
)
def test_wrong_use_is_refused(change, words, shapes_unchecked):
    right = dict(y=torch.zeros(2, 16, 7, 7), pool=True)
    right |= {name: torch.zeros(16) for name in ("weight", "bias", "running_mean", "running_var")}
    with pytest.raises(UsageError, match=words):
        norm_relu(**{**right, **change})


@interpreted
def test_what_the_kernel_does_not_take_is_refused():
    y, zero = torch.zeros(2, 16, 7, 7).double(), torch.zeros(16).double()
    with using("triton"), pytest.raises(UsageError, match=r"no torch.float64: set FASTROT_OPS"):
        norm_relu(y, zero, zero, zero, zero)
