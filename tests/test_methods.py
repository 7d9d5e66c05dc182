"""Contracts that every method keeps, over the table; then what each one computes."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fastrot import assemble, config
from fastrot.core import Batch, DataInfo
from fastrot.ops.rotate import SpaceToDepth
from fastrot.training.loop import train_step
from fastrot.training.optim import LRSchedule, sgd
from fastrot.training.state import TrainState

SIZE, IMAGES, CLASSES = 32, 6, 3
BANK = dict(dim=16, negatives=5, contrast="infonce")  # six pictures
FITTING = {
    config.Decoupling: BANK,
    config.Pirl: BANK | {"crop": config.RandomResized(size=SIZE)},
    # the least of which nine patches are cut
    config.Jigsaw: {"crop": config.RandomResized(size=102), "permutations": 4},
}
TO_CONV5 = (config.Pirl, config.Jigsaw)


def batch(seed: int = 0, kind: type = config.RotNet) -> Batch:
    """With the crops that a method of this kind wants."""
    draw, crops = torch.Generator().manual_seed(seed), []
    cfg = kind(**{"crop": config.RandomResized(size=SIZE)} | FITTING.get(kind, {}))
    for crop in assemble.METHODS[kind].crops(cfg):
        shape = (IMAGES, crop.size, crop.size, 3)
        crops.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw))
        crops[-1][:, : crop.size // 2] //= (
            4  # dark above, bright below: there is something to learn
        )
    index = torch.arange(IMAGES)
    return Batch(tuple(crops), index, index % CLASSES, torch.tensor([0, 0]))


def build(kind: type, dtype: torch.dtype = torch.float32, space_to_depth: bool = False):
    torch.manual_seed(0)
    cfg = config.Config(
        method=kind(**FITTING.get(kind, {})),
        backbone=config.AlexNet(
            width=0.125,
            kernel=5,
            stride=2,
            space_to_depth=space_to_depth,
            last="conv5" if kind in TO_CONV5 else "fc_block",
        ),
    )
    info = DataInfo(
        images=IMAGES,
        rows=None,
        data_rows=IMAGES,
        data_fingerprint="",
        classes=CLASSES,
        mean=cfg.mean,
        std=cfg.std,
        size=SIZE,
        seed=0,
        device=torch.device("cpu"),
        dtype=dtype,
        fingerprint="of these pictures",
    )
    return assemble.method(cfg, info)


def state_of(method, lr: float = 0.02) -> TrainState:
    schedule = config.Schedule(kind="constant", table=((1, lr),))
    return TrainState(
        method=method,
        net=method.net,
        optimizer=sgd(method.net, config.Sgd(), lr),
        schedule=LRSchedule(schedule, epochs=1, batches=100, steps=100),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def everything(method) -> dict[str, torch.Tensor]:
    return {**method.net.state_dict(), **method.state_dict()}


@pytest.mark.parametrize("kind", assemble.METHODS, ids=lambda kind: kind.__name__)
def test_loss_falls_on_one_batch(kind):
    state, seen = state_of(build(kind)), batch(kind=kind)
    losses = [train_step(state, seen).total.item() for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", assemble.METHODS, ids=lambda kind: kind.__name__)
def test_losses_write_nothing(kind):
    method, seen = build(kind), batch(kind=kind)
    outputs = method.net(method.views(seen))
    method.before_first_step(outputs, seen)
    before = {k: v.clone() for k, v in everything(method).items()}
    first = method.losses(outputs, seen)
    again = method.losses(outputs, seen)
    assert torch.equal(first.total, again.total)
    assert all(torch.equal(before[k], v) for k, v in everything(method).items())
    assert not any(each.requires_grad for each in tree_leaves(method.views(seen)))


# of PIRL what is scored is not what is descended: see test_pirl.py
@pytest.mark.parametrize(
    "kind", [kind for kind in assemble.METHODS if kind is not config.Pirl], ids=lambda k: k.__name__
)
def test_scores_are_the_losses_added_up(kind):
    method, seen = build(kind), batch(kind=kind)
    method.net.eval()
    with torch.no_grad():
        outputs = method.net(method.views(seen))
        losses, scores = method.losses(outputs, seen), method.score(outputs, seen)
    total, count = scores["loss"]  # of what the net answers; the bank is never read
    torch.testing.assert_close(total / count, losses.terms.get("loss_cls", losses.total))
    total, count = scores["accuracy"]
    torch.testing.assert_close(total / count, losses.metrics["accuracy"])


@pytest.mark.parametrize("kind", assemble.METHODS, ids=lambda kind: kind.__name__)
def test_a_trunk_gets_its_views_in_the_cells_that_it_asks_for(kind):
    plain, other = (state_of(build(kind, space_to_depth=each)) for each in (False, True))
    cells = SpaceToDepth(side=2, pad=2, count=18)
    assert other.method.net.trunk.space_to_depth == cells
    seen = batch(kind=kind)
    views, theirs = (tree_leaves(state.method.views(seen)) for state in (plain, other))
    for view, each in zip(views, theirs, strict=True):  # patches stay as they are
        assert torch.equal(each, view if kind is config.Jigsaw else cells(view))
    one, two = (train_step(state, seen).total for state in (plain, other))
    torch.testing.assert_close(one, two)


def rotnet(**knobs):
    """A RotNet with some knobs, and its views of a batch as pictures [v, 3, s, s] of numpy."""
    torch.manual_seed(0)
    FITTING[config.RotNet] = knobs
    try:
        return build(config.RotNet)
    finally:
        del FITTING[config.RotNet]


def in_epoch(each: Batch, epoch: int, places=slice(None)) -> Batch:
    crops = tuple(crop[places] for crop in each.crops)
    return Batch(crops, each.index[places], each.label[places], torch.tensor([epoch, 0]))


def test_one_copy_of_each_picture_is_drawn_by_seed_epoch_and_row():
    method, plain = rotnet(copies="one"), rotnet()
    seen, all_views = [], plain.views(batch()).unflatten(0, (IMAGES, 4))
    for epoch in range(200):
        each = in_epoch(batch(), epoch)
        labels = method.labels(each)
        seen.append(labels)
        assert torch.equal(method.views(each), all_views[torch.arange(IMAGES), labels])
        others = in_epoch(batch(), epoch, [4, 1])  # in another batch and order
        assert torch.equal(method.labels(others), labels[[4, 1]])
    shares = torch.bincount(torch.stack(seen).flatten(), minlength=4) / (200 * IMAGES)
    assert ((shares - 0.25).abs() < 0.05).all()
    assert len({tuple(each.tolist()) for each in seen}) > 100  # pictures are drawn apart
    method.net.eval()  # judged by all
    assert torch.equal(method.views(batch()), plain.views(batch()))
    assert torch.equal(method.labels(batch()), plain.labels(batch()))


@pytest.mark.parametrize("angles", [(0, 180), (90, 270), (180, 0, 90)])
def test_a_class_is_the_place_of_its_angle(angles):
    method, crops = rotnet(angles=angles), batch().images.numpy()
    assert method.headline.chance == 1 / len(angles)
    assert method.rotation_logits(torch.zeros(4, 2)) is None
    assert not method.predicts_rotation(config.RotNet(angles=angles))
    views = method.views(batch()).unflatten(0, (IMAGES, len(angles)))
    assert method.labels(batch()).tolist() == [*range(len(angles))] * IMAGES
    for place, degrees in enumerate(angles):
        turned = np.rot90(crops, degrees // 90, axes=(1, 2)).copy()
        alone = rotnet().views(
            Batch((torch.from_numpy(turned),), *[batch().index] * 2, torch.tensor([0, 0]))
        )
        torch.testing.assert_close(views[:, place], alone[::4])


@pytest.mark.parametrize("copies", ["all", "one"])
def test_between_quarters_all_views_are_resampled(copies):
    """The 0-degree one too; and one that is drawn is the one that its label names."""
    angles = (0, 45, 90)
    method = rotnet(angles=angles, copies=copies)
    views, labels = method.views(batch()), method.labels(batch())
    assert len(views) == len(labels) == IMAGES * (3 if copies == "all" else 1)
    method.net.eval()
    every = method.views(batch()).unflatten(0, (IMAGES, 3))
    plain = rotnet().views(batch()).unflatten(0, (IMAGES, 4))
    assert not torch.equal(every[:, 0], plain[:, 0])
    torch.testing.assert_close(every[:, 2], torch.rot90(every[:, 0], 1, (2, 3)), atol=0.02, rtol=0)
    if copies == "one":
        assert torch.equal(views, every[torch.arange(IMAGES), labels])
        assert set(labels.tolist()) != {0}
    else:
        assert torch.equal(views, every.flatten(0, 1))


def test_rotnet_labels_each_view_with_its_turn():
    method = build(config.RotNet)
    images = batch().images.numpy()
    views = method.views(batch())
    assert views.shape == (4 * IMAGES, 3, SIZE, SIZE)
    mean, std = np.array(method.info.mean), np.array(method.info.std)
    logits = torch.randn(4 * IMAGES, 4)
    for i in range(IMAGES):
        for rotation in range(4):
            rotated = (np.rot90(images[i], rotation) / 255 - mean) / std
            np.testing.assert_allclose(
                views[4 * i + rotation].permute(1, 2, 0).numpy(), rotated, atol=1e-5
            )
    rotation = torch.tensor([0, 1, 2, 3] * IMAGES)
    losses = method.losses(logits, batch())
    torch.testing.assert_close(losses.total, F.cross_entropy(logits, rotation))
    assert losses.metrics["accuracy"].item() == pytest.approx(
        (logits.argmax(1) == rotation).float().mean().item()
    )


def test_a_fresh_rotnet_is_at_chance():
    """Expected value of an untrained model: ln 4."""
    method = build(config.RotNet)
    loss = method.losses(method.net(method.views(batch())), batch()).total.item()
    assert abs(loss - np.log(4)) < 0.25


def test_a_step_in_bfloat16_computes_in_it():
    state = state_of(build(config.RotNet, torch.bfloat16))
    state.dtype = torch.bfloat16
    seen = []
    state.method.net.register_forward_hook(lambda net, given, out: seen.append(out.dtype))
    assert torch.isfinite(train_step(state, batch()).total)
    assert seen == [torch.bfloat16]
