"""Saliency and attention: their arithmetic, and `evaluate.py RUN saliency` on pictures with boxes."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_run import TINY, go
from torch import nn
from truth import golden, photo

from fastrot import assemble, config, evaluate, train
from fastrot.backbones.staged import Staged
from fastrot.config import UsageError
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert
from fastrot.evals import maps
from fastrot.evals.maps import attention, qualities, saliency, saliency_quality, upscaled
from fastrot.evals.trained import trained_method

FEW = ["--device", "cpu", "--workers", "0"]
pytestmark = pytest.mark.usefixtures("quick_runs")


# ---- arithmetic ----


@pytest.mark.parametrize("case", range(3))
def test_quality_is_the_studys(case):
    file = {k[4:]: v for k, v in golden("saliency_q").items() if k.startswith(f"q{case}__")}
    box = file["box_r0c0r1c1"][None]
    found = saliency_quality(file["maps"], float(file["threshold"]), box)
    assert found == pytest.approx(float(file["Q"]), rel=1e-12)


def test_quality_by_the_mean_of_several_boxes_and_of_none():
    both = np.zeros((2, 4, 4))
    both[0, :2, :2], both[1, 2:, 2:] = 1, 1
    boxes = np.array([[0, 0, 2, 2], [2, 2, 4, 4], [0, 0, 1, 1]])
    assert saliency_quality(both, 0.5, boxes) == 1
    assert saliency_quality(both, 0.6, boxes, reduce="mean") == 0
    assert saliency_quality(both, 0.5, boxes[:1]) == 0.5
    assert saliency_quality(both, 0.5, np.zeros((0, 4), np.int64)) == 0
    assert saliency_quality(both, 0.0, boxes) == 0.5  # every pixel
    assert saliency_quality(np.ones((1, 4, 4)), 1.0, np.array([[-2, -2, 9, 9]])) == 1


class Sums(nn.Module):
    """Neurons that are weighted sums of pixels: their gradients are the weights."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights  # [n, 3, s, s]

    def forward(self, views):
        return torch.einsum("bchw,nchw->bn", views, self.weights)


@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_saliency_is_the_largest_gradient_of_any_neuron(monkeypatch, at_once):
    monkeypatch.setitem(maps.PIXELS, "cpu", 25 * at_once)
    weights = torch.randn(7, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    views = torch.rand(2, 3, 5, 5)
    each = weights.abs().amax(dim=1)
    for reduce, want in {"max": each.amax(dim=0), "mean": each.mean(dim=0)}.items():
        found = saliency(Sums(weights), views, reduce)
        torch.testing.assert_close(found, want.expand(2, -1, -1))
    assert not views.requires_grad


def test_saliency_of_a_net_is_what_one_gradient_after_the_other_gives():
    torch.manual_seed(0)
    net = assemble.backbone(config.Named(name="six-layer"), 32).eval().requires_grad_(False)
    views = torch.randn(3, 3, 32, 32)
    want = torch.zeros(3, 32, 32)
    for neuron in range(64):
        pixels = views.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(pixels)[:, neuron].sum(), pixels)
        want = torch.maximum(want, slope.abs().amax(dim=1))
    torch.testing.assert_close(saliency(net, views), want)


