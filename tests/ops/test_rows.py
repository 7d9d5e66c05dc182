"""update_rows: the last duplicate wins, from the old row, in place, the same bits each time. See also test_nce.py."""

import numpy as np
import pytest
import torch
from test_nce import BOTH, Made, integers, interpreted, needs_cuda, shapes_unchecked, unit

from fastrot.config import RunError, UsageError
from fastrot.ops import rows as op
from fastrot.ops.choice import using
from fastrot.ops.rows import update_rows

__all__ = ["shapes_unchecked"]  # a fixture


def by_hand(rows, index, features, momentum: float, eps: float = 0.0) -> torch.Tensor:
    """One image after the other, in float64."""
    old, new = rows.double().numpy(), rows.double().numpy().copy()
    with np.errstate(invalid="ignore"):
        for row, feature in zip(index.tolist(), features.double().numpy(), strict=True):
            blend = momentum * old[row] + (1 - momentum) * feature
            new[row] = blend / max(np.linalg.norm(blend), eps)
    return torch.tensor(new)


def updated(rows, index, features, *args, form: str, device: str = "cpu") -> torch.Tensor:
    bank = rows.to(device, copy=True)
    with using(form):
        update_rows(bank, index.to(device), features.to(device), *args)
    return bank.cpu()


DUPLICATES = torch.tensor([4, 7, 4, 0, 19, 7, 7, 4])


def last_duplicate_wins(form: str, device: str = "cpu"):
    for d in (1, 16, 37, 128):
        rows, features = unit(20, d) * 1.5, unit(8, d, seed=1)
        for momentum in (0.0, 0.5, 0.9, 1.0):
            got = updated(rows, DUPLICATES, features, momentum, form=form, device=device)
            want = by_hand(rows, DUPLICATES, features, momentum)
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
            other = torch.tensor([row not in (0, 4, 7, 19) for row in range(20)])
            assert torch.equal(got[other], rows[other])
            again = updated(rows, DUPLICATES, features, momentum, form=form, device=device)
            assert torch.equal(got, again)


@pytest.mark.parametrize("form", BOTH)
def test_the_last_duplicate_wins_and_each_starts_from_the_old_row(form):
    last_duplicate_wins(form)


@pytest.mark.gpu
@needs_cuda
def test_the_last_duplicate_wins_on_a_gpu():
    last_duplicate_wins("triton", "cuda")


@pytest.mark.parametrize("form", BOTH)
def test_many_images_of_one_row(form, monkeypatch):
    monkeypatch.setattr(op, "AHEAD", 16)  # several looks ahead
    index = integers(3, 70)
    rows, features = unit(5, 8), unit(70, 8, seed=1)
    got = updated(rows, index, features, 0.5, form=form)
    torch.testing.assert_close(got.double(), by_hand(rows, index, features, 0.5), rtol=0, atol=1e-6)


@pytest.mark.gpu
@needs_cuda
def test_many_images_on_a_gpu_again_and_again():
    index, features, rows = integers(700, 8192), unit(8192, 128), unit(1000, 128)
    want = by_hand(rows, index, features, 0.5)
    for _ in range(20):
        got = updated(rows, index, features, 0.5, form="triton", device="cuda")
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


def test_float64_is_float64():
    rows, features = unit(20, 16).double(), unit(8, 16, seed=1).double()
    got = updated(rows, DUPLICATES, features, 0.3, form="reference")
    torch.testing.assert_close(got, by_hand(rows, DUPLICATES, features, 0.3), rtol=0, atol=1e-15)


@pytest.mark.parametrize("form", BOTH)
def test_bfloat16_rows_are_blended_in_float32_and_then_rounded(form):
    rows, features = unit(20, 16).bfloat16(), unit(8, 16, seed=1)
    got = updated(rows, DUPLICATES, features, 0.5, form=form)
    want = by_hand(rows, DUPLICATES, features, 0.5)
    if form == "reference":
        assert torch.equal(got, want.float().bfloat16())
    # the interpreter cuts bfloat16 off instead of rounding it: up to a whole last place
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=1e-7)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("form", BOTH)
def test_a_blend_of_nothing_is_nan_and_with_eps_zero(form):
    rows, features = unit(4, 8), unit(2, 8, seed=1)
    rows[1] = -features[0]
    index = torch.tensor([1, 2])
    for eps in (0.0, 1e-12):
        got = updated(rows, index, features, 0.5, eps, form=form)
        assert got[1].isnan().all() if eps == 0 else not got[1].any()
        assert got[[0, 2, 3]].isfinite().all()
    tiny = updated(rows * 0, index, features * 1e-6, 0.5, 1e-3, form=form)
    want = features[1] * 0.5e-3
    torch.testing.assert_close(tiny[2], want, rtol=1e-5, atol=0)  # |blend| / eps, not a unit row


