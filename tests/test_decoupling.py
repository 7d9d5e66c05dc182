"""Rotation Feature Decoupling: the original's losses, gradients and six training steps, in float64."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn
from truth import golden

from fastrot import assemble, config, ranges
from fastrot.backbones import alexnet
from fastrot.backbones.staged import Staged
from fastrot.config import Decoupling, UsageError
from fastrot.core import Batch, DataInfo
from fastrot.methods import decoupling
from fastrot.methods.contrast import Contrast
from fastrot.methods.rotation_table import RotationTable, pu_weights, write
from fastrot.presets import PRESETS
from fastrot.training.foreign import from_original
from fastrot.training.loop import train_step
from fastrot.training.optim import LRSchedule, sgd
from fastrot.training.state import TrainState

T = float(np.float32(0.07))  # what the original's float32 buffer makes of it
MEAN, STD = config.Config().mean, config.Config().std
LOSSES = golden("decoupling_losses")
CASES = json.loads(str(LOSSES["meta_json"]))


def info(images: int, *, rows=None, data_rows=None, dtype=torch.float64, **other) -> DataInfo:
    known = dict(
        images=images,
        rows=rows,
        data_rows=data_rows or images,
        data_fingerprint="d",
        classes=0,
        mean=MEAN,
        std=STD,
        size=224,
        seed=0,
        device=torch.device("cpu"),
        dtype=dtype,
        fingerprint="f",
    )
    return DataInfo(**known | other)


class Given(Contrast):
    """With the negatives that the original drew."""

    idx: torch.Tensor | None = None

    def negatives(self, batch, view=0):
        return super().negatives(batch, view) if self.idx is None else self.idx


def with_given(*parts) -> decoupling.Decoupling:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoupling, "Contrast", Given)
        return decoupling.Decoupling(*parts)


def a_batch(index, epoch: int = 0, step: int = 0, crops: torch.Tensor | None = None) -> Batch:
    index = torch.as_tensor(index)
    crops = torch.zeros(len(index), 8, 8, 3, dtype=torch.uint8) if crops is None else crops
    return Batch((crops,), index, torch.full_like(index, -1), torch.tensor([epoch, step]))


class Features(Staged):
    """A trunk whose views are its features already."""

    def __init__(self, width: int):
        super().__init__({"all": nn.Identity()}, {"all": width})


# ---- one step's losses and gradients ----


def case_of(name: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(f"{name}__"): v for k, v in LOSSES.items() if k.startswith(f"{name}__")}


def as_the_original(
    case: dict[str, np.ndarray], meta: dict
) -> tuple[decoupling.Decoupling, torch.Tensor]:
    """The method with the case's heads, bank and negatives; and the features as a leaf."""
    lam = meta["lam"]
    weights = dict(lambda_cls=lam["cls"], lambda_mse=lam["mse"], lambda_nce=lam["nce"])
    cfg = Decoupling(negatives=meta["K"], temperature=T, gamma=float(meta["gamma"]), **weights)
    method = with_given(cfg, Features(4096), info(meta["N"]))
    method.net.double()
    draw = np.random.RandomState(int(case["weights_seed"]))
    draw.standard_normal((4 * meta["B"], 4096))  # made the features
    scale = np.sqrt(2 / 2048)
    heads = {
        "rotation.weight": draw.standard_normal((4, 2048)) * scale,
        "rotation.bias": 0.1 * draw.standard_normal(4),
        "embed.weight": draw.standard_normal((128, 2048)) * scale,
        "embed.bias": 0.1 * draw.standard_normal(128),
    }
    own = method.net.state_dict()
    method.net.load_state_dict(
        {k: torch.from_numpy(v.astype(np.float32)).double() for k, v in heads.items() if k in own}
    )
    if method.contrast is not None:
        method.contrast.bank.rows = torch.from_numpy(case["bank"]).double()
        method.contrast.mean_exp = torch.tensor(meta["Z_in"] / meta["N"], dtype=torch.float64)
    prob = torch.from_numpy(case["prob"]).reshape(-1, 4).numpy()
    method.weights = torch.from_numpy(pu_weights(prob, float(meta["gamma"])))
    if method.contrast is not None:
        method.contrast.idx = torch.from_numpy(case["idx"][:, 1:]).long()
    return method, torch.from_numpy(case["feature"]).double().requires_grad_()


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_originals(name):
    case, meta = case_of(name), CASES[name]
    method, feature = as_the_original(case, meta)
    batch = a_batch(case["index"], meta["epoch"])
    outputs = method.net.heads(feature)
    if meta["Z_in"] < 0:
        method.before_first_step(outputs, batch)
    losses = method.losses(outputs, batch)
    losses.total.backward()
    exact = dict(rtol=1e-12, atol=1e-14)
    assert set(losses.terms) == {f"loss_{k}" for k, v in meta["lam"].items() if v}
    for term, value in losses.terms.items():
        np.testing.assert_allclose(value.item(), case[f"f64_{term}"], **exact)
    np.testing.assert_allclose(losses.total.item(), case["f64_loss"], **exact)
    assert feature.grad is not None
    stored = dict(rtol=2e-7, atol=2e-7 * np.abs(case["f64_grad_feature"]).max())  # in float32
    np.testing.assert_allclose(feature.grad.numpy(), case["f64_grad_feature"], **stored)
    norm = feature.grad.norm().item()
    np.testing.assert_allclose(norm, case["f64_grad_feature_norm"], **exact)
    grads = {k: p.grad.numpy() for k, p in method.net.named_parameters()}
    if meta["lam"]["cls"]:
        np.testing.assert_allclose(outputs.logits.detach(), case["f64_logits"], **exact)
        assert losses.metrics["prec_cls"].item() * 100 == pytest.approx(case["f64_prec_cls"])
        np.testing.assert_allclose(grads["rotation.bias"], case["f64_grad_cls_b"], **exact)
    if meta["lam"]["nce"]:
        assert method.contrast is not None
        np.testing.assert_allclose(outputs.embedding.detach(), case["f64_embed"], **exact)
        np.testing.assert_allclose(grads["embed.bias"], case["f64_grad_norm_b"], **exact)
        rowsum = grads["embed.weight"].sum(axis=1)
        np.testing.assert_allclose(rowsum, case["f64_grad_norm_w_rowsum"], rtol=1e-10, atol=1e-11)
        z = method.contrast.mean_exp.item() * method.contrast.bank.population
        np.testing.assert_allclose(
            z, case["f64_Z"], rtol=2e-7
        )  # a float32 buffer, where it is given
        method.after_step(outputs, batch, losses)
        rows = method.contrast.bank.rows[torch.from_numpy(case["rows"])]
        np.testing.assert_allclose(rows, case["f64_rows_after"], **exact)


