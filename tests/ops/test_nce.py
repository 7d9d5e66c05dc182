"""nce_loss: the originals' numbers, the literal formula, and the kernel equal to the reference down to its draws."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jaxtyping
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from truth import golden

from fastrot.config import RunError, UsageError
from fastrot.ops import nce as op
from fastrot.ops import nce_kernels as kernels
from fastrot.ops.choice import using
from fastrot.ops.nce import Draw, drawn, estimate_z, nce_loss, nce_loss_and_mass
from fastrot.ops.rows import update_rows

T = 0.07
KINDS = ["nce", "infonce"]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
interpreted = pytest.mark.skipif(
    kernels.triton is None or torch.cuda.is_available(),
    reason="for machines with Triton and no GPU",
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=draw), dim=-1)


def integers(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def literal(x, rows, positive, negatives, *, temperature, z=None, population=None, kind, eps=1e-7):
    """Loss and mass [B] in the formula's own steps, for autograd to differentiate."""
    near = rows[torch.cat([positive[:, None], negatives], dim=1)].to(x.dtype)  # [B, K + 1, D]
    powers = torch.exp(torch.einsum("bkd,bd->bk", near, x) / temperature)
    if kind == "infonce":
        return -torch.log(powers[:, 0] / powers.sum(1)), powers.sum(1)
    p, share = powers / z, negatives.shape[1] / (population or len(rows))
    own = p[:, 0] / (p[:, 0] + share + eps)
    others = share / (p[:, 1:] + share + eps)
    return -own.log() - others.log().sum(1), powers.sum(1)


def with_gradient(loss_and_mass, x, *args, weights=None, **knobs):
    """Loss, mass and gradient of the (weighted) sum of the losses."""
    x = x.detach().clone().requires_grad_()
    loss, mass = loss_and_mass(x, *args, **knobs)
    (grad,) = torch.autograd.grad((loss if weights is None else loss * weights).sum(), x)
    return loss.detach(), mass.detach(), grad


def assert_near(got, want, tolerance: float):
    """Losses and masses by their own size, each image's gradient by its largest element."""
    for name, mine, other in zip(("loss", "mass", "grad"), got, want, strict=True):
        mine, other = mine.double().cpu(), other.double().cpu()
        if name == "grad":
            largest = other.abs().amax(1, keepdim=True).clamp_min(0.1)  # of 1 / T = 14
            mine, other = mine / largest, other / largest
            torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)
        else:
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=0)


# ---- the originals' numbers ----

ORIGINALS = golden("nce_lemniscate")
META = json.loads(str(ORIGINALS["meta_json"]))
FORMS = [
    pytest.param("f64", "reference", 1e-12, id="float64"),
    pytest.param("f32", "reference", 2e-5, id="float32"),
    pytest.param("f32", "triton", 2e-5, id="kernel", marks=interpreted),
]
BY_KERNEL = (
    "c01_basic",
    "c02_Zestimate",
    "c03_duplicate_y",
    "c05_K1",
)  # the others are its tests' below


@pytest.mark.parametrize(
    ("case", "precision", "form", "tolerance"),
    [
        pytest.param(case, *form.values, id=f"{case}-{form.id}", marks=form.marks)
        for case in META
        for form in FORMS
        if form.id != "kernel" or case in BY_KERNEL
    ],
)
def test_losses_gradients_and_rows_are_those_of_the_original_code(case, precision, form, tolerance):
    meta, dtype = META[case], {"f64": torch.float64, "f32": torch.float32}[precision]
    told = {key.split("__")[1]: value for key, value in ORIGINALS.items() if key.startswith(case)}
    x, rows = (torch.tensor(told[name], dtype=dtype) for name in ("x", "bank"))
    y, index = torch.tensor(told["y"]), torch.tensor(told["idx"]).long()
    knobs = dict(temperature=float(told[f"{precision}_T_used"]), population=meta["nLem"])
    with using(form):
        z = meta["Z_in"]
        if z < 0:
            z = estimate_z(x, rows, y, index[:, 1:], **knobs)
            torch.testing.assert_close(
                z.double(), torch.tensor(told["f64_Z_after"]), rtol=tolerance, atol=0
            )
        loss, mass, grad = with_gradient(
            nce_loss_and_mass, x, rows, y, index[:, 1:], z=z, kind="nce", **knobs
        )
        update_rows(rows, y, x, float(told[f"{precision}_m_used"]))
    grad /= len(x)  # the original means over the images
    powers = torch.tensor(told["f64_out"]) * float(z)
    np.testing.assert_allclose(loss.double().mean(), told["f64_loss"], rtol=tolerance)
    np.testing.assert_allclose(mass, powers.sum(1), rtol=tolerance)
    largest = np.abs(told["f64_grad_x"]).max()
    np.testing.assert_allclose(grad, told["f64_grad_x"], rtol=0, atol=tolerance * largest)
    after = told["f64_rows_after"]
    np.testing.assert_allclose(rows[told["rows"]], after, rtol=0, atol=tolerance)
    untouched = np.setdiff1d(np.arange(len(rows)), told["rows"])
    assert torch.equal(rows[untouched], torch.tensor(told["bank"], dtype=dtype)[untouched])