@pytest.mark.parametrize("form", BOTH)
def test_a_spoilt_row_stays_seen_and_alone(form):
    rows, features = unit(4, 8), unit(2, 8, seed=1)
    rows[1, 3] = float("nan")
    got = updated(rows, torch.tensor([1, 2]), features, 0.5, 1e-12, form=form)
    assert got[1].isnan().all()
    assert got[[0, 2, 3]].isfinite().all()


def wrong_rows_are_left_out(device: str):
    rows, features = unit(4, 8), unit(5, 8, seed=1)
    index = torch.tensor([-1, 2, 4, 2**62, -(2**62)])
    got = updated(rows, index, features, 0.5, form="triton", device=device)
    want = updated(rows, index[1:2], features[1:2], 0.5, form="triton", device=device)
    assert torch.equal(got, want)


@interpreted
def test_interpreted_kernel_leaves_out_what_lies_outside():
    wrong_rows_are_left_out("cpu")


@pytest.mark.gpu
@needs_cuda
def test_kernel_leaves_out_what_lies_outside_on_a_gpu():
    wrong_rows_are_left_out("cuda")


@pytest.mark.parametrize("form", BOTH)
def test_it_writes_in_place_and_makes_nothing_large(form):
    rows, features, index = unit(3000, 16), unit(8, 16, seed=1), integers(3000, 8)
    before, made = rows.data_ptr(), Made()
    made.known |= {before}
    run = op._launch if form == "triton" else op.update_rows_reference
    with made:
        run(rows, index, features, 0.5, 0.0)
    assert rows.data_ptr() == before
    assert max(made.bytes) <= 8 * 16 * 4
    update_rows(rows, index[:0], features[:0], 0.5)  # of no images


def test_no_gradient_flows_through_it():
    rows, features = unit(5, 8), unit(2, 8, seed=1).requires_grad_()
    update_rows(rows, torch.tensor([1, 2]), features, 0.5)
    assert not rows.requires_grad


def test_the_operator_keeps_torchs_rules():
    arguments = (unit(20, 16), DUPLICATES, unit(8, 16, seed=1), 0.5, 0.0)
    torch.library.opcheck(op._update_rows, arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(features=torch.zeros(2, 8).half()), "features are torch.float16"),
        (dict(rows=torch.zeros(5, 9)), r"rows are torch.float32 \(5, 9\)"),
        (dict(rows=torch.zeros(5, 8).half()), "rows are torch.float16"),
        (dict(rows=torch.zeros(5, 8).double()), "rows are torch.float64"),
        (dict(rows=torch.zeros(8, 5).T), "not contiguous"),
        (dict(index=torch.zeros(3, dtype=torch.int64)), r"torch.int64 \[2\]"),
        (dict(index=torch.zeros(2)), "index is torch.float32"),
        (dict(index=torch.tensor([1, 5])), "index out of range: rows 1 to 5 .* 0 to 4"),
        (dict(index=torch.tensor([-1, 3])), "index out of range: rows -1 to 3"),
        (dict(rows=torch.zeros(5, 8, device="meta")), "on meta and cpu"),
        (dict(momentum=1.5), "--method.bank-momentum got 1.5"),
        (dict(momentum=float("nan")), "--method.bank-momentum got nan"),
        (dict(eps=-1.0), "eps got -1.0"),
    ],
)
def test_wrong_use_is_refused(change, words, shapes_unchecked):
    right = dict(rows=unit(5, 8), index=torch.tensor([1, 2]), features=unit(2, 8), momentum=0.5)
    with using("reference"), pytest.raises(UsageError, match=words):
        update_rows(**{**right, **change})


def test_features_that_are_not_finite_stop_a_cpu_and_change_nothing():
    rows = unit(5, 8)
    before = rows.clone()
    with pytest.raises(RunError, match="features are not finite"):
        update_rows(rows, torch.tensor([1, 2]), torch.full((2, 8), float("inf")), 0.5)
    assert torch.equal(rows, before)


@interpreted
def test_what_the_kernel_does_not_take_is_refused():
    with using("triton"), pytest.raises(UsageError, match=r"up to 1024, .* say --method.dim 128"):
        update_rows(unit(5, 1025), torch.tensor([1]), unit(1, 1025), 0.5)