# ---- six steps ----


def our_names(file: dict[str, np.ndarray], prefix: str, net: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the original's three nets under our names."""
    start = f"{prefix}__feature__"
    theirs = {k.removeprefix(start): torch.from_numpy(v) for k, v in file.items() if start in k}
    trunk = from_original(theirs)
    found = {f"trunk.{k}": v for k, v in trunk.items()}
    for ours, other in (("rotation", "classifier__fc_classifier"), ("embed", "norm__norm")):
        for leaf in ("weight", "bias"):
            found[f"{ours}.{leaf}"] = torch.from_numpy(file[f"{prefix}__{other}.0.{leaf}"])
    return {k: v.double() if v.is_floating_point() else v for k, v in found.items()}


def test_six_steps_are_the_originals():
    file = golden("train_step_small")
    meta = json.loads(str(file["meta_json"]))
    trunk = alexnet.alexnet(config.AlexNet(), 224, (4, 6, 8, 5, 5), 48)
    cfg = Decoupling(dim=meta["D"], negatives=meta["K"], temperature=T)
    method = with_given(cfg, trunk, info(meta["N"], dtype=torch.float32))
    method.net.double()
    method.net.load_state_dict(our_names(file, "init", method.net))
    assert method.contrast is not None
    method.contrast.bank.rows = torch.from_numpy(file["bank"]).double()
    method.weights = torch.from_numpy(pu_weights(file["prob"].reshape(-1, 4), float(meta["gamma"])))
    preset = PRESETS["decoupling-alexnet"]()
    state = TrainState(
        method=method,
        net=lambda views: method.net(views.double()),  # the original's images are float32
        optimizer=sgd(method.net, preset.optim, 0.0),
        schedule=LRSchedule(preset.schedule, epochs=245, batches=1, steps=245),
        device=torch.device("cpu"),
        dtype=torch.float32,  # no autocast: the weights are float64
    )
    method.set_schedule(245, state.schedule.begins)
    exact = dict(rtol=1e-11, atol=1e-12)
    for step, epoch in enumerate(file["epochs"].tolist()):
        state.step = epoch
        assert state.schedule(epoch) == file["lr"][step]
        contrast_of(method).idx = torch.from_numpy(file[f"idx_step{step}"][:, 1:]).long()
        crops = torch.from_numpy(file["image_u8"][step])
        losses = train_step(state, a_batch(file["index"][step], epoch, step, crops))
        seen = [losses.metrics["prec_cls"] * 100, losses.total]
        seen += [losses.terms[f"loss_{name}"] for name in ("cls", "mse", "nce")]
        np.testing.assert_allclose([s.item() for s in seen], file["f64_records"][step], **exact)
        np.testing.assert_allclose(
            method.contrast.bank.rows, file[f"f64_step{step}_bank_after"], **exact
        )
        if step in (0, 5):
            after = our_names(file, f"f64_step{step}_after", method.net)
            for name, value in method.net.state_dict().items():
                np.testing.assert_allclose(value, after[name], **exact, err_msg=name)
    np.testing.assert_allclose(
        method.contrast.mean_exp.item() * meta["N"], file["f64_Z"], rtol=1e-12
    )
    method.net.eval()
    with torch.no_grad():
        batch = a_batch(file["index"][0], crops=torch.from_numpy(file["image_u8"][0]))
        scores = method.score(method.net(method.views(batch).double()), batch)
    found = {name: (total / count).item() for name, (total, count) in scores.items()}
    found |= {name: 100 * found[name] for name in ("prec_rot", "prec_inv")}
    np.testing.assert_allclose([found[n] for n in meta["eval_names"]], file["f64_eval"], rtol=1e-6)


# ---- what the original does not have, or does wrong ----


def contrast_of(method: decoupling.Decoupling) -> Contrast:
    assert method.contrast is not None
    return method.contrast


def bank_of(method: decoupling.Decoupling):
    return contrast_of(method).bank


def small(cfg: Decoupling, images: int = 9, **known) -> decoupling.Decoupling:
    torch.manual_seed(0)
    method = decoupling.Decoupling(cfg, Features(12), info(images, **known))
    method.net.double()
    if method.contrast is not None:
        method.contrast.bank.rows = method.contrast.bank.rows.double()
        method.contrast.mean_exp = torch.tensor(1.5, dtype=torch.float64)
    return method


def features(images: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4 * images, 12, dtype=torch.float64, generator=draw)


def test_the_proximal_term_and_its_gradient():
    cfg = Decoupling(dim=5, lambda_cls=0.0, lambda_mse=0.0, lambda_nce=0.0, proximal=0.3)
    method = small(cfg)
    batch, index = a_batch([3, 7, 0]), torch.tensor([3, 7, 0])
    assert method.contrast is not None
    row = method.contrast.bank.rows[index]
    embedding = torch.nn.functional.normalize(torch.randn(3, 5, dtype=torch.float64), dim=1)
    embedding.requires_grad_()

    def loss(e):
        return method.losses(decoupling.Parts(None, features(3)[:, 6:], e), batch).total

    loss(embedding).backward()
    apart = embedding.detach() - row
    assert loss(embedding).item() == pytest.approx(0.3 * apart.square().sum().item() / 3)
    torch.testing.assert_close(embedding.grad, 0.3 * 2 * apart / 3)
    assert torch.autograd.gradcheck(loss, embedding)


@pytest.mark.parametrize(
    ("off", "gone"),
    [
        (dict(lambda_cls=0.0), ("rotation.weight", "loss_cls", "prec_cls")),
        (dict(lambda_mse=0.0), ("loss_mse",)),
        (dict(lambda_nce=0.0), ("embed.weight", "loss_nce", "z")),
        (dict(proximal=0.0), ("loss_proximal",)),
    ],
    ids=["cls", "mse", "nce", "proximal"],
)
def test_a_term_at_zero_is_not_built(off, gone):
    method = small(Decoupling(dim=5, negatives=4, **off))
    outputs = method.net.heads(features(3))
    losses = method.losses(outputs, a_batch([1, 2, 3]))
    losses.total.backward()
    there = {*method.net.state_dict(), *losses.terms, *losses.metrics}
    assert not there & set(gone)
    assert all(p.grad is not None for p in method.net.parameters())
    scores = method.score(outputs, a_batch([1, 2, 3]))
    assert ("accuracy" in scores) == bool(method.cfg.lambda_cls)
    assert torch.isfinite(scores["loss"][0])


def test_a_zero_vector_is_embedded_without_nan():
    """The original divides by its length of zero."""
    method = small(Decoupling(dim=5, negatives=4))
    method.net.get_submodule("embed").bias.data.zero_()  # type: ignore[union-attr]
    outputs = method.net.heads(torch.zeros(8, 12, dtype=torch.float64))
    assert torch.equal(outputs.embedding, torch.zeros(2, 5, dtype=torch.float64))
    losses = method.losses(outputs, a_batch([0, 1]))
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert all(torch.isfinite(p.grad).all() for p in method.net.parameters())


def test_row_and_feature_that_cancel_out_leave_a_row_that_recovers():
    method = small(Decoupling(dim=5, negatives=4))
    assert method.contrast is not None
    unit = torch.eye(5, dtype=torch.float64)[:1]
    method.contrast.bank.rows[4] = -unit[0]
    method.contrast.bank.update(torch.tensor([4]), unit)
    assert torch.equal(method.contrast.bank.rows[4], torch.zeros(5, dtype=torch.float64))
    method.contrast.bank.update(torch.tensor([4]), unit)
    assert torch.equal(method.contrast.bank.rows[4], unit[0])


def test_pu_weights_begin_at_the_papers_epoch_scaled_to_the_run(tmp_path):
    draw = np.random.default_rng(0)
    raw = draw.random((9, 4, 4)).astype(np.float32)
    table = RotationTable(raw / raw.sum(-1, keepdims=True), np.full(9, -1, np.int8), "d")
    write(tmp_path / "t.npz", table)
    cfg = Decoupling(
        dim=5, pu_table=str(tmp_path / "t.npz"), gamma=3.0, lambda_nce=0.0, lambda_mse=0.0
    )
    method = small(cfg)
    schedule = PRESETS["decoupling-alexnet"]().schedule
    method.set_schedule(49, LRSchedule(schedule, epochs=49, batches=1, steps=49).begins)  # a fifth
    outputs = method.net.heads(features(3))
    index = torch.tensor([2, 8, 5])
    each = torch.nn.functional.cross_entropy(
        outputs.logits, torch.tensor([0, 1, 2, 3] * 3), reduction="none"
    )
    upright = torch.from_numpy(table.probabilities[:, :, 0]).double()[index]
    weights = 1 - upright**3
    weights[:, 0] = 1
    found = {e: method.losses(outputs, a_batch(index, e)).total for e in (0, 41, 42, 48)}
    for epoch in (0, 41):
        torch.testing.assert_close(found[epoch], each.mean())
    for epoch in (42, 48):  # divided by all views, not by the sum of the weights
        torch.testing.assert_close(
            found[epoch], (weights.flatten() * each).mean(), rtol=1e-6, atol=0
        )
    assert method.resume_contract()["pu_table"] == table.digest
    with pytest.raises(
        UsageError, match=r"--method.pu-from 210 is epoch 3 of this run, which ends"
    ):
        method.set_schedule(3, LRSchedule(schedule, epochs=3, batches=1, steps=3).begins)


def test_a_moving_z_follows_the_batches():
    method = small(Decoupling(dim=5, negatives=40, z="ema"))
    outputs, batch = method.net.heads(features(3)), a_batch([1, 2, 3])
    losses = method.losses(outputs, batch)
    before, now = method.contrast.mean_exp.clone(), losses.metrics["z"] / 9
    method.after_step(outputs, batch, losses)
    torch.testing.assert_close(method.contrast.mean_exp, 0.99 * before + 0.01 * now)
    method.before_first_step(outputs, batch)  # the same rows no more: the bank has been written


def test_z_of_the_first_batch_is_the_mean_over_positives_and_negatives():
    method = small(Decoupling(dim=5, negatives=40))
    outputs, batch = method.net.heads(features(3)), a_batch([1, 2, 3])
    expected = method.losses(outputs, batch).metrics["z"] / 9
    method.before_first_step(outputs, batch)
    torch.testing.assert_close(method.contrast.mean_exp, expected)


def test_the_bank_holds_rows_of_the_training_view_alone():
    rows = np.array([1, 4, 5, 8])
    method = small(Decoupling(dim=5, negatives=300), 4, rows=rows, data_rows=10)
    assert method.contrast is not None
    assert method.contrast.bank.population == 4
    assert method.contrast.bank.place.tolist() == [-1, 0, -1, -1, 1, 2, -1, -1, 3, -1]
    outputs = method.net.heads(features(2))
    with pytest.raises(UsageError, match="out of range"):
        method.losses(outputs, a_batch([4, 9]))


def test_a_fresh_row_has_a_mean_square_length_of_one():
    bank = bank_of(small(Decoupling(dim=32), 4000))
    assert bank is not None
    assert bank.rows.square().sum(1).mean().item() == pytest.approx(1, abs=0.02)
    assert bank.rows.abs().max().item() <= np.sqrt(3 / 32)


def test_a_fresh_model_costs_what_the_original_does():
    """ALGORITHM: ln 4, and ln K + 1 / (2 D T^2) + 1 within a little, on unit embeddings."""
    torch.manual_seed(0)
    cfg = config.Config(method=Decoupling(), backbone=config.AlexNet(width=0.25))
    known = dataclasses.replace(info(5000, dtype=torch.float32), size=64)
    method = assemble.method(cfg, known)
    crops = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    batch = a_batch(torch.arange(8), crops=crops)
    with torch.no_grad():
        outputs = method.net(method.views(batch))
        method.before_first_step(outputs, batch)
        losses = method.losses(outputs, batch)
    assert losses.terms["loss_cls"].item() == pytest.approx(np.log(4), abs=0.15)
    expected = np.log(4096) + 1 / (2 * 128 * 0.07**2) + 1
    assert losses.terms["loss_nce"].item() == pytest.approx(expected, abs=0.8)


def test_the_other_half_is_judged_by_the_same_head():
    method = small(Decoupling(dim=5, negatives=4))
    given = features(3)
    given[:, 6:] = given[:, :6]
    scores = method.score(method.net.heads(given), a_batch([1, 2, 3]))
    assert torch.equal(scores["prec_inv"][0], scores["prec_rot"][0])
    torch.testing.assert_close(scores["loss_inv"][0], scores["loss_rot"][0])


def test_a_bank_of_other_pictures_is_refused():
    bank, other = (
        bank_of(small(Decoupling(dim=5))),
        bank_of(small(Decoupling(dim=5), fingerprint="g")),
    )
    assert bank is not None
    assert other is not None
    with pytest.raises(UsageError, match=r"--data"):
        other.load_state_dict(bank.state_dict())


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("dim", 0),
        ("dim", 4096),
        ("negatives", 0),
        ("bank_momentum", 1.5),
        ("lambda_nce", -1.0),
        ("gamma", -2.0),
        ("pu_from", -1),
    ],
)
def test_knobs_that_no_run_could_use_are_named(knob, value):
    cfg = config.Config(method=dataclasses.replace(Decoupling(), **{knob: value}))
    with pytest.raises(UsageError, match=config.knob(f"method.{knob}")):
        ranges.check(cfg)


