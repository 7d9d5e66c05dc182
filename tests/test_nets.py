"""Each network by name, through everything that a network is used for: trained, probed, searched, asked, exported."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from truth import photo

import fastrot
from fastrot import assemble, config, evaluate, export, train
from fastrot.backbones.heads import HEADS
from fastrot.backbones.named import NETS, OF_TORCHVISION, library_names, named
from fastrot.config import UsageError
from fastrot.core import DataInfo
from fastrot.evals.trained import nets_of
from fastrot.training.foreign import our_name

HAS_TIMM = importlib.util.find_spec("timm") is not None
NAMES = [*NETS, *(["timm/resnet10t", "timm/vit_tiny_patch16_224"] if HAS_TIMM else [])]
# built as others are
SOAKED = [
    pytest.param(n, marks=pytest.mark.soak) if n in ("resnet50", "mobilenet_v2") else n
    for n in NAMES
]
FEW = ["--device", "cpu", "--workers", "0"]
pytestmark = pytest.mark.usefixtures("quick_runs")


def learn(pictures, out, *words) -> int:
    own = ["--data", str(pictures), "--out", str(out), "--batch", "6", "--max-steps", "1"]
    return train.main([*words, *own, *FEW, "--enlarge", "--no-tensorboard", "--epochs", "1"])


@pytest.fixture(scope="module", params=SOAKED, ids=lambda name: name.replace("/", "-"))
def run(request, pictures, tmp_path_factory):
    """A step of RotNet on 64 pixels, by the study's optimiser."""
    out = tmp_path_factory.mktemp("nets") / "run"
    words = ("rotnet-six-layer", "--backbone.name", request.param, "--image-size", "64")
    assert learn(pictures, out, *words) == 0
    return out


