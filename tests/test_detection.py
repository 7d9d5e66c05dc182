"""Detection from trained backbones: what it begins with, what it is told of pictures, how it is judged, and that it learns."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fastrot
from benchmarks import plots, report
from benchmarks.studies import detection
from benchmarks.studies.detection import RANDOM, SIZES, Begin, Pictures
from fastrot import config, train
from fastrot.backbones.named import named
from fastrot.config import RunError, UsageError
from fastrot.training import checkpoint

HUES = {"boat": (220, 40, 40), "cow": (40, 200, 60), "sofa": (60, 80, 230)}
SIZE = dataclasses.replace(SIZES["cpu"], sides=(64,), regions=16, proposals=20)
CPU = torch.device("cpu")
MARKED = [  # left, top, right, bottom as in XML, whose pixels count from 1; what it is; whether it is difficult
    [((11, 21, 50, 60), "cow", 0), ((1, 1, 96, 10), "sofa", 1)],
    [((31, 41, 70, 90), "boat", 0)],
    [((5, 5, 90, 90), "cow", 1)],
    [],
]


@pytest.fixture(autouse=True)
def commit(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    monkeypatch.setenv("DIRTY", "1")
    monkeypatch.setitem(SIZES, "cpu", SIZE)


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory, quick_runs):
    """Of a ResNet-18: two steps on small pictures."""
    out = tmp_path_factory.mktemp("runs") / "rotated"
    words = ["rotnet-resnet50", "--backbone.name", "resnet18", "--image-size", "32", "--enlarge"]
    words += ["--schedule.steps", "2", "--batch", "2", "--data", str(pictures), "--out", str(out)]
    words += ["--workers", "1", "--no-tensorboard", "--device", "cpu", "--precision", "fp32"]
    assert train.main([*words, "--validate-every", "9"]) == 0
    return out


def voc_of(root, marked, *, shrunk=1):
    """Noise of 96 pixels, on which each object is a rectangle in its hue; the same pictures are learnt from and judged."""
    year, draw = root / "VOC2007", np.random.default_rng(0)
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / name).mkdir(parents=True)
    for i, objects in enumerate(marked):
        pixels, told = draw.integers(0, 90, (96, 96, 3), dtype=np.uint8), ""
        for (left, top, right, bottom), name, difficult in objects:
            pixels[top - 1 : bottom, left - 1 : right] = HUES[name]
            edges = zip(("xmin", "ymin", "xmax", "ymax"), (left, top, right, bottom), strict=True)
            box = "".join(f"<{edge}>{at}</{edge}>" for edge, at in edges)
            told += f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"
        picture = Image.fromarray(pixels).resize((96 // shrunk, 96 // shrunk))
        picture.save(year / "JPEGImages" / f"{i}.jpg", quality=95)
        size = "<size><width>96</width><height>96</height></size>"
        (year / "Annotations" / f"{i}.xml").write_text(f"<annotation>{size}{told}</annotation>")
    for split in ("trainval", "test"):
        lines = "\n".join(map(str, range(len(marked))))
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return year


@pytest.fixture
def year(tmp_path):
    return voc_of(tmp_path / "voc", MARKED)


def pictures_of(year, *, learnt):
    source = detection.listed(year, "trainval")
    return Pictures([source], source.categories, learnt=learnt)


# ---- what it begins with ----


def test_the_body_has_all_weights_of_the_run_and_no_others(run):
    (begin,), net = detection.begins([str(run)], "x")
    body = detection.detector(begin, net, 20, SIZE).backbone.body
    saved = checkpoint.trunk_weights(checkpoint.load(checkpoint.of_run(run))["net"])
    saved = {k.removeprefix("conv1."): v for k, v in saved.items() if "num_batches" not in k}
    assert (net, begin.line, len(saved)) == ("resnet18", "RotNet, rotated", 100)
    own = body.state_dict()
    assert own.keys() == saved.keys()
    assert [name for name in own if not torch.equal(own[name], saved[name])] == []
    trunk, images = fastrot.load(run), torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (begin.mean, begin.std))
    found = body.train()((images.permute(0, 3, 1, 2) / 255 - mean) / std)["3"]  # frozen
    torch.testing.assert_close(found, trunk.features(images, "layer4"), rtol=1e-4, atol=1e-4)
    assert all(each.requires_grad for each in body.parameters())
    for missing in (dict(list(begin.weights.items())[1:]), begin.weights | {"fc.bias": mean}):
        with pytest.raises(RuntimeError, match=r"conv1\.weight|fc\.bias"):
            detection.detector(begin._replace(weights=missing), net, 20, SIZE)


def test_random_weights_get_the_statistics_of_pictures(year):
    """Without them a deep net's last map is ten times as large as it should be."""
    pictures = pictures_of(year, learnt=True)
    batches = list(detection.read(pictures, detection.drawn(2, SIZE, 0)[:4], CPU, ""))
    torch.manual_seed(0)
    model = detection.detector(Begin("", "", None), "resnet50", 3, SIZE)
    images = model.transform(batches[0][0])[0].tensors
    assert model.backbone.body(images)["3"].std() > 5
    detection.randomise(model, "resnet50", iter(batches))
    assert 0.5 < model.backbone.body(images)["3"].std() < 2


