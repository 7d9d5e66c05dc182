"""PIRL, NPID and jigsaw: the authors' losses, gradients and bank in float64; puzzles and rotations; whole runs."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from test_decoupling import Features, info
from test_run import assert_same_bits
from torch.nn import functional as F
from truth import golden, photo

from fastrot import assemble, config, ranges, train
from fastrot.backbones.alexnet import alexnet
from fastrot.config import UsageError
from fastrot.core import Batch
from fastrot.data.crops import check_sizes
from fastrot.methods import jigsaw, pirl
from fastrot.methods.contrast import Contrast
from fastrot.methods.jigsaw import far_apart, puzzle_crop
from fastrot.methods.pirl import EPS, Embeddings
from fastrot.ops.augment import augmented
from fastrot.ops.nce import estimate_z, nce_loss, nce_loss_and_mass
from fastrot.ops.patches import patches
from fastrot.ops.rows import update_rows
from fastrot.presets import PRESETS
from fastrot.speed.cost import layers, step_cost, views_shapes
from fastrot.training import checkpoint, session
from fastrot.training.optim import LRSchedule
from fastrot.training.state import build

VISSL, EQUATIONS, PORTS = (golden(f"pirl_{name}") for name in ("vissl", "equations", "ports"))
CASES = json.loads(str(VISSL["meta_json"]))
KIND = {"nce": "nce", "cross_entropy": "infonce"}
LARGE = 102  # pixels a side: the least at which nine patches fit a small AlexNet
CROP = config.RandomResized(size=LARGE)
BOTH = config.Pirl(crop=CROP, negatives=5, transform="both")
SMALL = config.AlexNet(width=0.125, kernel=5, stride=2, last="conv5")


NET = ["--backbone.width", "0.1", "--backbone.kernel", "5", "--backbone.stride", "2"]


def arrays_of(found: dict, name: str) -> dict[str, torch.Tensor]:
    mine = {k.removeprefix(f"{name}__"): v for k, v in found.items() if k.startswith(f"{name}__")}
    wide = {k: torch.from_numpy(np.asarray(v)) for k, v in mine.items()}
    return {k: v.double() if v.is_floating_point() else v.long() for k, v in wide.items()}


def embeddings_of(case: dict, meta: dict) -> list[torch.Tensor]:
    return [case[f"emb{i}"].clone().requires_grad_() for i in range(meta["n_embeddings"])]


def assert_as_vissl(case: dict, total: torch.Tensor, given: list, rows: torch.Tensor) -> None:
    torch.testing.assert_close(total, case["f64_loss"], rtol=1e-9, atol=0)
    for i, each in enumerate(torch.autograd.grad(total, given)):
        scale = case[f"f64_grad{i}"].abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
        torch.testing.assert_close(each / scale, case[f"f64_grad{i}"] / scale, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(rows[case["rows"]], case["f64_rows_after"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_rows_are_the_authors(name):
    """By the ops, in the order in which their code comes to them: it writes the bank in forward."""
    case, meta = arrays_of(VISSL, name), CASES[name]
    rows, given, total = case["bank"].clone(), embeddings_of(case, meta), 0
    how = {"temperature": case["f64_T_used"].item(), "population": meta["N"]}
    z = None
    for i, (leaf, weight) in enumerate(zip(given, meta["loss_weights"], strict=True)):
        x = F.normalize(leaf, dim=1) if meta["norm_embedding"] else leaf
        asked = x, rows, case["y"], case[f"idx{i}"][:, 1:]
        if meta["loss_type"] == "nce" and z is None:
            z = estimate_z(*asked, **how) if meta["Z_in"] < 0 else torch.tensor(meta["Z_in"])
        loss = nce_loss(*asked, **how, z=z and z.double(), kind=KIND[meta["loss_type"]], eps=EPS)
        total = total + weight * loss.mean()
        writes = meta["update_mem_on_forward"] or meta["update_mem_with_emb_index"] == i
        if writes:
            rows = rows.clone()  # the loss before has its gradient already
            update_rows(rows, case["y"], x.detach(), case["f64_m_used"].item(), eps=1e-12)
    if z is not None:
        torch.testing.assert_close(z.double(), case["f64_Z"], rtol=1e-9, atol=0)
    assert_as_vissl(case, total, given, rows)


class Given(Contrast):
    """With the negatives that the authors' code drew."""

    idx: tuple[torch.Tensor, ...] = ()

    def negatives(self, batch, view=0):
        return self.idx[view] if self.idx else super().negatives(batch, view)