def test_a_probe_learns_on_it_and_leaves_it_as_it_is(run, pictures, tmp_path):
    stages = fastrot.load(run).stages
    words = ("--start-from", str(run), "--method.stages", stages[-3], stages[-1])
    assert learn(pictures, tmp_path / "probe", "probe-linear", *words) == 0
    val = json.loads((tmp_path / "probe" / "summary.json").read_text())["val"]
    assert {f"top1_{stages[-3]}", f"top1_{stages[-1]}"} <= val.keys()
    before, after = (fastrot.load(each).net.state_dict() for each in (run, tmp_path / "probe"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_fine_tuned_probe_trains_what_its_stage_needs(run, pictures, tmp_path):
    stage = fastrot.load(run).stages[-2]
    words = ("--start-from", str(run), "--method.stages", stage, "--method.tune")
    assert learn(pictures, tmp_path / "probe", "probe-linear", *words) == 0


def test_its_stages_are_searched(run, pictures, tmp_path):
    file = tmp_path / "knn.json"
    words = ["--data", str(pictures), "--k", "5", "--json", str(file), *FEW]
    assert evaluate.main([str(run), "knn", *words]) == 0
    found = json.loads(file.read_text())["stages"]
    assert (*found,) == fastrot.load(run).stages


def test_it_says_which_photographs_lie_on_their_side(run, tmp_path):
    album = tmp_path / "album"
    album.mkdir()
    for i in range(3):
        Image.fromarray(photo(i, 60, 90)).save(album / f"{i}.jpg")
    words = ["--out", str(tmp_path / "upright"), *FEW]
    assert evaluate.main([str(run), "upright", str(album), *words]) == 0
    assert len((tmp_path / "upright" / "upright.csv").read_text().splitlines()) == 4


def test_it_is_exported(run, tmp_path, capsys):
    """Each form compares what is read back with what the net says."""
    name = nets_of(run)[0].cfg.backbone.name
    forms = {"safetensors": True, "torchvision": name in OF_TORCHVISION, "timm": "/" in name}
    for form, fits in {**forms, "torch-export": True}.items():
        words = [
            str(run),
            "--to",
            form,
            "--out",
            str(tmp_path / f"{form}.{'pt2' * (form[:5] == 'torch') or 'safetensors'}"),
        ]
        if fits:
            assert export.main(words) == 0
        else:
            with pytest.raises(UsageError, match="use --to"):
                export.main(words)


@pytest.mark.parametrize(
    "name", ["six-layer", pytest.param("efficientnet_b0", marks=pytest.mark.soak)]
)
def test_onnx_says_what_it_says(name, pictures, tmp_path):
    words = ("rotnet-six-layer", "--backbone.name", name, "--image-size", "64")
    assert learn(pictures, tmp_path / "run", *words) == 0
    assert export.main([str(tmp_path / "run"), "--to", "onnx"]) == 0


def test_torchvision_knows_its_weights():
    from torchvision.models import get_model

    for name in OF_TORCHVISION:
        theirs = get_model(name, weights=None).state_dict()
        own = library_names(named(config.Named(name=name), 64))
        left = theirs.keys() - own.keys()
        assert own.keys() <= theirs.keys()
        assert {key.split(".")[0] for key in left} <= {"fc", "classifier"}


def test_a_resnet_of_vissl_has_its_names():
    ours = named(config.Named(name="resnet50"), 64).state_dict()
    theirs = {f"_feature_blocks.{key}" for key in library_names(named(config.Named(), 64))}
    assert {our_name(key) for key in theirs} == ours.keys()


def test_six_layers_have_about_100_thousand_weights_and_no_residual():
    net = named(config.Named(name="six-layer"), 128)
    assert sum(p.numel() for p in net.parameters()) == 106_960
    assert net.stages == (*(f"conv{n}" for n in range(1, 7)), "embedding")
    assert [net.channels[stage] for stage in net.stages] == [16, 32, 32, 64, 64, 64, 64]


def test_stages_go_from_fine_to_coarse():
    for name in ("mobilenet_v2", "efficientnet_b0", "resnet18"):
        net = named(config.Named(name=name), 64).eval()
        maps = net.outputs(
            torch.rand(1, 3, 64, 64), ("conv1", "layer1", "layer2", "layer3", "layer4")
        )
        assert [each.shape[-1] for each in maps] == [32, 16, 8, 4, 2], name


def test_names_that_nobody_has(pictures, tmp_path):
    for name, words in {
        "resnet51": "choose from six-layer, .*, or timm/NAME",
        "timm/no-such-net": "gives no stages of 64 pixels .*timm.list_models",
        "torchvision/resnet50": "choose from",
    }.items():
        if not name.startswith("timm") or HAS_TIMM:
            with pytest.raises(UsageError, match=words):
                named(config.Named(name=name), 64)


def test_without_timm_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UsageError, match=r"timm/resnet18 wants timm .*fastrot\[timm\]"):
        named(config.Named(name="timm/resnet18"), 64)


@pytest.mark.skipif(not HAS_TIMM, reason="needs timm")
@pytest.mark.parametrize("name", ["crossvit_tiny_240", "tresnet_m"])
def test_nets_of_timm_whose_stages_cannot_be_told_apart_are_refused(name):
    with pytest.raises(UsageError, match=f"timm/{name} gives no stages of 64 pixels"):
        named(config.Named(name=f"timm/{name}"), 64)


@pytest.mark.skipif(not HAS_TIMM, reason="needs timm")
@pytest.mark.parametrize("name", ["ghostnet_050", "nest_tiny"])
def test_nets_of_timm_leave_nothing_out_at_random(name):
    net, pixels = named(config.Named(name=f"timm/{name}"), 64).train(), torch.rand(2, 3, 64, 64)
    assert torch.equal(net(pixels), net(pixels))


@pytest.mark.skipif(not HAS_TIMM, reason="needs timm")
def test_what_no_head_of_a_tuned_probe_reads_wants_no_gradient():
    """Else DDP stops; of this net blocks behind the stage belong to no other stage."""
    cfg = config.Config(
        method=config.Probe(stages=("blocks_2",), tune=True, crop=config.Whole(size=64)),
        backbone=config.Named(name="timm/efficientnet_b0"),
    )
    info = {"images": 1, "rows": None, "data_rows": 1, "data_fingerprint": "", "fingerprint": ""}
    info |= {"classes": 3, "mean": cfg.mean, "std": cfg.std, "size": 64, "seed": 0}
    net = assemble.method(
        cfg, DataInfo(**info, device=torch.device("cpu"), dtype=torch.float32)
    ).net
    net.train()(torch.rand(4, 3, 64, 64))[0].sum().backward()
    learning = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in learning.values())
    assert any("blocks.2." in name for name in learning)
    assert not any("conv_head" in name or "blocks.3." in name for name in learning)


@pytest.mark.skipif(not HAS_TIMM, reason="needs timm")
def test_timms_weights_are_a_safetensors(pictures, tmp_path):
    words = ("rotnet-six-layer", "--backbone.name", "timm/resnet10t", "--image-size", "32")
    assert learn(pictures, tmp_path / "run", *words) == 0
    with pytest.raises(UsageError, match=r"timm is given its weights as NAME\.safetensors"):
        export.main([str(tmp_path / "run"), "--to", "timm", "--out", str(tmp_path / "net.pth")])
    assert not (tmp_path / "net.pth").exists()


@pytest.mark.skipif(not HAS_TIMM, reason="needs timm")
def test_nothing_follows_a_stage_of_timm():
    net = named(config.Named(name="timm/resnet10t"), 64)
    with pytest.raises(UsageError, match=r"nothing follows layer3: .*--method.head linear"):
        HEADS["nonlinear"](net, "layer3", {"layer3": (8, 4, 4)}, 3)


@pytest.mark.skipif(not HAS_TIMM, reason="needs timm")
def test_a_net_of_timm_is_timms_own():
    import timm

    net = named(config.Named(name="timm/resnet10t"), 64).eval()
    theirs = timm.create_model("resnet10t", num_classes=0).eval()
    theirs.load_state_dict(net.net.state_dict())
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        last, layer2 = net.outputs(pixels, ("embedding", "layer2"))
        np.testing.assert_allclose(last, theirs(pixels), rtol=1e-5, atol=1e-5)
        assert layer2.shape == (2, net.channels["layer2"], 8, 8)