def test_what_it_cannot_do_is_refused_in_a_sentence(run, year, tmp_path, monkeypatch):
    none = voc_of(tmp_path / "none", [[], MARKED[2]])
    for words, sentence in {
        (): "RUN wants folders whose names differ, of trained runs, or random",
        (run, run): "RUN wants folders whose names differ",
        (RANDOM, "--seeds", 0): "--seeds got 0, --steps 300: each wants at least 1",
        (RANDOM, "--steps", 0): "--steps 0: each wants at least 1",
        (RANDOM, "--root", none): "no XML of trainval in .* has an object that is not difficult",
        (tmp_path / "nowhere",): "nowhere",
    }.items():
        words = [*map(str, words), "--device", "cpu", "--work", str(tmp_path / "work")]
        with pytest.raises(UsageError, match=sentence):
            detection.main(words)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchmetrics", None)
        with pytest.raises(UsageError, match=r"torchmetrics.*type  pip install -e \"\.\[study\]\""):
            detection.main([RANDOM, "--device", "cpu", "--root", str(year)])


def test_nets_that_it_does_not_take_and_two_of_these_are_refused(monkeypatch):
    deep = config.Named(name="resnet50")
    nets = {"runs/alex": config.AlexNet(), "runs/deep": deep, "runs/small": config.Named(name="resnet18")}  # fmt: skip

    def load(run):
        cfg = SimpleNamespace(backbone=nets[run], method=config.RotNet())
        return SimpleNamespace(config=cfg, net=named(deep, 64), mean=(0.5,) * 3, std=(1.0,) * 3)

    monkeypatch.setattr(detection, "load", load)
    with pytest.raises(UsageError, match=r"alex has AlexNet: a detector takes resnet18 or resnet5"):
        detection.begins(["runs/alex"], "x")
    with pytest.raises(UsageError, match=r"small has resnet18: .*, and all of a call the same"):
        detection.begins(["runs/deep", "runs/small"], "x")
    made, net = detection.begins([RANDOM, "runs/deep"], "x")
    assert net == "resnet50"
    assert [each.line for each in made] == ["RotNet, deep", "random weights"]
    assert made[1].mean == made[0].mean == (0.5,) * 3  # of the run beside it
    assert detection.begins([RANDOM], "x")[1] == "x"


# ---- pictures ----