def test_without_any_term_there_is_nothing_to_learn():
    cfg = config.Config(method=Decoupling(lambda_cls=0.0, lambda_mse=0.0, lambda_nce=0.0))
    with pytest.raises(UsageError, match="lambda-cls"):
        ranges.check(cfg)


def test_negatives_are_addressed_by_seed_picture_and_step_and_may_leave_out_the_own_row():
    for exclude in (False, True):
        cfg = Decoupling(dim=5, negatives=7, exclude_self=exclude)
        draw = contrast_of(small(cfg, seed=11)).negatives(a_batch([3, 7], epoch=2, step=40))
        assert (draw.count, draw.seed, int(draw.step), draw.exclude_self) == (7, 11, 40, exclude)
        assert draw.index.tolist() == [3, 7]


def test_the_knobs_of_the_instance_term_reach_it():
    """Temperature, the old row's share, K and the kind of contrast; each changes what it should."""
    batch = a_batch([1, 2, 3])

    def value(**knobs) -> tuple[float, torch.Tensor]:
        method = small(Decoupling(**(dict(dim=5, negatives=40) | knobs)))
        outputs = method.net.heads(features(3))
        method.before_first_step(outputs, batch)
        losses = method.losses(outputs, batch)
        method.after_step(outputs, batch, losses)
        assert method.contrast is not None
        return losses.terms["loss_nce"].item(), method.contrast.bank.rows

    plain, rows = value()
    for knobs in (dict(temperature=0.2), dict(negatives=41), dict(contrast="infonce")):
        assert value(**knobs)[0] != pytest.approx(plain, rel=1e-6)
    assert value(lambda_nce=0.25)[0] == pytest.approx(0.25 * plain, rel=1e-9)
    kept = value(bank_momentum=1.0)[1][1]
    torch.testing.assert_close(kept, kept / kept.norm())
    taken = value(bank_momentum=0.0)[1][1]
    assert not torch.allclose(taken, rows[1], atol=1e-3)
    own = small(Decoupling(dim=5)).net.heads(features(3)).embedding
    torch.testing.assert_close(taken, own[0].detach())