def test_memory_of_many_neurons_does_not_grow_with_their_number(monkeypatch):
    """The largest tensor of gradients holds views of PIXELS pixels, however many views and neurons there are."""
    largest, grad = [], torch.autograd.grad

    def noted(*words, **how):
        found = grad(*words, **how)
        largest.append(found[0].numel() // 3)
        return found

    monkeypatch.setattr(torch.autograd, "grad", noted)
    monkeypatch.setitem(maps.PIXELS, "cpu", 16 * 32)
    for count, neurons in ((5, 10), (5, 1280), (100, 10)):
        largest.clear()
        saliency(Sums(torch.randn(neurons, 3, 4, 4)), torch.rand(count, 3, 4, 4))
        assert max(largest) <= 16 * 32
        assert sum(largest) == 16 * count * neurons


def test_attention_is_the_power_sum_of_a_stage_from_0_to_1():
    net = Staged({"conv1": nn.Conv2d(3, 2, 1, bias=False)}, {"conv1": 2})
    with torch.no_grad():
        net.conv1.weight.zero_()
        net.conv1.weight[0, 0], net.conv1.weight[1, 1] = 2, -1
    views = torch.zeros(1, 3, 2, 2)
    views[0, 0, 0, 0], views[0, 1, 0, 0], views[0, 1, 1, 1] = 1, 1, 1
    for power, corner in ((1.0, 1 / 3), (2.0, 1 / 5)):
        (found,) = attention(net, views, ("conv1",), (power,))
        assert found[0].tolist() == [[1, 0], [0, pytest.approx(corner)]]
    assert upscaled(found, 8).shape == (1, 8, 8)
    (small,) = attention(
        net, 1e-12 * views, ("conv1",), (4.0,)
    )  # as of a net that has learnt nothing
    (same,) = attention(net, views, ("conv1",), (4.0,))
    torch.testing.assert_close(small, same)


def test_thresholds_are_each_pictures_own():
    both = torch.arange(8.0).reshape(2, 2, 2)
    inside = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]] * 2)
    found = qualities(both, inside, torch.tensor([[2.0, 0.0], [6.0, 100.0]]))
    assert found.tolist() == [[1, 0.5], [1, 0]]


# ---- evaluate.py RUN saliency ----


@pytest.fixture(scope="module")
def boxed(tmp_path_factory):
    """Eight pictures, the odd ones with a box of a cat in their middle, the last with a dog's."""
    root = tmp_path_factory.mktemp("boxed")
    images, annotations = [], []
    for i in range(8):
        Image.fromarray(photo(i, 40, 60)).save(root / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 60})
        if i % 2:
            box = {"id": i, "image_id": i, "category_id": 2 if i == 7 else 1, "iscrowd": 0}
            annotations.append({**box, "bbox": [15, 10, 30, 20], "area": 600})
    names = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    told = {"images": images, "annotations": annotations, "categories": names}
    (root / "instances.json").write_text(json.dumps(told))
    options = BetonOptions(
        source="coco", root=root / "instances.json", out=root / "b.beton", workers=0
    )
    return convert(options).out


def ask(run, boxed, file, *words) -> dict:
    command = [str(run), "saliency", "--data", str(boxed), "--json", str(file), *FEW, *words]
    assert evaluate.main(command) == 0
    return json.loads(file.read_text())


def test_the_command_tells_both_layers_beside_a_random_net(straight, boxed, tmp_path, capsys):
    told = ask(straight, boxed, tmp_path / "s.json", "--threshold", "0")
    found = told["stages"]
    assert told["pictures"] == 4  # those with a box
    layers = {"rotation", "embedding", "random rotation", "random embedding"}
    assert found.keys() == layers | {"chance"}
    every = found["chance"]["best"]
    # a quarter of the area, whose edges lie in pixels' middles
    assert every == pytest.approx(0.25, abs=0.02)
    for layer in layers:
        assert found[layer]["q"] == pytest.approx(every)  # from 0 on every pixel is salient
        assert found[layer]["best"] >= found[layer]["q"]
        assert 0 < found[layer]["ranked"] < 1
    assert found["rotation"] != found["random rotation"]
    said = capsys.readouterr().out
    for words in ("4 pictures", "random embedding", "pictures/s"):
        assert words in said