@pytest.mark.parametrize("shrunk", [1, 2])
def test_boxes_and_labels_are_those_of_the_xml(tmp_path, shrunk):
    year = voc_of(tmp_path, MARKED, shrunk=shrunk)
    held, learnt = (pictures_of(year, learnt=each) for each in (False, True))
    assert (len(held), len(learnt)) == (4, 2)  # without difficult ones alone, without none
    pixels, told = held[0, False]
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 96 // shrunk, 96 // shrunk))
    boxes = torch.tensor([[10, 20, 50, 60], [0, 0, 96, 10]]) / shrunk
    assert torch.equal(told["boxes"], boxes)
    names = [held.names[label - 1] for label in told["labels"]]
    assert (names, told["iscrowd"].tolist()) == (["cow", "sofa"], [0, 1])
    assert held[3, False][1]["boxes"].shape == (0, 4)
    for (pixels, told), name in ((learnt[0, True], "cow"), (learnt[1, False], "boat")):
        ((left, top, right, bottom),) = told["boxes"].int().tolist()
        inside = pixels[:, top + 2 : bottom - 2, left + 2 : right - 2].float()
        hue = torch.tensor(HUES[name], dtype=torch.float32)
        assert (inside.mean(dim=(1, 2)) - hue).abs().max() < 12
        assert inside.std(dim=(1, 2)).max() < 12  # nothing of the noise


def test_each_epoch_has_each_picture_once_whatever_the_batch():
    size = dataclasses.replace(SIZE, steps=9, batch=4)
    batches = detection.drawn(7, size, 0)
    assert [len(batch) for batch in batches] == [4] * 9
    every = [view for batch in batches for view in batch]
    for at in range(0, 35, 7):
        assert sorted(row for row, _ in every[at : at + 7]) == [*range(7)]
    assert 9 < sum(mirrored for _, mirrored in every) < 27
    assert batches == detection.drawn(7, size, 0) != detection.drawn(7, size, 1)


