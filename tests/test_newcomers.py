"""What comes next finds its place: each newcomer is one file, one dataclass and one line in a table, as here."""

import dataclasses
import json
import sys
import types
from dataclasses import dataclass

import jaxtyping
import pytest
import torch
from test_run import TINY, assert_same_bits
from torch import nn
from torch.nn import functional as F

from fastrot import assemble, config, evaluate, train
from fastrot.backbones.staged import Staged
from fastrot.config import Config, Crop, RandomResized
from fastrot.core import DTYPES, Headline, Losses, Method
from fastrot.evals.features import features
from fastrot.evals.trained import load, trained_method
from fastrot.methods.contrast import Contrast
from fastrot.ops.rotate import rotated_views
from fastrot.speed import memory
from fastrot.speed.cost import step_cost
from fastrot.training import checkpoint, session
from fastrot.training.budget import schedule_of
from fastrot.training.state import build

CPU = torch.device("cpu")


@pytest.fixture
def admitted(monkeypatch):
    """A line in a union of config.py, and one in a table of assemble.py."""

    # a signature holds the union as it was when its module was read
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def admit(field, kind, part):
        monkeypatch.setitem(
            {"method": assemble.METHODS, "backbone": assemble.BACKBONES}[field], kind, part
        )
        monkeypatch.setitem(Config.__annotations__, field, Config.__annotations__[field] | kind)

    return admit


def go(pictures, out, *more: str, **knobs) -> None:
    """A tiny run of the command line's config with some parts set."""
    cfg = train.command_line([*TINY, "--data", str(pictures), "--out", str(out), *more])
    session.train(config.resolved(dataclasses.replace(cfg, **knobs)))


def last(run):
    return run / "checkpoints" / "last.pt"


# ---- a method with two crops and a bank ----


@dataclass(frozen=True, kw_only=True)
class PirlKnobs:
    """An image and a rotation of another crop of it agree against a bank: a toy of Misra 2020."""

    crop: Crop = RandomResized(size=32)  # noqa: RUF009 (frozen)
    dim: int = 8
    negatives: int = 16
    temperature: float = 0.07
    bank_momentum: float = 0.5
    contrast: str = "nce"
    z: str = "ema"
    exclude_self: bool = True
    bank: str = "replicated"
    bank_dtype: str = "fp32"