def test_the_command_gives_what_the_function_gives(straight, boxed, tmp_path):
    found = ask(
        straight, boxed, tmp_path / "s.json", "--layers", "embedding", "--threshold", "1e-3"
    )
    method = trained_method(straight, torch.device("cpu"))
    crop = config.Whole(size=32)
    view = assemble.evaluation_view(config.Config(method=config.RotNet(crop=crop)))
    loader = assemble.open_loader(boxed, view, batch=8, workers=0, enlarge=True)
    from fastrot.data.boxes import read_boxes
    from fastrot.ops.rotate import rotated_views

    boxes, cfg = read_boxes(loader.data), config.Config()
    images = next(loader.epoch(0)).images
    views = rotated_views(images, (0,), cfg.mean, cfg.std, dtype=torch.float32)
    method.net.requires_grad_(False)
    each = saliency(lambda v: method.net.trunk(v), views)
    rows = [row for row in range(8) if len(boxes.squashed(row, 32))]
    own = [saliency_quality(each[row][None].numpy(), 1e-3, boxes.squashed(row, 32)) for row in rows]
    assert found["stages"]["embedding"]["q"] == pytest.approx(np.mean(own), abs=1e-6)


def test_categories_and_few_pictures(straight, boxed, tmp_path):
    assert ask(straight, boxed, tmp_path / "a.json", "--categories", "cat ")["pictures"] == 3
    assert ask(straight, boxed, tmp_path / "b.json", "--pictures", "2")["pictures"] == 2
    with pytest.raises(UsageError, match=r"--categories got cow: .* has cat, dog"):
        ask(straight, boxed, tmp_path / "c.json", "--categories", "cow,dog")


def test_a_random_net_is_the_runs_own_before_it_learnt(straight, boxed, tmp_path, pictures):
    """Its seed decides it: another seed, other numbers; the same, the same."""
    first = ask(straight, boxed, tmp_path / "a.json")["stages"]
    again = ask(straight, boxed, tmp_path / "b.json")["stages"]
    assert first == again
    assert go(pictures, tmp_path / "run", "--seed", "1", "--max-steps", "1") == 0
    other = ask(tmp_path / "run", boxed, tmp_path / "c.json")["stages"]
    assert first["random rotation"] != other["random rotation"]


def test_nets_that_want_four_copies_and_nets_without_rotations(pictures, boxed, tmp_path):
    for preset, layers in (("decoupling-alexnet", 2), ("supervised-alexnet", 1)):
        out = tmp_path / preset
        own = ["--data", str(pictures), "--out", str(out), "--max-steps", "1", "--epochs", "1"]
        own += ["--backbone.kernel", "5", "--backbone.stride", "2"]
        own += ["--method.negatives", "8"] if layers == 2 else []
        words = [word for word in TINY[1:] if word not in ("--schedule.steps", "20")]
        assert train.main([preset, *words, *own]) == 0
        assert len(ask(out, boxed, tmp_path / "s.json")["stages"]) == 2 * layers + 1
    with pytest.raises(UsageError, match=r"predicts no rotations .*--layers embedding"):
        ask(out, boxed, tmp_path / "s.json", "--layers", "rotation")


def test_what_it_refuses(straight, boxed, pictures, tmp_path):
    with pytest.raises(UsageError, match="has no boxes beside it: prepare it with"):
        ask(straight, pictures, tmp_path / "s.json")
    with pytest.raises(UsageError, match="--pictures got 0: it wants at least 1"):
        ask(straight, boxed, tmp_path / "s.json", "--pictures", "0")
    for got in ("nan", "-1"):
        with pytest.raises(UsageError, match=f"--threshold got {got}.*: it wants 0 or more"):
            ask(straight, boxed, tmp_path / "s.json", f"--threshold={got}")
    lone = tmp_path / "lone"
    lone.mkdir()
    for file in boxed.parent.glob("b.beton*"):
        shutil.copy(file, lone)
    changed = lone / "b.beton.boxes.npz"
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="has changed since it was written"):
        ask(straight, lone / "b.beton", tmp_path / "s.json")


@pytest.mark.ddp
@pytest.mark.soak
def test_two_ranks_give_one_processs_numbers(straight, boxed, tmp_path):
    from test_end_to_end import TWO, run

    want = ask(straight, boxed, tmp_path / "one.json")
    words = ("saliency", "--data", boxed, "--json", tmp_path / "two.json", *FEW)
    done = run(*TWO, "fastrot/evaluate.py", straight, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "two.json").read_text())
    for stage, scores in want["stages"].items():
        assert found["stages"][stage] == pytest.approx(scores, rel=1e-6), stage