def test_a_picture_that_cannot_be_decoded_is_named(year):
    pictures = pictures_of(year, learnt=True)
    (year / "JPEGImages" / "1.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(99))
    with pytest.raises(RunError, match=r"1\.jpg cannot be decoded .*: take it out of the lists"):
        pictures[1, False]


# ---- learnt and judged ----


class Told(torch.nn.Module):
    """Finds what is there, each object of a batch by `found(box, label, difficult)`, None for not."""

    def __init__(self, pictures, found):
        super().__init__()
        told = (pictures[row, False][1] for row in range(len(pictures)))
        self.told, self.found = told, found

    def forward(self, images):
        return [self.one(next(self.told)) for _ in images]

    def one(self, told):
        every = zip(told["boxes"], told["labels"], told["iscrowd"], strict=True)
        kept = [each for each in (self.found(*each) for each in every) if each is not None]
        boxes, labels = [each[0] for each in kept], [int(each[1]) for each in kept]
        return {
            "boxes": torch.stack(boxes) if boxes else torch.zeros(0, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.full((len(kept),), 0.9),
        }


@pytest.mark.parametrize(
    ("found", "ap", "ap50", "ap75"),
    [
        (lambda box, label, difficult: (box, label), 1, 1, 1),
        (lambda box, label, difficult: None if difficult else (box, label), 1, 1, 1),
        (lambda box, label, difficult: (box, 1 + label % 20), 0, 0, 0),
        (lambda box, label, difficult: (box + 9, label), 0, 0, 0),
        # half as wide again: an overlap of 2/3, beyond the first four of COCO's ten thresholds
        (lambda box, label, difficult: (box + torch.tensor([0, 0, (box[2] - box[0]) / 2, 0]), label), 0.4, 1, 0),
        (lambda box, label, difficult: (box, label) if label == 10 else None, 0.5, 0.5, 0.5),
    ],
    ids=["all", "not the difficult", "wrong names", "moved", "too wide", "one class of two"],
)  # fmt: skip
def test_what_is_found_is_judged_by_cocos_rules(year, found, ap, ap50, ap75):
    """Two classes have objects that are judged: cow and boat."""
    held = pictures_of(year, learnt=False)
    whole = [[(row, False)] for row in range(len(held))]
    scores = detection.judge(Told(held, found), detection.read(held, whole, CPU, ""))
    moved = 0.1 if ap50 == 0 and ap == 0 and ap75 == 0 else 0
    assert list(scores.values()) == pytest.approx([ap, ap50, ap75], abs=1e-6 + moved)


def test_a_step_lowers_the_loss_and_what_is_no_number_ends_it(run, year):
    (begin,), net = detection.begins([str(run)], "x")
    pictures, losses = pictures_of(year, learnt=True), []
    torch.manual_seed(0)
    model = detection.detector(begin, net, 20, SIZE)
    batch = next(detection.read(pictures, [[(0, False), (1, False)]], CPU, ""))
    size = dataclasses.replace(SIZE, steps=3)
    losses = detection.learn(model, iter([batch] * 3), size)
    assert losses[-1] < 0.9 * losses[0]
    changed = {k for k, v in model.backbone.body.state_dict().items() if k in begin.weights and not torch.equal(v, begin.weights[k])}  # fmt: skip
    assert changed == {k for k in begin.weights if "conv" in k or "downsample.0" in k}  # not norms
    batch[0][0][:] = math.nan
    with pytest.raises(RunError, match="the loss of step 1 is nan"):
        detection.learn(model, iter([batch]), size)


def test_the_rate_goes_up_and_falls_twice():
    size = dataclasses.replace(SIZE, steps=240)
    shares = [size.share(step) for step in (0, 23, 24, 179, 180, 219, 220, 239)]
    assert shares == pytest.approx([1 / 24, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


# ---- the study ----


def test_a_cell_is_done_once_and_its_page_shows_it(run, year, tmp_path, monkeypatch):
    out, lengths = tmp_path / "results" / "x.jsonl", []
    words = [str(run), "--random", "--device", "cpu", "--root", str(year)]
    words += ["--work", str(tmp_path / "work"), "--out", str(out)]
    assert detection.main([*words, "--seeds", "1", "--steps", "1"]) == 0
    files = list((tmp_path / "work" / "studies").glob("detection-cpu-ffffffffffff-*/*.json"))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    lines = ("RotNet, rotated", "random weights")
    cells = [(line, score) for line in lines for score in detection.SCORES]
    assert [(row["variant"], row["mode"]) for row in rows] == cells
    seconds = sorted(json.loads(file.read_text())["seconds"] for file in files)
    assert sorted({row["seconds"] for row in rows}) == seconds
    for file in files:
        file.write_text(json.dumps({"AP": 0.125, "AP50": 0.25, "AP75": 0.0, "seconds": 7.0}))
    monkeypatch.setattr(detection, "learn", lambda model, batches, size: lengths.append(size.steps))
    monkeypatch.setattr(detection, "judge", lambda *_: {"AP": 0.25, "AP50": 0.75, "AP75": 0.0})
    assert detection.main([*words, "--seeds", "1", "--steps", "2"]) == 0
    assert lengths == [2, 2]  # another length is another cell
    assert detection.main([*words, "--seeds", "2", "--steps", "1"]) == 0
    assert lengths == [2, 2, 1, 1]  # the second seed alone
    rows = plots.Rows(report.read(out.parent))
    assert {row["theme"] for row in rows} == {"detection"}
    text = report.page("detection", report.topics(rows)["detection"], tmp_path, "results")
    assert "| objects found, resnet18 | AP | AP50 | AP75 | seconds |" in text
    assert "| RotNet, rotated | 18.8% † (12.5 to 25.0) | 50.0% † (25.0 to 75.0) | 0.0% †" in text
    assert "1 steps of 2 pictures; 2 to learn from, 4 judged at a short side of 64 pixels" in text
    assert (tmp_path / "detection.png").exists()


@pytest.mark.soak
def test_it_finds_what_it_has_learnt_from(tmp_path):
    """Coloured rectangles on noise, from random weights: nearly all of them, of which chance finds none."""
    draw, marked = np.random.default_rng(1), []
    for i in range(8):
        left, top = (int(each) for each in draw.integers(1, 40, 2))
        box = left, top, left + int(draw.integers(30, 50)), top + int(draw.integers(30, 50))
        marked.append([(box, [*HUES][i % 3], 0)])
    year = voc_of(tmp_path / "voc", marked)
    words = [RANDOM, "--seeds", "1", "--steps", "120", "--root", str(year), "--device", "cpu"]
    out = tmp_path / "x.jsonl"
    detection.main([*words, "--work", str(tmp_path), "--out", str(out)])
    ap, ap50, _ = (json.loads(line)["p50"] for line in out.read_text().splitlines())
    assert ap50 > 0.4
    assert ap > 0.1