class PirlNet(nn.Module):
    def __init__(self, trunk: Staged, dim: int):
        super().__init__()
        self.trunk, self.embed = trunk, nn.Linear(trunk.channels[trunk.stages[-1]], dim)

    def forward(self, views: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(F.normalize(self.embed(self.trunk(each).flatten(1)).float()) for each in views)


class Pirl(Method):
    headline = Headline(title="Distance of a rotation", score="loss")

    @staticmethod
    def crops(cfg):
        return (cfg.crop, cfg.crop)

    def __init__(self, cfg, trunk, info):
        self.net, self.info, self.contrast = PirlNet(trunk, cfg.dim), info, Contrast(cfg, info)

    def views(self, batch):
        shown, info = ((batch.crops[0], (0,)), (batch.crops[-1], (1,))), self.info
        return tuple(rotated_views(c, r, info.mean, info.std, dtype=info.dtype) for c, r in shown)

    def before_first_step(self, outputs, batch):
        self.contrast.before_first_step(outputs[0], batch)

    def losses(self, outputs, batch):
        (image, z), (rotated, _) = (self.contrast.loss(each, batch) for each in outputs)
        return Losses({"loss_image": image.mean(), "loss_rotated": rotated.mean()}, z)

    def score(self, outputs, batch):
        apart = (outputs[0] - outputs[1]).square().sum(dim=1)
        return {"loss": (apart.sum(), torch.full_like(apart.sum(), len(apart)))}

    def after_step(self, outputs, batch, losses):
        self.contrast.after_step(outputs[0], batch, losses.metrics["z"])

    def state_dict(self):
        return self.contrast.state_dict()

    def load_state_dict(self, state):
        self.contrast.load_state_dict(state)


def test_a_method_with_two_crops_and_a_bank(pictures, tmp_path, admitted, capsys):
    admitted("method", PirlKnobs, Pirl)
    pirl = {"method": PirlKnobs(), "schedule": config.Schedule(steps=6, kind="constant")}
    go(pictures, tmp_path / "straight", **pirl)
    assert "loss on held-out pictures" in capsys.readouterr().out
    go(pictures, tmp_path / "broken", "--max-steps", "3", **pirl)
    go(pictures, tmp_path / "broken", **pirl)
    assert_same_bits(last(tmp_path / "straight"), last(tmp_path / "broken"))
    assert "bank.rows" in checkpoint.load(last(tmp_path / "straight"))["method"]
    page = (tmp_path / "straight" / "index.html").read_text()
    assert "Distance of a rotation" in page
    assert "chance" not in page.split("<h3>")[0]
    summary = json.loads((tmp_path / "straight" / "summary.json").read_text())
    assert (summary["chance"], summary["val_accuracy"]) == (None, None)
    assert not trained_method(tmp_path / "straight", CPU).net.training


def test_two_crops_differ_and_their_step_is_counted_and_halved(pictures, admitted):
    admitted("method", PirlKnobs, Pirl)
    cfg = dataclasses.replace(train.command_line(TINY), method=PirlKnobs(), precision="fp32")
    cfg = config.resolved(cfg)
    view = assemble.training_view(cfg)
    loader = assemble.open_loader(str(pictures), view, batch=4, workers=0, enlarge=True)
    first, second = next(iter(loader.epoch(0))).crops
    assert not torch.equal(first, second)
    info = assemble.data_info(cfg, loader, None, CPU, DTYPES["fp32"])
    state = build(cfg, info, schedule_of(cfg, 1, len(loader)))
    alone = dataclasses.replace(cfg, method=config.RotNet(crop=cfg.method.crop))
    rotnet = build(alone, info, state.schedule).method
    one_crop = assemble.training_view(alone)
    two, four = step_cost(state.method, view, cfg, CPU), step_cost(rotnet, one_crop, alone, CPU)
    assert 0.4 < two.flop / four.flop < 0.6  # two views a picture, and four
    assert memory.largest(state, view, 4) == 2


# ---- a backbone of torchvision ----


@dataclass(frozen=True, kw_only=True)
class ResNetKnobs:
    """torchvision's ResNet-18."""


def resnet18(cfg: ResNetKnobs, size: int) -> Staged:
    from torchvision.models import resnet18

    net = resnet18()
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    layers = {f"layer{k}": net.get_submodule(f"layer{k}") for k in (1, 2, 3, 4)}
    channels = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
    return Staged({"stem": stem, **layers}, {"stem": 64, **channels})


def test_a_backbone_of_torchvision(pictures, tmp_path, admitted):
    admitted("backbone", ResNetKnobs, resnet18)
    resnet = {"backbone": ResNetKnobs(), "schedule": config.Schedule(steps=2, kind="constant")}
    go(pictures, tmp_path, **resnet)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert load(tmp_path).features(images, "layer3").shape == (2, 256, 2, 2)
    assert 'stage="layer4"' in (tmp_path / "index.html").read_text()


# ---- an evaluation over features ----


@dataclass(frozen=True, kw_only=True)
class Knn:
    """The class of each picture by that of the most alike other one."""

    data: str
    stage: str = "conv5"


def knn(run: str, knobs: Knn) -> int:
    trunk = load(run)
    view = assemble.evaluation_view(trunk.config)
    loader = assemble.open_loader(knobs.data, view, batch=8, workers=0, enlarge=True)
    rows = F.normalize(features(trunk, loader, [knobs.stage])[knobs.stage])
    nearest = (rows @ rows.T).fill_diagonal_(-1).argmax(dim=1)
    label = torch.from_numpy(loader.data.labels)
    print(f"right: {(label[nearest] == label).float().mean():.0%} of {len(rows)}")
    return 0


def test_an_evaluation_over_features(straight, pictures, capsys, monkeypatch):
    monkeypatch.setitem(evaluate.EVALUATIONS, "knn", Knn)
    file = types.SimpleNamespace(evaluate=knn)
    monkeypatch.setitem(sys.modules, "fastrot.evals.knn", file)
    assert evaluate.main([str(straight), "knn", "--data", str(pictures)]) == 0
    assert "% of 37" in capsys.readouterr().out


def test_features_are_those_of_each_picture_alone_whatever_the_ranks(straight, pictures):
    trunk = load(straight)
    view = assemble.evaluation_view(trunk.config)

    def of(rank, world, **more):
        split = {"batch": 5, "rank": rank, "world": world, "workers": 0, "enlarge": True}
        loader = assemble.open_loader(str(pictures), view, **split)
        return loader, features(trunk, loader, ["conv2", "fc_block"], **more)

    loader, whole = of(0, 1)
    _, mine = of(0, 2)
    _, other = of(1, 2)  # in one process their sums are not taken: each has its own rows
    for stage, rows in whole.items():
        assert (mine[stage].any(dim=1) ^ other[stage].any(dim=1)).all()  # no row twice
        torch.testing.assert_close(mine[stage] + other[stage], rows)
    assert whole["conv2"].shape == (37, trunk.net.channels["conv2"])
    for batch in loader.epoch(0):
        alone = trunk.features(batch.images[:1], "conv2").mean(dim=(2, 3))
        torch.testing.assert_close(whole["conv2"][batch.index[:1]], alone)
    half = of(0, 1, pool=2, dtype=torch.float16)[1]["conv2"]
    assert (half.dtype, half.shape[1]) == (torch.float16, 4 * trunk.net.channels["conv2"])