def a_batch(index, size: int = 8, epoch: int = 0, step: int = 0, crops: int = 2) -> Batch:
    index = torch.as_tensor(index)
    pictures = [torch.from_numpy(photo(int(i), size, size)) for i in index]
    return Batch(
        (torch.stack(pictures),) * crops, index, torch.full_like(index, -1), torch.tensor([epoch, step])
    )  # fmt: skip


def the_method(cfg: config.Pirl, images: int, trunk=None, **known) -> pirl.Pirl:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pirl, "Contrast", Given)
        return pirl.Pirl(cfg, trunk or Features(16), info(images, **known))


@pytest.mark.parametrize(
    "name", [n for n in CASES if CASES[n]["norm_embedding"] and not n.startswith(("p10", "p11"))]
)
def test_the_method_computes_what_the_authors_code_does(name):
    """All but the cases whose bank is written between the two embeddings."""
    case, meta = arrays_of(VISSL, name), CASES[name]
    single = meta["n_embeddings"] == 1
    cfg = config.Pirl(
        lambda_transform=0.0 if single else meta["loss_weights"][0],
        dim=meta["D"],
        negatives=meta["K"],
        temperature=case["f64_T_used"].item(),
        bank_momentum=case["f64_m_used"].item(),
        contrast=KIND[meta["loss_type"]],
    )
    method = the_method(cfg, meta["N"])
    bank, given = method.contrast.bank, embeddings_of(case, meta)
    bank.rows = case["bank"].clone()
    idx = [case[f"idx{i}"][:, 1:] for i in range(len(given))]
    method.contrast.idx = (idx[-1], *idx[:-1])  # of the picture first
    batch = a_batch(case["y"])
    *others, own = (F.normalize(each, dim=1) for each in given)
    outputs = Embeddings(own, tuple(others))
    if meta["Z_in"] < 0:
        method.before_first_step(Embeddings(own.detach(), tuple(o.detach() for o in others)), batch)
    else:
        method.contrast.mean_exp = torch.tensor(meta["Z_in"] / meta["N"], dtype=torch.float64)
    losses = method.losses(outputs, batch)
    assert set(losses.terms) == ({"loss_picture"} if single else {"loss_picture", "loss_rotation"})
    method.after_step(outputs, batch, losses)
    assert_as_vissl(case, losses.total, given, bank.rows)