def test_the_weights_of_the_terms_scale_them():
    batch = a_batch([1, 2, 3])
    plain = small(Decoupling(dim=5, negatives=4))
    scaled = small(Decoupling(dim=5, negatives=4, lambda_cls=2.0, lambda_mse=3.0, lambda_nce=5.0))
    once, more = (m.losses(m.net.heads(features(3)), batch).terms for m in (plain, scaled))
    for name, weight in (("cls", 2), ("mse", 3), ("nce", 5)):
        torch.testing.assert_close(more[f"loss_{name}"], weight * once[f"loss_{name}"])


def test_pu_from_is_scaled_too_and_as_published_is_not():
    schedule = PRESETS["decoupling-alexnet"]().schedule
    rates = LRSchedule(schedule, epochs=49, batches=1, steps=49)
    method = small(Decoupling(dim=5, pu_from=100))
    method.weights = torch.ones(1, 4)
    method.set_schedule(49, rates.begins)
    assert method.pu_epoch == 20
    printed = dataclasses.replace(schedule, as_published=True)
    assert LRSchedule(printed, epochs=49, batches=1, steps=49).begins(210) == 210
    for epochs in (49, 50, 100, 245, 300):  # the switch comes with the rate's restart, never apart
        rates = LRSchedule(schedule, epochs=epochs, batches=1, steps=epochs)
        at = rates.begins(210)
        assert [rates.of_epoch(at - 1), rates.of_epoch(at)] == [1e-5, 1e-4]