def test_uniform_draws_are_what_the_originals_alias_tables_encode():
    told = golden("alias")
    for name in ("uniform7", "uniform1000"):
        implied = told[f"{name}__implied"]
        rows = len(implied)
        np.testing.assert_allclose(implied, 1 / rows, rtol=1e-6)
        # the share of the 2**32 words that give each row
        ends = np.array([-(-(row << 32) // rows) for row in range(rows + 1)], dtype=object)
        np.testing.assert_allclose(np.diff(ends).astype(float) / 2**32, implied, rtol=1e-5)
        words = torch.tensor([int(end) for end in ends[:-1]])
        assert torch.equal(op.scaled(words, rows), torch.arange(rows))
        assert torch.equal(op.scaled(words[1:] - 1, rows), torch.arange(rows - 1))


def three_steps(dtype: torch.dtype, eps: float = 1e-7) -> tuple[list, torch.Tensor]:
    """Loss, bank and frozen Z of three steps, and the bank they leave; written out by numpy in float64."""
    rows, z, losses = unit(40, 16).double().numpy().copy(), None, []
    for step in range(3):
        x = unit(5, 16, seed=step).double().numpy()
        y, negatives = integers(40, 5, seed=step).numpy(), integers(40, 5, 7, seed=9 + step).numpy()
        powers = np.exp(np.einsum("bkd,bd->bk", rows[np.c_[y, negatives]], x) / T)
        z = powers.mean() * 40 if z is None else z
        p, share = powers / z, 7 / 40
        own, others = p[:, 0] / (p[:, 0] + share + eps), share / (p[:, 1:] + share + eps)
        losses.append(-np.log(own) - np.log(others).sum(1))
        old = rows.copy()
        for i, row in enumerate(y):
            blend = 0.9 * old[row] + (1 - 0.9) * x[i]
            rows[row] = blend / np.linalg.norm(blend)
    return losses, torch.tensor(rows)


@pytest.mark.parametrize("tolerance", [1e-12, 2e-5], ids=["float64", "float32"])
def test_three_steps_with_z_frozen_after_the_first(tolerance):
    dtype = torch.float64 if tolerance < 1e-9 else torch.float32
    want, bank = three_steps(dtype)
    rows, z = unit(40, 16).to(dtype), None
    for step in range(3):
        x = unit(5, 16, seed=step).to(dtype)
        y, negatives = integers(40, 5, seed=step), integers(40, 5, 7, seed=9 + step)
        if z is None:
            z = estimate_z(x, rows, y, negatives, temperature=T)
        loss = nce_loss(x, rows, y, negatives, temperature=T, z=z)
        # unit() is float32: in float64 its last bits are those of the inputs, the same for both
        np.testing.assert_allclose(loss, want[step], rtol=tolerance)
        update_rows(rows, y, x, 0.9)
    np.testing.assert_allclose(rows, bank, rtol=0, atol=tolerance)


# ---- reference against the literal formula ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("b", "k", "d"),
    [
        pytest.param(1, 1, 16, id="one-of-each"),
        pytest.param(1024, 16, 32, id="many-images-few-negatives"),
        pytest.param(192, 100, 128, id="several-images-a-piece"),
        pytest.param(3, 4096, 128, id="paper"),
        pytest.param(2, 3000, 512, id="wide-in-pieces"),
        pytest.param(1, 65536, 64, id="all-negatives"),
    ],
)
def test_reference_is_the_formula(b, k, d, kind):
    x, rows = unit(b, d, seed=1), unit(500, d)
    positive, negatives = integers(500, b), integers(500, b, k)
    knobs = dict(temperature=T, z=1200.0, population=700, kind=kind)
    want = with_gradient(literal, x.double(), rows.double(), positive, negatives, **knobs)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        got = with_gradient(
            nce_loss_and_mass, x.to(dtype), rows.to(dtype), positive, negatives, **knobs
        )
        assert all(part.dtype == dtype for part in got)
        assert_near(got, want, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checks_numerically_and_takes_what_flows_in(kind):
    x, rows = unit(4, 6).double(), unit(20, 6).double()
    where = (rows, integers(20, 4), integers(20, 4, 9))
    knobs = dict(temperature=0.3, z=30.0, kind=kind)
    assert torch.autograd.gradcheck(
        lambda x: nce_loss(x, *where, **knobs), x.clone().requires_grad_()
    )
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    got = with_gradient(nce_loss_and_mass, x, *where, weights=weights, **knobs)
    want = with_gradient(literal, x, *where, weights=weights, **knobs)
    torch.testing.assert_close(got[2], want[2], rtol=1e-12, atol=1e-14)


def test_nothing_else_has_a_gradient():
    x, rows = unit(4, 6).requires_grad_(), unit(20, 6).requires_grad_()
    z = torch.tensor(30.0, requires_grad=True)
    where = (rows, integers(20, 4), integers(20, 4, 9))
    loss, mass = nce_loss_and_mass(x, *where, temperature=T, z=z)
    assert loss.requires_grad
    assert not mass.requires_grad
    loss.sum().backward()
    assert rows.grad is None
    assert z.grad is None
    assert not estimate_z(x, *where, temperature=T).requires_grad
    with torch.no_grad():
        assert not nce_loss(x, *where, temperature=T, z=z).requires_grad


def test_a_second_derivative_is_refused_and_not_zero():
    x = unit(4, 6).requires_grad_()
    where = (unit(20, 6), integers(20, 4), integers(20, 4, 9))
    loss = nce_loss(x, *where, temperature=T, z=30.0).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_bfloat16_rows_are_read_as_they_are():
    x, rows = unit(5, 24).double(), unit(30, 24).bfloat16()
    where = (integers(30, 5), integers(30, 5, 40))
    knobs = dict(temperature=T, z=60.0, kind="nce")
    want = with_gradient(literal, x, rows.double(), *where, **knobs)
    assert_near(with_gradient(nce_loss_and_mass, x, rows, *where, **knobs), want, 1e-12)
    assert_near(with_gradient(nce_loss_and_mass, x.float(), rows, *where, **knobs), want, 2e-5)


def test_z_is_the_mean_power_and_mass_follows_it():
    x, rows = unit(6, 16).double(), unit(50, 16).double()
    where = (integers(50, 6), integers(50, 6, 30))
    powers = literal(x, rows, *where, temperature=T, kind="infonce")[1] / 31
    z = estimate_z(x, rows, *where, temperature=T, population=1000)
    torch.testing.assert_close(z, powers.mean() * 1000, rtol=1e-12, atol=0)
    for kind in KINDS:
        _, mass = nce_loss_and_mass(x, rows, *where, temperature=T, z=z, kind=kind)
        torch.testing.assert_close(mass.mean() / 31 * 1000, z, rtol=1e-12, atol=0)


# ---- negatives that are drawn ----


def a_draw(b: int, k: int, *, step: int = 5, seed: int = 2**40 + 7, **more) -> Draw:
    return Draw(k, seed, torch.arange(b) * (2**31 + 11) + 3, torch.tensor(step), **more)


def test_a_draw_is_its_address_written_out():
    draw, rows = a_draw(3, 11), 1_281_167
    picks = drawn(draw, torch.zeros(3, dtype=torch.int64), rows)
    assert picks.shape == (3, 11)
    for i, index in enumerate(draw.index.tolist()):
        for k in range(11):
            counter = [torch.tensor(c) for c in (k // 4, index & 2**32 - 1, index >> 32, 5)]
            word = int(op.philox(draw.seed, *counter)[k % 4])
            assert picks[i, k] == word * rows >> 32


def test_draws_belong_to_picture_and_step_alone():
    draw, positive = a_draw(6, 50), integers(900, 6)
    whole = drawn(draw, positive, 900)
    halves = [
        drawn(replace(draw, index=draw.index[half]), positive[half], 900)
        for half in (slice(0, 3), slice(3, 6))
    ]
    assert torch.equal(whole, torch.cat(halves))
    for other in (replace(draw, step=torch.tensor(6)), replace(draw, seed=draw.seed + 1)):
        assert (drawn(other, positive, 900) == whole).float().mean() < 0.02
    assert torch.equal(drawn(replace(draw, seed=draw.seed - 2**64), positive, 900), whole)
    assert torch.equal(drawn(replace(draw, count=13), positive, 900), whole[:, :13])


def test_leaving_itself_out_steps_over_one_row_and_keeps_the_rest_uniform():
    draw, rows = a_draw(5, 4000, exclude_self=True), 8
    positive = torch.tensor([0, 3, 7, 7, 1])
    picks = drawn(draw, positive, rows)
    plain = drawn(replace(draw, exclude_self=False), positive, rows - 1)
    for own, mine, other in zip(positive.tolist(), picks, plain, strict=True):
        left = torch.tensor([row for row in range(rows) if row != own])
        assert torch.equal(mine, left[other])  # the draw from N - 1, renamed one to one
        assert len(mine.unique()) == rows - 1
    assert picks.min() == 0
    assert picks.max() == rows - 1


@pytest.mark.parametrize("others", [False, True], ids=["with-itself", "without"])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_draws_what_drawn_says(kind, others, monkeypatch):
    monkeypatch.setattr(op, "PIECE", 2 * 333 * 16)  # two images at a time
    monkeypatch.setattr(op, "PICKS", 4 * 333)  # four images a draw
    x, rows, positive = unit(9, 16), unit(40, 16), integers(40, 9)
    draw = a_draw(9, 333, exclude_self=others)
    knobs = dict(temperature=T, z=90.0, kind=kind)
    explicit = drawn(draw, positive, 40)
    want = with_gradient(literal, x.double(), rows.double(), positive, explicit, **knobs)
    for negatives in (draw, explicit):
        got = with_gradient(nce_loss_and_mass, x, rows, positive, negatives, **knobs)
        assert_near(got, want, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn_inside", [False, True], ids=["explicit", "draw"])
def test_threads_share_the_images_and_change_no_bit(drawn_inside, kind):
    b, k = 7, 2000
    x, rows, positive = unit(b, 64), unit(300, 64), integers(300, b)
    negatives = a_draw(b, k, exclude_self=True) if drawn_inside else integers(300, b, k, seed=1)
    assert b * k * 64 > op.PIECE
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            seen.append(
                with_gradient(
                    nce_loss_and_mass, x, rows, positive, negatives, temperature=T, z=9.0, kind=kind
                )
            )
            with ThreadPoolExecutor(1) as later:  # a new thread's share is as before, too
                assert later.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


# ---- kernel ----


@dataclass(frozen=True)
class Case:
    """What the kernel is given; its table has one line for each branch."""

    b: int = 3
    k: int = 100
    d: int = 16
    n: int = 50
    rows: torch.dtype = torch.float32
    draw: bool = True
    others: bool = False
    at_once: int = 128  # rows of one load
    processors: int = 0


CASES = {
    "one-block": Case(),
    "explicit": Case(draw=False),
    "itself-left-out": Case(others=True, n=7),
    "one-negative": Case(k=1),
    "two-negatives-explicit": Case(k=2, draw=False),
    "several-turns": Case(k=100, at_once=8),
    "more-turns-than-a-product-holds": Case(b=1, k=300, d=4, at_once=4),
    "whole-blocks": Case(k=64, at_once=8),
    "many-splits": Case(b=2, k=333, at_once=8, processors=1),
    "many-splits-explicit": Case(b=2, k=333, at_once=8, processors=1, draw=False),
    "more-splits-than-the-second-stage-adds-at-once": Case(
        b=1, k=700, d=2, at_once=16, processors=1
    ),
    "ragged-width": Case(d=37),
    "ragged-width-explicit-bfloat16": Case(d=100, rows=torch.bfloat16, draw=False),
    "paper-width": Case(d=128, k=600, n=1000, at_once=64, processors=1),
    "paper-width-bfloat16": Case(d=128, k=600, n=1000, rows=torch.bfloat16, others=True),
    "one-feature": Case(d=1, k=40),
    "widest": Case(b=1, d=1024, k=40, at_once=4),
    "more-negatives-than-rows": Case(k=500, n=3),
    "two-rows-without-itself": Case(k=20, n=2, others=True),
    "collisions-with-the-positive": Case(k=60, n=2, draw=False),
    "many-images": Case(b=12, k=30),
}
LARGE = {
    "paper": Case(b=192, k=4096, d=128, n=100_000),
    "paper-bfloat16": Case(b=192, k=4096, d=128, n=100_000, rows=torch.bfloat16, others=True),
    "paper-explicit": Case(b=192, k=4096, d=128, n=100_000, rows=torch.bfloat16, draw=False),
    "largest": Case(b=1024, k=65536, d=512, n=100_000, rows=torch.bfloat16),
    "largest-explicit": Case(b=64, k=65536, d=512, n=100_000, draw=False),
    "one-image": Case(b=1, k=65536, d=128, n=100_000),
}


def given(case: Case) -> tuple:
    rows = unit(case.n, case.d).to(case.rows)
    positive = integers(case.n, case.b)
    if case.draw:
        negatives = a_draw(case.b, case.k, seed=-3, exclude_self=case.others)
    else:
        negatives = integers(case.n, case.b, case.k)
    return unit(case.b, case.d, seed=1), rows, positive, negatives


def moved(negatives: torch.Tensor | Draw, device: str) -> torch.Tensor | Draw:
    if isinstance(negatives, Draw):
        return replace(negatives, index=negatives.index.to(device), step=negatives.step.to(device))
    return negatives.to(device)


def kernel_is_the_reference(case: Case, kind: str, device: str = "cpu", images: int = 8):
    """Some of the images in float64 by the reference, all in float32 by the kernel, twice to the same bits."""
    x, rows, positive, negatives = given(case)
    knobs = dict(temperature=T, z=2.5 * case.n, kind=kind)
    few = slice(0, images)
    fewer = replace(negatives, index=negatives.index[few]) if case.draw else negatives[few]
    with using("reference"):
        want = with_gradient(
            nce_loss_and_mass, x[few].double(), rows, positive[few], fewer, **knobs
        )
    with using("triton"):
        on_device = [t.to(device) for t in (x, rows, positive)]
        got = with_gradient(nce_loss_and_mass, *on_device, moved(negatives, device), **knobs)
        assert all(torch.isfinite(part).all() for part in got)
        assert_near([part[few] for part in got], want, 2e-5)
        if case.b < 4 or device != "cpu":
            again = with_gradient(nce_loss_and_mass, *on_device, moved(negatives, device), **knobs)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_interpreted_kernel_is_the_reference(case, kind, monkeypatch):
    monkeypatch.setattr(kernels, "_rows_at_once", lambda x, row_bytes: case.at_once)
    monkeypatch.setattr(kernels, "processors", lambda x: case.processors)
    monkeypatch.setattr(
        kernels, "STEP", 4 * kernels.triton.next_power_of_2(case.d)
    )  # four shares at a time
    kernel_is_the_reference(case, kind, images=40)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", {**CASES, **LARGE}.values(), ids={**CASES, **LARGE})
def test_kernel_is_the_reference_on_a_gpu(case, kind):
    kernel_is_the_reference(case, kind, "cuda")


def test_shares_fill_the_gpu_and_stay_small():
    for b, k, d, at_once in [
        (192, 4096, 128, 16),
        (1, 65536, 128, 16),
        (64, 64, 128, 16),
        (8, 1, 4, 64),
    ]:
        splits, turns = kernels._shared_out(b, k, d, at_once, 132)
        blocks = math.ceil(k / (4 * at_once))
        assert (splits - 1) * turns < blocks <= splits * turns  # all blocks, and no idle program
        assert splits == 1 or splits * d < k
    splits, _ = kernels._shared_out(192, 4096, 128, 16, 132)
    assert 8 <= 192 * splits / 132 <= 16


def exactly_drawn(device: str):
    """Rows that say their own number, seen through the gradient at x = 0, negative after negative."""
    n, b = 1_281_167, 3
    rows = torch.stack([torch.arange(n) % 2048, torch.arange(n) // 2048], dim=1).float()
    positive = torch.zeros(b, dtype=torch.int64)  # whose row is (0, 0)
    draw = a_draw(b, 9, seed=-5, exclude_self=True)
    want = drawn(draw, positive, n)
    seen = [torch.zeros(b, 2, dtype=torch.float64)]
    with using("triton"):
        x = torch.zeros(b, 2, device=device)
        for k in range(1, 10):
            where = (rows.to(device), positive.to(device), moved(replace(draw, count=k), device))
            _, _, grad = with_gradient(
                nce_loss_and_mass, x, *where, temperature=1.0, kind="infonce"
            )
            seen.append((grad.cpu().double() * (k + 1)).round())  # the sum of the rows drawn
    digits = torch.stack(seen, dim=1).diff(dim=1).long()  # [B, K, 2]
    assert torch.equal(digits[..., 0] + 2048 * digits[..., 1], want)


@interpreted
def test_interpreted_kernel_draws_the_same_integers():
    exactly_drawn("cpu")


@pytest.mark.gpu
@needs_cuda
def test_kernel_draws_the_same_integers_on_a_gpu():
    exactly_drawn("cuda")


class Made(TorchDispatchMode):
    """The sizes, in bytes, of all memory that is asked for inside."""

    def __init__(self):
        super().__init__()
        self.bytes, self.known = [0], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.bytes.append(storage.nbytes())
        return out


class Launched(dict):
    """A kernel that only notes how many programs it was asked for."""

    def __missing__(self, grid: tuple[int]):
        self[grid] = lambda *arguments, **constants: None
        return self[grid]


@pytest.mark.skipif(kernels.triton is None, reason="needs Triton")
def test_kernel_path_with_a_draw_makes_nothing_of_b_times_k(monkeypatch):
    first, second = Launched(), Launched()
    monkeypatch.setattr(kernels, "_nce_kernel", first)
    monkeypatch.setattr(kernels, "_finish_kernel", second)
    monkeypatch.setattr(kernels, "processors", lambda x: 132)
    monkeypatch.setattr(kernels, "_rows_at_once", lambda x, row_bytes: 16)  # as on a GPU
    for b, k in ((2, 4096), (192, 4096), (7, 300)):
        x, rows, positive = unit(b, 128), unit(50, 128), integers(50, b)
        draw = a_draw(b, k)
        with Made() as made:
            kernels.launch(x, rows, positive, draw, torch.tensor(9.0), T, 50, 1e-7)
        assert b * 128 * 4 <= max(made.bytes) < b * k * 4
    assert list(second) == [(2,), (192,), (7,)]
    assert next(iter(first)) == (2 * 22,)


def test_reference_never_makes_a_twentieth_of_the_gather():
    x, rows, positive = unit(24, 128), unit(50, 128), integers(50, 24)
    for negatives in (integers(50, 24, 4096), a_draw(24, 4096)):
        made = Made()
        made.known |= {t.untyped_storage().data_ptr() for t in (x, rows, positive)}
        if isinstance(negatives, torch.Tensor):
            made.known.add(negatives.untyped_storage().data_ptr())
        with made:
            op.nce_reference(x, rows, positive, negatives, torch.tensor(90.0), T, 50, 1e-7)
        assert 2**20 < max(made.bytes) < 192 * 4097 * 128 * 4 / 100  # of the paper's batch


# ---- scores that would break a plainer formula ----

BOTH = [
    pytest.param("reference", id="reference"),
    pytest.param("triton", id="kernel", marks=interpreted),
]


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [700.0, -700.0, 0.0], ids=["overflow", "underflow", "zero"])
def test_extreme_scores_keep_loss_and_gradient_right(size, kind, form):
    """|s| / T = 1e4: exp overflows float32 and float64 both. The positive is one of the lowest, too."""
    rows = torch.nn.functional.pad(torch.eye(4), (0, 12)).repeat(3, 1)
    x = size * rows[:4] + unit(4, 16, seed=3) * 0.01
    if size < 0:
        x = x - 700 * rows[:4].sum(0)  # every score is far below 0
    where = (rows, torch.tensor([0, 1, 6, 7]), integers(12, 4, 40))
    knobs = dict(temperature=T, z=25.0, kind=kind)
    with using("reference"):
        want = with_gradient(nce_loss_and_mass, x.double(), rows.double(), *where[1:], **knobs)
    with using(form):
        got = with_gradient(nce_loss_and_mass, x, *where, **knobs)
    assert all(torch.isfinite(part).all() for part in (got[0], got[2], want[0], want[2]))
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-5, atol=1e-5)
    # a score of 1e4 has an error of 1e-3 in float32, and so have the weights of 1 / T = 14
    torch.testing.assert_close(got[2].double(), want[2], rtol=0, atol=0.02)
    if size > 0:
        assert torch.isinf(got[1]).all()
    if size < 0:
        assert (got[1] == 0).all()


def softplus(u: float) -> float:
    return max(u, 0.0) + math.log1p(math.exp(-abs(u)))


@pytest.mark.parametrize("score", [1e4, 25.0, -25.0, -1e4])
def test_the_log_form_is_the_formula_taken_to_its_limit(score):
    """Where s / T is 1e4 the formula's own steps are inf / inf."""
    x, rows = torch.tensor([[score * T, 0.0]]).double(), torch.eye(2).double()
    where = (torch.tensor([0]), torch.tensor([[0, 1, 0]]))
    loss = nce_loss(x, rows, *where, temperature=T, z=5.0, population=2)
    level = math.log(5.0) + math.log(3 / 2 + 1e-7)
    want = softplus(level - score) + 2 * softplus(score - level) + softplus(-level)
    assert loss.item() == pytest.approx(want + 3 * math.log1p(1e-7 * 2 / 3), rel=1e-14)
    plain, _ = literal(x, rows, *where, temperature=T, z=5.0, population=2, kind="nce")
    if score > 1e3:
        assert plain.isnan().all()


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_loss_is_as_exact_as_a_large_one(kind, form):
    """The positive fits and the negatives do not: 1 + exp(-12) or 1 + 40 exp(-14) keeps 2 or 3 digits in float32."""
    rows = torch.eye(16)
    size = 3.0 if kind == "nce" else 1.0
    where = (rows, torch.tensor([0, 5]), integers(4, 2, 40) + torch.tensor([[1], [8]]))
    knobs = dict(temperature=T, z=16 * math.exp(11.0), kind=kind, eps=1e-12)
    x = size * rows[[0, 5]]
    want = with_gradient(literal, x.double(), rows.double(), *where[1:], **knobs)
    assert (want[0] < 1e-3).all()
    with using(form):
        got = with_gradient(nce_loss_and_mass, x, *where, **knobs)
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-5, atol=0)


@pytest.mark.parametrize("form", BOTH)
def test_products_of_many_factors_do_not_overflow(form, monkeypatch):
    """At u = 0 each factor is 2: 164 of them in one place pass float32."""
    monkeypatch.setattr(kernels, "_rows_at_once", lambda x, row_bytes: 1)
    monkeypatch.setattr(kernels, "processors", lambda x: 0)
    where = (torch.zeros(1, 4), unit(9, 4), integers(9, 1), integers(9, 1, 164))
    with using(form):
        loss = nce_loss(*where, temperature=T, z=9 / 164, population=9)
    assert loss.item() == pytest.approx(165 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("falling", [False, True], ids=["rises", "falls"])
def test_a_maximum_that_moves_from_block_to_block(falling, form, monkeypatch):
    monkeypatch.setattr(op, "PIECE", 3 * 16)
    monkeypatch.setattr(kernels, "_rows_at_once", lambda x, row_bytes: 2)
    monkeypatch.setattr(kernels, "processors", lambda x: 1)
    x, rows = unit(2, 16, seed=1), unit(60, 16)
    negatives = (x @ rows.T).argsort(dim=1, descending=falling)
    where = (rows, torch.tensor([3, 4]), negatives)
    want = with_gradient(
        literal, x.double(), rows.double(), *where[1:], temperature=T, kind="infonce"
    )
    with using(form):
        got = with_gradient(nce_loss_and_mass, x, *where, temperature=T, kind="infonce")
    assert_near(got, want, 2e-5)


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn_inside", [False, True], ids=["explicit", "draw"])
def test_a_nan_row_spoils_only_the_images_that_meet_it(kind, form, drawn_inside):
    x, rows, positive = unit(9, 16), unit(90, 16), integers(90, 9)
    negatives = a_draw(9, 12) if drawn_inside else integers(90, 9, 12, seed=2)
    rows[11] = float("nan")
    rows[12, 3] = float("inf")
    picks = drawn(negatives, positive, 90) if drawn_inside else negatives
    positive[0], positive[1] = 11, 12
    meets = ((picks == 11) | (picks == 12)).any(1)
    meets[:2] = True
    assert 2 < meets.sum() < 8
    with using(form):
        loss, mass, grad = with_gradient(
            nce_loss_and_mass, x, rows, positive, negatives, temperature=T, z=90.0, kind=kind
        )
    assert torch.isfinite(loss[~meets]).all()
    assert torch.isfinite(grad[~meets]).all()
    assert torch.isfinite(mass[~meets]).all()
    of_nan = (picks == 11).any(1) | (positive == 11)
    assert torch.isnan(loss[of_nan]).all()
    assert torch.isnan(grad[of_nan]).any(1).all()
    assert not torch.isfinite(grad[meets]).all(1).any()


WRONG = [-1, 60, 2**62, -(2**62)]


def poisoned_where_the_index_is_wrong(device: str):
    for kind in KINDS:
        for wrong in WRONG:
            x, rows, positive = unit(4, 16), unit(60, 16), integers(60, 4)
            negatives = integers(60, 4, 40)
            positive[1], negatives[2, 37] = wrong, wrong
            with using("triton"):
                parts = with_gradient(
                    nce_loss_and_mass, x.to(device), rows.to(device), positive.to(device),
                    negatives.to(device), temperature=T, z=90.0, kind=kind,
                )  # fmt: skip
            for part in parts:
                bad = part.cpu().reshape(4, -1).isnan().all(1)
                assert bad.tolist() == [False, True, True, False]


@interpreted
def test_interpreted_kernel_poisons_the_images_whose_index_is_wrong():
    poisoned_where_the_index_is_wrong("cpu")


@pytest.mark.gpu
@needs_cuda
def test_kernel_poisons_the_images_whose_index_is_wrong_on_a_gpu():
    poisoned_where_the_index_is_wrong("cuda")


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_kernel_gives_nan_for_features_that_are_not_finite(kind):
    x, rows, positive = unit(4, 16), unit(60, 16), integers(60, 4)
    x[1, 3], x[2] = float("nan"), float("inf")
    with using("triton"):
        loss = nce_loss(x, rows, positive, a_draw(4, 40), temperature=T, z=90.0, kind=kind)
    assert loss.isnan().tolist() == [False, True, True, False]


def test_a_spoilt_z_is_seen():
    where = (unit(2, 4), unit(9, 4), integers(9, 2), integers(9, 2, 5))
    for z in (float("nan"), -1.0):
        assert nce_loss(*where, temperature=T, z=torch.tensor(z)).isnan().all()


# ---- beyond 2**31 elements ----


@pytest.fixture(scope="module")
def vast() -> torch.Tensor:
    """More than 2**31 elements, of which the last rows alone are written: the rest is memory that is never touched."""
    untouched = np.zeros((2**24 + 64, 128), np.int16)  # torch.zeros would write them all
    rows = torch.from_numpy(untouched).view(torch.bfloat16)
    rows[-64:] = unit(64, 128, seed=4)
    return rows


def beyond(vast: torch.Tensor, form: str):
    x, last = unit(3, 128), len(vast) - 64
    positive, negatives = last + integers(64, 3), last + integers(64, 3, 50)
    small = vast[-64:].clone()
    knobs = dict(temperature=T, z=90.0, population=64, kind="nce")
    want = with_gradient(
        nce_loss_and_mass, x.double(), small, positive.cpu() - last, negatives - last, **knobs
    )
    with using(form):
        where = [t.to(vast.device) for t in (positive, negatives)]
        got = with_gradient(nce_loss_and_mass, x.to(vast.device), vast, *where, **knobs)
        assert_near(got, want, 2e-5)
        index = torch.tensor([last + 5, 2**24 + 63, last + 5])
        update_rows(vast, index.to(vast.device), x.to(vast.device), 0.5)
        with using("reference"):
            update_rows(small, index - last, x, 0.5)
    torch.testing.assert_close(vast[-64:].float().cpu(), small.float(), rtol=1 / 128, atol=1e-6)
    assert not vast[5].any()
    assert not vast[63].any()


@pytest.mark.parametrize("form", BOTH)
def test_rows_beyond_two_to_the_31_elements(vast, form):
    beyond(vast, form)
    draw = a_draw(2, 8)
    with using(form):  # most rows are zero: their scores are 0
        loss, mass = nce_loss_and_mass(
            torch.ones(2, 128), vast, integers(9, 2), draw, temperature=T, z=90.0, kind="infonce"
        )
    assert drawn(draw, integers(9, 2), len(vast)).max() > 2**23
    torch.testing.assert_close(mass, torch.full((2,), 9.0))
    torch.testing.assert_close(loss, torch.full((2,), math.log(9.0)))


@pytest.mark.gpu
@needs_cuda
def test_rows_beyond_two_to_the_31_elements_on_a_gpu(vast):
    beyond(vast.cuda(), "triton")


# ---- as an operator ----


@pytest.fixture
def shapes_unchecked():
    """As users run it: torch.compile cannot look into the shape checks that only tests switch on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_operator_keeps_torchs_rules():
    x, rows, positive = unit(3, 6).requires_grad_(), unit(9, 6), integers(9, 3)
    draw = a_draw(3, 5)
    z, rest = torch.tensor(20.0), (T, 9, 1e-7)
    explicit = (x, rows, positive, integers(9, 3, 5), None, None, 0, 0, False, z, *rest)
    inside = (x, rows, positive, None, draw.index, draw.step, 5, draw.seed, True, None, *rest)
    turned = (unit(6, 3).T.requires_grad_(), *explicit[1:])  # not contiguous
    for arguments in (explicit, inside, turned):
        torch.library.opcheck(op._nce_op, arguments)


@pytest.mark.parametrize("drawn_inside", [False, True], ids=["explicit", "draw"])
def test_it_compiles_whole_and_a_new_step_recompiles_nothing(drawn_inside, shapes_unchecked):
    x, rows, positive = unit(4, 16), unit(60, 16), integers(60, 4)

    def step(x, rows, positive, negatives, z):
        loss, mass = nce_loss_and_mass(x * 2, rows, positive, negatives, temperature=T, z=z)
        update_rows(rows, positive, x, 0.5)
        return loss.mean(), mass

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    mine, other = rows.clone(), rows.clone()
    for now in range(3):
        negatives = a_draw(4, 40, step=now) if drawn_inside else integers(60, 4, 40, seed=now)
        got, want = (
            with_gradient(run, x, bank, positive, negatives, torch.tensor(90.0 + now))
            for run, bank in ((compiled, mine), (step, other))
        )
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(mine, other)
    assert graphs.frame_count == 1


@pytest.mark.gpu
@needs_cuda
def test_nothing_waits_for_the_gpu_and_a_replayed_graph_draws_anew():
    x, rows, positive, draw = (
        moved(t, "cuda") if isinstance(t, Draw) else t.cuda() for t in given(Case())
    )
    z = torch.tensor(90.0, device="cuda")

    def run():
        loss, mass = nce_loss_and_mass(x, rows, positive, draw, temperature=T, z=z)
        update_rows(rows, positive, x, 1.0, 1e-12)
        return loss, mass, estimate_z(x, rows, positive, draw, temperature=T)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    seen = []
    for step in (3, 4):
        draw.step.fill_(step)
        graph.replay()
        seen.append([part.clone() for part in captured])
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], run(), strict=True))
    assert not torch.equal(seen[0][0], seen[1][0])


def test_no_images_give_no_losses():
    x = torch.zeros(0, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    for form in ("reference", "triton") if kernels.triton is not None else ("reference",):
        with using(form):
            loss = nce_loss(x, unit(9, 4), none, none[:, None].expand(0, 3), temperature=T, z=9.0)
        assert loss.shape == (0,)
        loss.sum().backward()


# ---- what is refused ----


def changed(draw: Draw, **fields) -> Draw:
    """The draw with other fields, past the tests' own shape checks."""
    draw = replace(draw)
    for name, value in fields.items():
        object.__setattr__(draw, name, value)
    return draw


INT = torch.int64
REFUSED = {
    "T": (dict(temperature=0.0), "--method.temperature got 0.0: it wants a number above 0"),
    "T-negative": (dict(temperature=-0.1), "--method.temperature got -0.1"),
    "T-nan": (dict(temperature=float("nan")), "--method.temperature got nan"),
    "T-infinite": (dict(temperature=float("inf")), "--method.temperature got inf"),
    "no-negatives": (dict(negatives=torch.zeros(2, 0, dtype=INT)), "--method.negatives got 0"),
    "draw-of-none": (dict(negatives=a_draw(2, 0)), "--method.negatives got 0"),
    "z-missing": (dict(z=None), "z got None: nce wants a number above 0"),
    "z-zero": (dict(z=0.0), "z got 0.0: nce wants a number above 0"),
    "z-shape": (dict(z=torch.ones(2)), r"z is torch.float32 \(2,\)"),
    "population": (dict(population=0), "population got 0: it wants 1 or more"),
    "kind": (dict(kind="softmax"), "kind got 'softmax': it wants nce or infonce"),
    "x-shape": (dict(x=torch.zeros(4)), r"x is torch.float32 \(4,\)"),
    "x-half": (dict(x=torch.zeros(2, 4).half()), r"x is torch.float16 \(2, 4\)"),
    "rows-width": (dict(rows=torch.zeros(9, 5)), r"rows are torch.float32 \(9, 5\)"),
    "rows-dtype": (dict(rows=torch.zeros(9, 4).half()), "rows are torch.float16"),
    "rows-wider-than-x": (dict(rows=torch.zeros(9, 4).double()), "rows are torch.float64"),
    "rows-strided": (dict(rows=torch.zeros(4, 9).T), "not contiguous"),
    "rows-none": (dict(rows=torch.zeros(0, 4)), "the bank has 0 rows"),
    "rows-vast": (dict(rows=torch.zeros(2**32, 4, device="meta")), "the bank has 4294967296 rows"),
    "positive": (dict(positive=torch.zeros(3, dtype=INT)), r"positive is torch.int64 \(3,\)"),
    "positive-dtype": (dict(positive=torch.zeros(2)), "positive is torch.float32"),
    "negatives": (dict(negatives=torch.zeros(3, 5, dtype=INT)), r"negatives are torch.int64 \(3, 5\)"),
    "negatives-dtype": (dict(negatives=torch.zeros(2, 5)), "negatives are torch.float32"),
    "draw-index": (dict(negatives=a_draw(3, 5)), r"Draw.index is torch.int64 \(3,\)"),
    "draw-step": (dict(negatives=changed(a_draw(2, 5), step=torch.zeros(1, dtype=INT))), "Draw.step is"),
    "draw-alone": (
        dict(rows=torch.zeros(1, 4), negatives=a_draw(2, 5, exclude_self=True)),
        "the bank has one row",
    ),
    "devices": (dict(rows=torch.zeros(9, 4, device="meta")), "tensors are on cpu and meta"),
    "row-below": (dict(positive=torch.tensor([0, -1])), "index out of range: rows -1 to 0"),
    "row-above": (dict(negatives=torch.tensor([[0, 1], [9, 3]])), "rows 0 to 9 are asked for, the bank has 0 to 8"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_wrong_use_is_refused(change, words, shapes_unchecked):
    right = dict(
        x=unit(2, 4), rows=unit(9, 4), positive=integers(9, 2), negatives=integers(9, 2, 5),
        temperature=T, z=9.0,
    )  # fmt: skip
    with using("reference"), pytest.raises(UsageError, match=words):
        nce_loss(**{**right, **change})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_stop_a_cpu_at_once(bad):
    x = unit(2, 4)
    x[1, 2] = bad
    where = (unit(9, 4), integers(9, 2), integers(9, 2, 5))
    with pytest.raises(RunError, match=r"features are not finite .* smaller --lr, or --precision"):
        nce_loss(x, *where, temperature=T, z=9.0)
    with pytest.raises(RunError, match="features are not finite"):
        estimate_z(x, *where, temperature=T)


@interpreted
def test_what_the_kernel_does_not_take_is_refused():
    where = (integers(9, 2), integers(9, 2, 5))
    knobs = dict(temperature=T, z=9.0)
    with using("triton"):
        with pytest.raises(
            UsageError, match=r"up to 1024, and these are 1025: say --method.dim 128"
        ):
            nce_loss(unit(2, 1025), unit(9, 1025), *where, **knobs)
        with pytest.raises(UsageError, match=r"no torch.float64: set FASTROT_OPS=reference"):
            nce_loss(unit(2, 4).double(), unit(9, 4), *where, **knobs)


def test_without_triton_the_way_out_is_told(monkeypatch):
    monkeypatch.setattr("fastrot.ops.choice.triton", None)
    with (
        using("triton"),
        pytest.raises(UsageError, match="came without: set FASTROT_OPS=reference"),
    ):
        nce_loss(unit(2, 4), unit(9, 4), integers(9, 2), integers(9, 2, 5), temperature=T, z=9.0)