def test_the_papers_equations_by_infonce_and_its_mass():
    """h = exp(s / T) / mass: a loss of -ln h is InfoNCE, and with one denominator for all that of -ln h - sum ln(1 - h_k) too."""
    cases = json.loads(str(EQUATIONS["meta_json"]))
    assert len(cases) == 7
    for name, meta in cases.items():
        case = arrays_of(EQUATIONS, name)
        neg = F.normalize(case["neg"], dim=2).flatten(0, 1)
        rows = torch.cat([F.normalize(case["m"], dim=1), neg])
        b, n = meta["B"], meta["N"]
        positive = torch.arange(b)
        negatives = b + torch.arange(b * n).view(b, n)
        given = [case[k].clone().requires_grad_() for k in ("g", "f")]
        infonce = shared = 0
        for leaf, weight in zip(given, (meta["lam"], 1 - meta["lam"]), strict=True):
            x = F.normalize(leaf, dim=1)
            how = {"temperature": meta["T"], "kind": "infonce"}
            loss, mass = nce_loss_and_mass(x, rows, positive, negatives, **how)
            h = (torch.einsum("bd,bkd->bk", x, rows[negatives]) / meta["T"]).exp() / mass[:, None]
            infonce = infonce + weight * loss.mean()
            shared = shared + weight * (loss.detach() - (1 - h).log().sum(1)).mean().detach()
        torch.testing.assert_close(infonce, case["infonce_loss"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(shared, case["shared_loss"], rtol=1e-7, atol=1e-10)
        for leaf, kind in zip(given, "gf", strict=True):
            grad = torch.autograd.grad(infonce, leaf, retain_graph=True)[0]
            torch.testing.assert_close(grad, case[f"infonce_grad_{kind}"], rtol=1e-8, atol=1e-10)


def test_the_ports_losses_are_infonce_of_other_pairs():
    """What two ports compute (ANI, AKW): between the two views, and of each against the bank."""
    g = {k: torch.from_numpy(np.asarray(v)).double() for k, v in PORTS.items()}
    vi, vt, mem, neg = (F.normalize(g[k], dim=1) for k in ("vi", "vt", "mem", "neg"))

    def infonce(x, own, temperature):
        negatives = (len(own) + torch.arange(len(neg))).expand(len(x), -1)
        how = {"temperature": temperature, "kind": "infonce"}
        return nce_loss(x, torch.cat([own, neg]), torch.arange(len(x)), negatives, **how)

    ours = infonce(vt, mem, 0.07).mean()
    torch.testing.assert_close(ours, g["f32_akwasigroch_loss"], rtol=1e-5, atol=0)
    pair, memory = infonce(vt, vi, 0.5), infonce(mem, vi, 0.5)
    torch.testing.assert_close((-pair).exp(), g["f64_aniket_p_pair"], rtol=1e-4, atol=0)
    torch.testing.assert_close((-memory).exp(), g["f64_aniket_p_mem"], rtol=1e-4, atol=0)


# ---- the method ----


def test_an_unset_transform_is_npid():
    """One view, no head but f, one term; the second view of an evaluation is the picture with other colours."""
    trunk = alexnet(SMALL, 32)
    method = the_method(
        config.Pirl(lambda_transform=0.0, negatives=5), 9, trunk, dtype=torch.float32
    )
    assert method.crops(method.cfg) == (method.cfg.crop,)
    assert not method.net.heads
    batch = a_batch([1, 2, 3], 32, crops=1)
    assert len(method.views(batch)) == 1
    method.net.eval()
    first, second = method.views(batch)
    assert not torch.equal(first, second)
    outputs = method.net((first, second))
    assert len(outputs.transforms) == 1
    assert method.score(outputs, batch)["accuracy"][1] == 6


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_lambda_weighs_the_transform_against_the_picture(lam):
    method = the_method(config.Pirl(lambda_transform=lam, negatives=5, dim=4, z="ema"), 9)
    draw = torch.Generator().manual_seed(0)
    own, other = (F.normalize(torch.randn(3, 4, generator=draw).double()) for _ in range(2))
    batch = a_batch([4, 2, 7])
    outputs = Embeddings(own, (other,) if lam else ())
    method.before_first_step(outputs, batch)
    terms = method.losses(outputs, batch).terms
    alone = method.contrast.loss(own, batch)[0].mean()
    torch.testing.assert_close(terms["loss_picture"], (1 - lam) * alone)
    if lam:
        of_other = method.contrast.loss(other, batch, view=1)[0].mean()
        torch.testing.assert_close(terms["loss_rotation"], lam * of_other)


def test_each_view_has_negatives_of_its_own_and_the_first_those_of_others():
    method = the_method(config.Pirl(negatives=50, dim=4), 60)
    batch = a_batch([4, 2, 7], step=3)
    seeds = [method.contrast.negatives(batch, view).seed for view in range(3)]
    assert seeds[0] == method.info.seed
    assert len({*seeds}) == 3


def test_fresh_rows_have_unit_length_whatever_the_decouplings():
    method = the_method(config.Pirl(negatives=5, dim=4), 9)
    torch.testing.assert_close(method.contrast.bank.rows.norm(dim=1), torch.ones(9))
    torch.manual_seed(0)
    raw = Contrast(method.cfg, method.info).bank.rows
    torch.testing.assert_close(F.normalize(raw, dim=1), method.contrast.bank.rows)
    assert (raw.norm(dim=1) - 1).abs().max() > 0.05


def test_scores_are_counted_over_pairs_whatever_the_batch():
    method = the_method(config.Pirl(negatives=5, dim=4, temperature=0.5), 9)
    draw = torch.Generator().manual_seed(0)
    own, other = (F.normalize(torch.randn(6, 4, generator=draw)) for _ in range(2))
    found = method.score(Embeddings(own, (other,)), a_batch(range(6)))
    losses, rights = [], []
    for i, j in itertools.permutations(range(6), 2):
        apart = (other[i] @ own[i] - other[i] @ own[j]).item()
        losses.append(np.log1p(np.exp(-apart / 0.5)))
        rights.append(apart > 0)
    assert found["accuracy"][0].item() == sum(rights)
    assert found["accuracy"][1].item() == found["loss"][1].item() == 30
    assert found["loss"][0].item() == pytest.approx(sum(losses), rel=1e-5)
    lone = method.score(Embeddings(own[:1], (other[:1],)), a_batch([1]))
    assert lone["accuracy"][0] / lone["accuracy"][1] == 0.5
    assert (lone["loss"][0] / lone["loss"][1]).item() == pytest.approx(np.log(2))
    alike = method.score(Embeddings(own, (own,)), a_batch(range(6)))
    assert alike["accuracy"][0] == alike["accuracy"][1]


NOTHING = config.Augment(
    brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, photometric=0.0, grey=0.0
)


def test_rotations_are_of_whole_pixels_all_four_and_another_crop():
    """No border, no interpolation: each view is numpy's rot90 of its crop to the bit, normalised."""
    cfg = config.Pirl(negatives=5, augment=NOTHING)
    method = the_method(cfg, 400, alexnet(SMALL, 32), dtype=torch.float32)
    size, seen = 33, []
    mean, std = np.float32(method.info.mean), np.float32(method.info.std)
    for epoch in range(12):
        batch = a_batch(range(30), size, epoch)
        first, second = batch.crops[0], batch.crops[1].flip(1)  # not the same crop
        batch = dataclasses.replace(batch, crops=(first, second))
        picture, rotated = method.views(batch)
        plain = (first.numpy() / np.float32(255) - mean) / std
        np.testing.assert_allclose(picture.permute(0, 2, 3, 1).numpy(), plain, atol=1e-6)
        for i, view in enumerate(rotated.permute(0, 2, 3, 1).numpy()):
            four = [np.rot90(second[i].numpy(), r) for r in range(4)]
            four = [(each / np.float32(255) - mean) / std for each in four]
            apart = [np.abs(view - each).max() for each in four]
            seen.append(int(np.argmin(apart)))
            assert apart[seen[-1]] < 1e-6
    counts = np.bincount(seen, minlength=4)
    assert (np.abs(counts / len(seen) - 0.25) < 0.08).all()


def test_draws_are_of_seed_epoch_row_and_view_whatever_the_batch():
    method = the_method(BOTH, 400, alexnet(SMALL, LARGE), dtype=torch.float32)
    size = puzzle_crop(CROP).size

    def views(rows, epoch=0, method=method):
        small, large = a_batch(rows, LARGE, epoch), a_batch(rows, size, epoch)
        crops = (*small.crops, large.images)
        return method.views(dataclasses.replace(small, crops=crops))

    whole, some = views(range(8)), views([5, 2])
    assert [len(each) for each in whole] == [8, 8, 72]
    for each, few in zip(whole, some, strict=True):
        parts = each.unflatten(0, (8, -1))[[5, 2]]
        torch.testing.assert_close(few.unflatten(0, (2, -1)), parts, rtol=0, atol=1e-6)
    for each, later in zip(whole, views(range(8), epoch=1), strict=True):
        assert not torch.equal(each, later)
    picture, rotated, _ = whole
    assert not any(
        torch.equal(picture, torch.rot90(rotated, r, (2, 3))) for r in range(4)
    )  # other colours


def test_an_evaluation_takes_all_views_of_one_crop_as_it_is():
    method = the_method(BOTH, 400, alexnet(SMALL, LARGE), dtype=torch.float32)
    method.net.eval()
    batch = a_batch(range(4), LARGE, crops=1)
    picture, rotated, puzzle = method.views(batch)
    for i in range(4):
        four = [torch.rot90(picture[i], r, (1, 2)) for r in range(4)]
        assert any(torch.equal(rotated[i], each) for each in four)
    assert puzzle.shape == (36, 3, 29, 29)
    outputs = method.net((picture, rotated, puzzle))
    assert [tuple(each.shape) for each in outputs.transforms] == [(4, 128), (4, 128)]
    assert method.score(outputs, batch)["accuracy"][1] == 2 * 12


# ---- the puzzle ----


def test_nine_patches_are_cut_where_they_are_said_to_be():
    images = torch.randint(0, 256, (3, 50, 50, 3), dtype=torch.uint8)
    draw = np.random.default_rng(0)
    order = torch.stack([torch.from_numpy(draw.permutation(9)) for _ in range(3)])
    shift = torch.randint(0, 16 - 12 + 1, (3, 9, 2))
    found = patches(images, order, shift, 12).unflatten(0, (3, 9))
    for i, place in itertools.product(range(3), range(9)):
        cell = int(order[i, place])
        y, x = (cell // 3 * 16 + shift[i, cell, 0], cell % 3 * 16 + shift[i, cell, 1])
        assert torch.equal(found[i, place], images[i, y : y + 12, x : x + 12])


@pytest.mark.parametrize(("size", "crop", "side"), [(224, 255, 64), (112, 128, 32), (128, 146, 36)])
def test_patches_scale_with_the_crop(size, crop, side):
    cut = puzzle_crop(config.RandomResized(size=size))
    assert (cut.size, cut.flip) == (crop, False)
    trunk = alexnet(SMALL, size)
    puzzle = jigsaw.Puzzle(cut, None, NOTHING, trunk, info(9))
    assert puzzle.side == side
    shown = puzzle.shown(
        torch.zeros(2, crop, crop, 3, dtype=torch.uint8), a_batch([1, 2]), augmented
    )
    assert shown.shape == (18, side, side, 3)


def test_a_puzzle_shows_any_order_jitters_and_mirrors_each_patch():
    """Of a crop whose pixels say where they are: the cell of each place, how far its patch lies inside, and whether it is mirrored."""
    y, x = np.mgrid[0:255, 0:255]
    crop = torch.from_numpy(np.stack([y, x, 0 * y], -1).astype(np.uint8))[None].expand(
        200, -1, -1, -1
    )
    puzzle = jigsaw.Puzzle(
        config.RandomResized(size=255), None, NOTHING, alexnet(SMALL, 224), info(9)
    )
    batch = a_batch(range(200))
    found = puzzle.shown(crop, batch, augmented).long().unflatten(0, (200, 9))
    top = found[:, :, 0, :, 0].amin(dim=2)
    left = found[:, :, 0, :, 1].amin(dim=2)
    cell = top // 85 * 3 + left // 85
    assert (cell.sort(dim=1).values == torch.arange(9)).all()
    assert len({tuple(each) for each in cell.tolist()}) > 195
    for inside in (top % 85, left % 85):
        assert (inside.min(), inside.max()) == (0, 20)
    mirrored = found[:, :, 0, 0, 1] > found[:, :, 0, -1, 1]
    assert 0.45 < mirrored.float().mean() < 0.55
    assert len({tuple(each) for each in mirrored.tolist()}) > 100
    plain = puzzle.shown(crop, batch).long().unflatten(0, (200, 9))
    assert (plain[:, :, 0, 0, 1] < plain[:, :, 0, -1, 1]).all()


def test_orders_are_far_apart_and_fewer_are_the_first_of_more():
    hundred, few = far_apart(100), far_apart(20)
    assert np.array_equal(hundred[:20], few)
    assert (np.sort(hundred, axis=1) == np.arange(9)).all()

    def nearest(orders):
        apart = (orders[:, None] != orders[None]).sum(-1) + 100 * np.eye(len(orders), dtype=int)
        return apart.min()

    draw = np.random.default_rng(0)
    drawn = np.stack([draw.permutation(9) for _ in range(100)])
    assert nearest(far_apart(9)) == 9  # a Latin square's rows differ in all places
    assert nearest(hundred) == 6
    assert nearest(drawn) <= 4
    # greedy: each is as far from those before it as any of all 9! is
    every = np.array(list(itertools.permutations(range(9))), np.uint8)
    for n in (1, 5, 30):
        reach = np.min([(every != o).sum(1) for o in hundred[:n]], axis=0).max()
        assert (hundred[n] != hundred[:n]).sum(1).min() == reach


@pytest.mark.soak
def test_ten_thousand_and_all_orders():
    for count in (10_000, 362_880):
        assert len(np.unique(far_apart(count), axis=0)) == count


def test_jigsaw_answers_with_the_order_that_is_shown():
    trunk = alexnet(SMALL, LARGE)
    cfg = config.Jigsaw(crop=CROP, permutations=20, augment=NOTHING)
    method = jigsaw.Jigsaw(cfg, trunk, info(9, dtype=torch.float32))
    crop = method.crops(cfg)[0]
    cell = crop.size // 3
    y, x = np.mgrid[0 : crop.size, 0 : crop.size] // cell
    where = torch.from_numpy((y * 3 + x).clip(0, 8).astype(np.uint8))[..., None].expand(-1, -1, 3)
    batch = a_batch(range(40), crop.size, crops=1)
    batch = dataclasses.replace(batch, crops=(where.expand(40, -1, -1, -1).contiguous(),))
    views = method.views(batch)
    mean, std = torch.tensor(method.info.mean[0]), torch.tensor(method.info.std[0])
    shown = ((views[:, 0, 10, 10] * std + mean) * 255).round().long().unflatten(0, (40, 9))
    label = method.puzzle.number(batch)
    assert np.array_equal(shown.numpy(), far_apart(20)[label.numpy()])
    assert len(set(label.tolist())) > 10
    logits = F.one_hot(label, 20).float() * 50
    assert method.losses(logits, batch).metrics["accuracy"] == 1
    assert method.losses(logits, batch).total < 1e-6
    assert method.net(views).shape == (40, 20)


# ---- what is refused ----


def bad(words: list[str], match: str) -> None:
    """Refused before anything is built, or as the method is, of 500 pictures."""

    def asked():
        cfg = train.command_line([*words, "--data", "synthetic"])
        ranges.check(cfg)
        cfg = config.resolved(cfg)
        assemble.method(cfg, info(500, size=cfg.method.crop.size))

    with pytest.raises(UsageError, match=match):
        asked()


def test_what_cannot_be_is_told_in_a_sentence():
    small = ["--backbone.width", "0.1"]
    jig = ["pirl-alexnet", *small, "--method.negatives", "9", "--method.transform", "jigsaw"]
    bad(
        [*jig, "--image-size", "200"], r"57 pixels are too small.*at least 63: set --image-size 221"
    )
    res = ["pirl-resnet50", *jig[3:], "--backbone.name", "resnet18"]
    bad(
        [*res, "--image-size", "100"], r"29 pixels are too small.*at least 32: set --image-size 111"
    )
    bad(["jigsaw-resnet50", "--backbone.name", "resnet18", "--image-size", "64"], "too small")
    bad([*jig, "--backbone.last", "fc_block"], "--backbone.last conv5")
    bad(
        ["pirl-alexnet", *small],
        r"--method.negatives got 32000.*has 500 pictures: set 500 or fewer",
    )
    bad(
        ["jigsaw-alexnet", "--method.permutations", "362881"],
        r"--method.permutations got 362881.*9!",
    )
    bad(["jigsaw-alexnet", "--method.permutations", "1"], "--method.permutations got 1")
    bad(
        ["pirl-alexnet", "--method.permutations", "9"],
        "--method.permutations got 9.*jigsaw or both",
    )
    bad(["npid-alexnet", "--method.patch-scale", ".1", ".2"], "--method.patch-scale got .*jigsaw")
    bad(["pirl-alexnet", "--method.lambda-transform", "1.5"], "--method.lambda-transform got 1.5")
    bad(["pirl-alexnet", "--method.augment.hue", "0.7"], "--method.augment.hue got 0.7")
    bad(["pirl-alexnet", "--method.augment.grey", "-1"], "--method.augment.grey got -1")


def test_the_least_size_that_is_named_is_one_that_fits():
    for size, fits in ((220, False), (221, True)):
        words = ["jigsaw-alexnet", "--backbone.width", "0.05", "--method.permutations", "5"]
        cfg = train.command_line([*words, "--image-size", str(size), "--data", "synthetic"])
        cfg = config.resolved(cfg)
        if fits:
            assemble.method(cfg, info(9, size=size))
        else:
            with pytest.raises(UsageError, match="221"):
                assemble.method(cfg, info(9, size=size))


def test_a_puzzle_of_small_pictures_names_an_image_size_that_fits():
    """Not the crop's, which is 255/224 as large."""
    sizes = np.full((4, 2), 128, np.int32)
    with pytest.raises(UsageError, match=r"crop is 146 pixels.*set --image-size 112 or smaller"):
        check_sizes(config.RandomResized(size=146), sizes, asked=128)
    check_sizes(puzzle_crop(config.RandomResized(size=112)), sizes, asked=112)
    view = assemble.training_view(config.Config(method=config.Jigsaw(crop=CROP)))
    assert (view.crops[0].size, view.asked) == (116, LARGE)


def test_presets_say_the_papers_numbers():
    pirl_paper, npid, jig = (PRESETS[f"{name}-resnet50"]() for name in ("pirl", "npid", "jigsaw"))
    assert pirl_paper.method.negatives == 32000
    assert (pirl_paper.method.temperature, pirl_paper.method.lambda_transform) == (0.07, 0.5)
    assert pirl_paper.schedule.epochs == 800
    assert pirl_paper.schedule.table[0][1] / pirl_paper.batch == pytest.approx(0.12 / 1024)
    assert pirl_paper.schedule.last == pytest.approx(1.2e-4 / 0.12)
    assert (npid.method.lambda_transform, npid.method.negatives) == (0, 4096)
    assert jig.method.permutations == 2000
    assert config.with_size(jig.method.crop, 255).short == 256
    for name in ("pirl", "npid", "jigsaw"):
        assert PRESETS[f"{name}-alexnet"]().backbone.last == "conv5"


# ---- what it costs ----


def test_the_arithmetic_of_all_views_is_counted_of_a_resnet_too():
    """A rotation costs what the picture does; nine patches of 64 pixels .73 of 224's, by their area."""
    cpu, cost = torch.device("cpu"), {}
    for kind in ("rotation", "jigsaw", "both"):
        words = ["pirl-resnet50", "--method.negatives", "50", "--method.transform", kind]
        words += ["--batch", "4", "--precision", "fp32", "--data", "synthetic"]
        cfg = config.resolved(train.command_line(words))
        method = assemble.method(cfg, info(500, dtype=torch.float32))
        cost[kind] = step_cost(method, assemble.training_view(cfg), cfg, cpu).flop
    net = method.net.trunk
    one = sum(layer.flop for layer in layers(net, (4, 3, 224, 224), torch.float32))
    assert one / 4 / 3 == pytest.approx(2 * 4.09e9, rel=0.02)  # forward, of each picture
    assert cost["rotation"] == pytest.approx(2 * one, rel=0.01)
    assert cost["jigsaw"] == pytest.approx(one * (1 + 9 * 64**2 / 224**2), rel=0.03)
    assert cost["both"] == pytest.approx(cost["rotation"] + cost["jigsaw"] - one, rel=0.01)


def test_colours_are_compiled_with_the_net(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda what, **how: asked.append((what, how)) or what)
    for name, compiled in (
        ("pirl-alexnet", True),
        ("jigsaw-alexnet", True),
        ("pirl-alexnet", False),
    ):
        cfg = train.command_line(
            [name, *NET, "--method.negatives", "9"][: None if "pirl" in name else -2]
        )
        cfg = config.resolved(dataclasses.replace(cfg, compile=compiled, precision="fp32"))
        known = info(9, dtype=torch.float32)
        method = build(cfg, known, LRSchedule(cfg.schedule, epochs=1, batches=1, steps=1)).method
        assert method.augmented is augmented
        assert [what for what, _ in asked].count(augmented) == compiled
        asked.clear()


def test_nothing_is_compiled_for_a_count_of_what_a_step_costs():
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    method = the_method(
        config.Pirl(crop=CROP, negatives=5), 9, alexnet(SMALL, LARGE), dtype=torch.float32
    )
    method.augmented = torch.compile(augmented, backend=refuse)
    view = assemble.training_view(config.Config(method=method.cfg))
    found = views_shapes(method, view, 6, torch.device("cpu"))
    assert found == ((6, 3, LARGE, LARGE),) * 2


# ---- whole runs ----

RUN = ["--enlarge", "--workers", "0", "--hold-out", "0.2", "--no-tensorboard", "--device", "cpu"]
TASKS = {
    "pirl": ["pirl-alexnet", "--method.negatives", "9", "--method.transform", "both"],
    "npid": ["npid-alexnet", "--method.negatives", "9", "--method.bank-dtype", "bf16"],
    "jigsaw": ["jigsaw-alexnet", "--method.permutations", "10"],
}


def go(task: str, pictures, out, *more: str):
    words = [*TASKS[task], *NET, *RUN, "--image-size", str(LARGE), "--batch", "4", "--lr", "0.01"]
    words += ["--schedule.steps", "6", "--log-every", "1", "--data", str(pictures)]
    cfg = train.command_line([*words, "--out", str(out), *more])
    ranges.check(cfg)
    session.train(config.resolved(cfg))
    return out


@pytest.mark.parametrize(
    "task", ["pirl", *(pytest.param(each, marks=pytest.mark.soak) for each in ("npid", "jigsaw"))]
)
def test_a_run_resumes_to_the_bit_in_mid_epoch(task, pictures, tmp_path):
    straight = go(task, pictures, tmp_path / "straight")
    broken = go(task, pictures, tmp_path / "broken", "--max-steps", "2")
    go(task, pictures, tmp_path / "broken")
    last = "checkpoints/last.pt"
    assert_same_bits(straight / last, broken / last)
    page = (straight / "index.html").read_text()
    assert "told apart" in page or "Accuracy of the order" in page
    summary = json.loads((straight / "summary.json").read_text())
    assert 0 <= summary["val_accuracy"] <= 1
    state = checkpoint.load(straight / last)["method"]
    assert ("bank.rows" in state) == (task != "jigsaw")


def test_all_of_the_net_is_tuned_on_few_labels(pictures, tmp_path):
    """`finetune`, whatever the net: a head on its last stage, and the trunk learns too."""
    run = go("pirl", pictures, tmp_path / "run", "--max-steps", "1")
    out = tmp_path / "tuned"
    words = ["finetune", "--start-from", str(run), "--data", str(pictures), "--out", str(out)]
    words += [*RUN, "--rows", "4", "--batch", "4", "--schedule.steps", "2", "--log-every", "1"]
    assert train.main(words) == 0
    before, after = (checkpoint.load(checkpoint.of_run(each))["net"] for each in (run, out))
    assert {k for k in after if k.startswith("heads.")} >= {"heads.last.out.weight"}
    moved = [
        k for k, v in before.items() if k.startswith("trunk.") and not torch.equal(v, after[k])
    ]
    assert {"trunk.conv1.conv.weight", "trunk.conv5.conv.weight"} <= {*moved}
    assert "top1_last" in json.loads((out / "summary.json").read_text())["val"]
    assert len(np.load(out / "rows-train.npy")) == 4 * len(list(pictures.iterdir()))
