"""`draw.py filters|attention|saliency|embedding RUN`: figures for papers, of tiny runs."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from test_run import TINY
from torch import nn
from truth import photo

from fastrot import config, draw, export, train
from fastrot.backbones.staged import Staged
from fastrot.config import UsageError
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert
from fastrot.evals import drawn
from fastrot.evals.embedding import snapped
from fastrot.evals.trained import Trunk, load

pytestmark = pytest.mark.usefixtures("quick_runs")
CPU = ["--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def supervised(pictures, tmp_path_factory) -> Path:
    return trained(tmp_path_factory, "supervised", pictures, "supervised-alexnet", "--enlarge")


def trained(tmp_path_factory, name: str, pictures: Path, preset: str, *more: str) -> Path:
    """One step of a preset, with the networks of TINY unless more says otherwise."""
    out = tmp_path_factory.mktemp("runs") / name
    words = [preset, *TINY[1:5], "--schedule.steps", "1", "--no-tensorboard", "--device", "cpu"]
    words += ["--workers", "0", "--precision", "fp32", "--data", str(pictures), "--out", str(out)]
    if "alexnet" in preset:
        small = {"width": "0.1", "kernel": "5", "stride": "2"}
        words += [w for k, v in small.items() for w in (f"--backbone.{k}", v)]
    assert train.main([*words, "--hold-out", "0.3", *more]) == 0
    return out


@pytest.fixture(scope="module")
def boxed(tmp_path_factory) -> Path:
    """Six pictures, five of which have a box of the upper left quarter."""
    root = tmp_path_factory.mktemp("coco")
    images, boxes = [], []
    for i in range(6):
        Image.fromarray(photo(i, 40, 60)).save(root / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 60})
        box = {"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 30, 20]}
        boxes.append(box | {"iscrowd": int(i == 5), "area": 600})
    found = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (root / "boxes.json").write_text(json.dumps(found))
    out = root / "x.beton"
    convert(BetonOptions(source="coco", root=root / "boxes.json", out=out, workers=0))
    return out


def drawn_by(out: Path, *words: object) -> dict[str, Path]:
    """The PNGs of a command by their names, each with an SVG, and shown by the page."""
    assert draw.main([*map(str, words), "--out", str(out)]) == 0
    pngs = {p.stem: p for p in sorted(out.glob("*.png"))}
    page = (out / "index.html").read_text()
    for name, png in pngs.items():
        with Image.open(png) as picture:
            assert round(picture.info["dpi"][0]) == 300
            assert len(picture.convert("RGB").getcolors(2**24)) > 50
        assert (
            f'alt="{name}" src="data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"'
            in page
        )
        assert (out / f"{name}.svg").read_text().startswith("<?xml")
    return pngs


def inches(png: Path) -> tuple[float, float]:
    with Image.open(png) as picture:
        return picture.width / 300, picture.height / 300


def test_filters(straight, tmp_path, capsys):
    pngs = drawn_by(tmp_path, straight, "filters")
    assert inches(pngs["filters"])[0] == pytest.approx(3.3)
    said = capsys.readouterr().out
    assert f"grey is 0. {straight} at step 20.\n" in said
    assert f"written to {tmp_path}/index.html" in said
    assert "grey is 0" in (tmp_path / "index.html").read_text()


def test_attention_beside_other_nets(straight, supervised, tmp_path, capsys):
    asked = [straight, "attention", "--beside", supervised, "--pictures", "2", *CPU]
    pngs = drawn_by(tmp_path / "a", *asked)
    assert list(pngs) == ["attention", "rotations"]
    for png in pngs.values():
        wide, high = inches(png)
        assert wide == pytest.approx(6.9, abs=0.01)
        assert high < 3
    said = capsys.readouterr().out
    assert (
        "p is conv1 1, conv2 2, conv3 4, conv4 4, conv5 4; each map from its least (dark)" in said
    )
    assert f"{straight} at step 20; {supervised} at step 1; random weights." in said
    assert "Attention to 2 pictures of" in said
    svg = (tmp_path / "a" / "attention.svg").read_text()
    words = re.findall(r"<text[^>]*>\s*(?:<tspan[^>]*>)?([^<]*)", svg)
    assert {"straight", "supervised", "(random)"} <= set(words)
    assert svg.count("<image") == 2 * (1 + 3 * 5)
    turned = (tmp_path / "a" / "rotations.svg").read_text()
    assert turned.count("<image") == 2 * 4 * 3
    before = pngs["attention"].read_bytes()
    drawn_by(tmp_path / "a", *asked)
    assert pngs["attention"].read_bytes() == before


def test_stages_and_powers_that_are_asked_for(straight, tmp_path, capsys):
    words = ["--stages", "pool1", "conv4", "--powers", "0.5", "--no-random", "--pictures", "12"]
    pngs = drawn_by(tmp_path, straight, "attention", *words, *CPU)
    said = capsys.readouterr().out
    assert "p is pool1 0.5, conv4 0.5;" in said
    assert "random" not in said
    assert inches(pngs["attention"])[1] < 9.6  # of a page


def test_maps_lie_where_the_picture_is_bright():
    """Of a net whose channels are brightness, in a corner of each of two pictures, as numbers and in print."""
    net = Staged({"a": nn.Conv2d(3, 2, 1, bias=False), "b": nn.AvgPool2d(2)}, {"a": 2, "b": 2})
    nn.init.ones_(net.get_submodule("a").weight)
    trunk = Trunk(net, config.resolved(train.command_line(TINY)))
    trunk.mean, trunk.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    images[0, :8, :8] = 255
    images[1, 24:, :8] = 255
    maps = drawn._answers(trunk, images, ("a", "b"), (1.0, 4.0))
    assert [*maps] == ["a\np = 1", "b\np = 4"]
    for found in maps.values():
        assert found.shape == (2, 32, 32)
        assert found[0, :7, :7].min() == found[1, 25:, :7].min() == 1
        assert found[0, 10:].max() == found[1, :22].max() == 0
    figure = drawn.sheet([[drawn.Block("mine", maps)]])
    figure.savefig(file := io.BytesIO(), dpi=100)
    print_ = np.asarray(Image.open(file).convert("RGB"))
    yellow, dark = (253, 231, 36), (68, 1, 84)
    for axes, bright in zip(figure.axes, (0.95, 0.05, 0.95, 0.05), strict=True):
        place = axes.get_position()
        for share in (0.05, 0.95):  # of the height
            x = int((place.x0 + 0.05 * place.width) * print_.shape[1])
            y = int((1 - place.y0 - share * place.height) * print_.shape[0])
            assert tuple(print_[y, x]) == (yellow if share == bright else dark)


def test_a_random_net_is_always_the_same_and_no_other(straight):
    one, two, learnt = load(straight, learnt=False), load(straight, learnt=False), load(straight)
    state = torch.get_rng_state()
    for (name, a), b, c in zip(
        one.named_parameters(), two.parameters(), learnt.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert not torch.equal(a, c), name
    assert torch.equal(torch.get_rng_state(), state)


def test_saliency_with_boxes(straight, boxed, tmp_path, monkeypatch, capsys):
    seen, imshow = [], Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, x, **k: seen.append((self, x)) or imshow(self, x, **k)
    )
    pngs = drawn_by(tmp_path, straight, "saliency", "--data", boxed, "--pictures", "12", *CPU)
    said = " ".join(capsys.readouterr().out.split())
    assert "5 pictures of" in said  # the sixth's box is of a crowd
    assert "gradient of the rotations' scores and of the features of the last stage" in said
    assert (
        "the max over neurons, each map from 0 (dark) to its 99th percentile (yellow, viridis)"
        in said
    )
    assert "frames are boxes of objects" in said
    assert len(seen) == 5 * (1 + 2 * 2)
    for axes, picture in seen:
        (frame,) = axes.patches
        assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((-0.5, -0.5), 16, 16)
        if picture.ndim == 2:
            assert np.quantile(picture, 0.99) == pytest.approx(1, rel=1e-4)
    assert inches(pngs["saliency"])[0] == pytest.approx(3.3)


def test_saliency_without_boxes_of_a_supervised_run(supervised, tmp_path, capsys):
    drawn_by(tmp_path, supervised, "saliency", "--pictures", "2", "--reduce", "mean", *CPU)
    said = capsys.readouterr().out
    assert "the data has no boxes" in said
    assert "rotations" not in said
    assert "the mean over neurons" in said


def test_embedding(straight, pictures, tmp_path, capsys):
    pngs = drawn_by(tmp_path, straight, "embedding", "--data", pictures, *CPU)
    assert list(pngs) == ["embedding", "thumbnails"]
    assert all(inches(png)[0] == pytest.approx(6.9) for png in pngs.values())
    said = capsys.readouterr().out
    assert f"37 pictures of {pictures} by their features of conv5" in said
    assert "t-SNE (perplexity 12, seed 0); 3 classes by colour and mark" in said
    svg = (tmp_path / "embedding.svg").read_text()
    assert all(word in svg for word in ("PCA", "t-SNE", "class0", "class2"))
    first = pngs["embedding"].read_bytes()
    drawn_by(tmp_path, straight, "embedding", "--data", pictures, *CPU)
    assert pngs["embedding"].read_bytes() == first


def test_embedding_without_labels(straight, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for i in range(6):
        Image.fromarray(photo(i)).save(tmp_path / "flat" / f"{i}.png")
    words = ["--data", tmp_path / "flat", "--stage", "pool1", "--pictures", "5"]
    drawn_by(tmp_path / "o", straight, "embedding", *words, *CPU)
    said = capsys.readouterr().out
    assert "5 pictures" in said
    assert "features of pool1" in said
    assert "perplexity 1.33, seed 0); without labels" in said


def test_thumbnails_are_snapped_to_cells():
    places = np.array([[0, 0], [0.9, 0.9], [10, 10], [2.4, 2.6], [2, 2], [0, 10]])
    grid = snapped(places, 2)
    assert grid.tolist() == [[5, 2], [3, -1]]  # 3 is nearest to the middle of its cell, (2.5, 2.5)
    assert (snapped(np.zeros((3, 2)), 2) >= 0).sum() == 1


@pytest.fixture(scope="module")
def other(pictures, tmp_path_factory) -> Path:
    """A net with other stages."""
    return trained(tmp_path_factory, "six", pictures, "rotnet-six-layer")


@pytest.fixture(scope="module")
def exported(straight, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model.safetensors"
    export.main([str(straight), "--to", "safetensors", "--out", str(out)])
    return out


def test_an_exported_trunk(exported, pictures, tmp_path):
    words = ["--data", pictures, "--pictures", "2"]
    assert "attention" in drawn_by(tmp_path, exported, "attention", *words, *CPU)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("nowhere filters", "nowhere"),
        ("{run} attention --stages fc_block", "--stages got fc_block, which gives no map: name 1 to 16"),
        ("{run} attention --stages conv9", "there is no stage 'conv9'"),
        ("{run} attention --pictures 0", "--pictures got 0"),
        ("{run} attention --pictures 13", "--pictures got 13: choose 1 to 12"),
        ("{run} attention --powers 1 0", "--powers got 1 0: give numbers above 0"),
        ("{run} attention --powers 1 1 1 1 1 1", r"--powers got .* one a stage \(5\)"),
        ("{run} attention --beside {other}", "--beside: .* has other stages"),
        ("{run} attention --beside {run}", "a run is named twice"),
        ("{run} attention --data {empty}", "empty"),
        ("{run} saliency --pictures 13", "--pictures got 13: choose 1 to 12"),
        ("{exported} saliency", "holds a trunk alone: name the run that it was exported from"),
        ("{supervised} saliency --layers rotation", "predicts no rotations"),
        ("{run} embedding --pictures 5001", "--pictures got 5001: choose 1 to 5,000"),
        ("{run} embedding --pictures 4", "t-SNE wants 5 pictures or more, and got 2"),
        ("{run} embedding --stage conv9", "there is no stage 'conv9'"),
        ("{run} embedding --perplexity 0", "--perplexity got 0: give a number above 0"),
        ("{run} embeding", "there is no figure 'embeding': did you mean embedding"),
    ],
)  # fmt: skip
def test_wrong_use_gets_one_sentence(straight, supervised, other, exported, tmp_path, words, says):
    (tmp_path / "empty").mkdir()
    known = {"run": straight, "supervised": supervised, "other": other, "exported": exported}
    run, kind, *rest = words.format(**known, empty=tmp_path / "empty").split()
    with pytest.raises(UsageError, match=says) as told:
        draw.main(
            [run, kind, *rest, *(() if kind == "filters" else CPU), "--out", str(tmp_path / "o")]
        )
    assert "\n" not in str(told.value)
    assert not (tmp_path / "o").exists()


def test_a_net_for_pictures_of_another_size_is_refused(
    straight, pictures, tmp_path_factory, tmp_path
):
    larger = trained(
        tmp_path_factory, "larger", pictures, "rotnet-alexnet", "--enlarge", "--image-size", "40"
    )
    with pytest.raises(
        UsageError, match="larger has other stages, or sees 40 pixels a side, not 32"
    ):
        draw.main(
            [str(straight), "attention", "--beside", str(larger), "--out", str(tmp_path), *CPU]
        )


def test_a_missing_scikit_learn_gets_a_sentence(straight, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(
        UsageError, match=r'wants scikit-learn .*: type  pip install "fastrot\[study\]"'
    ):
        draw.main([str(straight), "embedding", *CPU])


def test_several_processes_are_refused(straight, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="draw runs in one process: start it without torchrun"):
        draw.main([str(straight), "filters"])


def test_a_net_that_begins_with_no_convolution_has_no_filters(straight, monkeypatch):
    monkeypatch.setattr(drawn, "first_filters", lambda net: None)
    with pytest.raises(UsageError, match="begins with no convolution that sees colours"):
        draw.main([str(straight), "filters"])