def test_infonce_at_a_low_temperature_goes_on():
    """exp(s / T) is beyond float32 there; the loss is not, nor anything that a checkpoint waits for."""
    method = small(Decoupling(dim=5, negatives=4, contrast="infonce", temperature=0.01))
    method.net.float()
    assert method.contrast is not None
    outputs = method.net.heads(features(2).float())
    method.contrast.bank.rows = method.contrast.bank.rows.float()
    method.contrast.bank.rows[:2] = outputs.embedding.detach()
    losses = method.losses(outputs, a_batch([0, 1]))
    assert torch.isfinite(losses.total)
    assert all(torch.isfinite(v) for v in losses.metrics.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_inside_the_network(dtype):
    """What a GPU trains with: embeddings, losses, rows and Z are float32, whatever the net's arithmetic."""
    torch.manual_seed(0)
    cfg = config.Config(
        method=Decoupling(dim=16, negatives=20, z="ema", proximal=0.1),
        backbone=config.AlexNet(width=0.125, kernel=5, stride=2),
    )
    method = assemble.method(cfg, dataclasses.replace(info(9, dtype=dtype), size=32))
    crops = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    state = TrainState(
        method=method,
        net=method.net,
        optimizer=sgd(method.net, cfg.optim, 0.01),
        schedule=LRSchedule(cfg.schedule, epochs=1, batches=9, steps=9),
        device=torch.device("cpu"),
        dtype=dtype,
    )
    seen = []
    method.net.register_forward_hook(lambda net, given, out: seen.append(out))
    for step in range(2):
        losses = train_step(state, a_batch([0, 3, 5, 8], step=step, crops=crops))
    parts = seen[0]
    assert parts.logits.dtype == parts.other.dtype == dtype
    assert parts.embedding.dtype == torch.float32
    torch.testing.assert_close(parts.embedding.norm(dim=1), torch.ones(4))
    assert {v.dtype for v in losses.terms.values()} == {torch.float32}
    assert method.contrast is not None
    assert {method.contrast.bank.rows.dtype, method.contrast.mean_exp.dtype} == {torch.float32}
    assert torch.isfinite(losses.total)


def test_a_trunk_that_ends_in_maps_is_averaged_over_places():
    cfg = config.Config(
        method=Decoupling(dim=5, negatives=4), backbone=config.Nin(width=0.125, stages=3)
    )
    known = dataclasses.replace(info(9, dtype=torch.float32), size=32)
    net = assemble.method(cfg, known).net.eval()
    views = torch.randn(4, 3, 32, 32)
    maps = net.get_submodule("trunk")(views)
    assert maps.ndim == 4
    parts, pooled = net(views), maps.mean(dim=(2, 3))
    torch.testing.assert_close(parts.other, pooled[:, pooled.shape[1] // 2 :])


def test_features_that_cannot_be_halved_are_refused():
    with pytest.raises(
        UsageError, match=r"7 features, which cannot be split in half.*--backbone.width"
    ):
        decoupling.Decoupling(Decoupling(dim=5), Features(7), info(9))


def test_the_proximal_term_alone_writes_the_bank_too():
    method = small(Decoupling(dim=5, lambda_cls=0.0, lambda_mse=0.0, lambda_nce=0.0, proximal=1.0))
    outputs, batch = method.net.heads(features(2)), a_batch([1, 2])
    assert method.contrast is not None
    before = method.contrast.bank.rows.clone()
    method.after_step(outputs, batch, method.losses(outputs, batch))
    changed = (method.contrast.bank.rows != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [1, 2]
    assert set(method.state_dict()) == {"bank.rows", "bank.fingerprint"}  # there is no Z
