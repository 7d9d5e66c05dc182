"""`export.py RUN --to ...`: what others read of a trained network says what the network says."""

import json
import shutil
import typing

import numpy as np
import pytest
import torch
from test_run import TINY

import fastrot
from fastrot import config, export, train
from fastrot.backbones.alexnet import alexnet
from fastrot.config import RunError, UsageError
from fastrot.evals import exported
from fastrot.evals.exported import Exported
from fastrot.evals.trained import Trained, Trunk
from fastrot.presets import PRESETS

pytestmark = pytest.mark.usefixtures("quick_runs")


def out_of(run, to, tmp_path, *more):
    file = tmp_path / f"out-{to}"
    if to in ("safetensors", "onnx", "torch-export"):
        file = file.with_suffix({"safetensors": ".safetensors", "onnx": ".onnx"}.get(to, ".pt2"))
    assert export.main([str(run), "--to", to, "--out", str(file), *more]) == 0
    return file


def pictures_of(size, n=3):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8))


def pixels(images):
    return (images.permute(0, 3, 1, 2).float() / 255).contiguous()


def test_safetensors_load_as_the_run_does(straight, tmp_path):
    from safetensors.torch import load_file

    file = out_of(straight, "safetensors", tmp_path)
    net, again = fastrot.load(straight), fastrot.load(file)
    assert (again.mean, again.std, again.size) == (net.mean, net.std, net.size)
    images = pictures_of(32)
    assert torch.equal(net.features(images, "conv5"), again.features(images, "conv5"))
    assert load_file(file).keys() == net.net.state_dict().keys()


def test_the_command_knows_each_form():
    assert typing.get_args(typing.get_type_hints(export.Export)["to"]) == tuple(exported.FORMS)


def test_a_default_place_is_the_runs_folder(straight, tmp_path, capsys):
    shutil.copytree(straight, run := tmp_path / "run")
    assert export.main([str(run), "--to", "safetensors"]) == 0
    assert (run / "exported" / "trunk.safetensors").exists()
    assert "written to" in capsys.readouterr().out


@pytest.mark.parametrize("stages", [(), ("conv2", "fc_block")])
def test_onnx_says_what_the_net_says(straight, tmp_path, stages):
    import onnxruntime

    file = out_of(straight, "onnx", tmp_path, *(["--stages", *stages] if stages else []))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    stages, images = stages or ("fc_block",), pictures_of(32, 4)
    assert [each.name for each in session.get_outputs()] == list(stages)
    found = session.run(None, {"pixels": pixels(images).numpy()})
    for stage, each in zip(stages, found, strict=True):
        own = fastrot.load(straight).features(images, stage)
        np.testing.assert_allclose(each, own.numpy(), rtol=1e-3, atol=1e-3)


def test_torch_export_says_what_the_net_says(straight, tmp_path):
    file = out_of(straight, "torch-export", tmp_path, "--stages", "conv5")
    images = pictures_of(32, 4)
    (found,) = torch.export.load(file).module()(pixels(images))
    own = fastrot.load(straight).features(images, "conv5")
    torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-3)


def test_torchvisions_alexnet_with_the_norms_put_into_its_layers(tmp_path):
    """Of full width, with statistics that are not those of a beginning."""
    from torchvision.models import alexnet as theirs

    torch.manual_seed(0)
    cfg, net = config.resolved(PRESETS["rotnet-alexnet"]()), alexnet(config.AlexNet(), 224)
    for each in net.modules():
        if isinstance(each, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            each.running_mean.normal_(0, 0.2)
            each.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(each.weight, 0.5, 1.5)
            torch.nn.init.normal_(each.bias, 0, 0.2)
    file, trunk = tmp_path / "alexnet.pth", Trunk(net, cfg)
    exported._torchvision(Exported(Trained(tmp_path, cfg, {}, 1), trunk, file, (), ()))
    other = theirs()
    lacking = other.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert lacking.missing_keys == ["classifier.6.weight", "classifier.6.bias"]
    assert not lacking.unexpected_keys
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        maps = other.eval().features(images)
        torch.testing.assert_close(maps, net.outputs(images, ["pool5"])[0], rtol=1e-3, atol=1e-3)


def test_a_folder_for_a_hub(straight, pictures, tmp_path):
    probe = ["probe-linear", *TINY[1:], "--schedule.steps", "2", "--data", str(pictures)]
    probe += ["--start-from", str(straight), "--out", str(tmp_path / "probe"), "--method.stages"]
    words = [word for word in [*probe, "conv5"] if word not in ("--backbone.width", "0.1")]
    assert train.main(words) == 0
    folder = out_of(straight, "hub", tmp_path, "--probes", str(tmp_path / "probe"))
    card = (folder / "README.md").read_text()
    identity = json.loads((folder / "config.json").read_text())["run_identity"]
    assert identity["data_fingerprint"] in card
    val = json.loads((tmp_path / "probe" / "summary.json").read_text())["val"]
    assert f"| probe-linear, top1_conv5 | {val['top1_conv5']:.2%} |" in card
    assert card.startswith("---\nlibrary_name: fastrot")
    images = pictures_of(32)
    again, net = fastrot.load(folder), fastrot.load(straight)
    assert torch.equal(again.features(images, "conv5"), net.features(images, "conv5"))


def test_a_card_tells_numbers_of_its_own_checkpoint(pictures, tmp_path):
    words = [*TINY, "--data", str(pictures), "--out", str(tmp_path / "run"), "--keep-every", "4"]
    assert train.main(words) == 0
    last = out_of(tmp_path / "run", "hub", tmp_path, "--out", str(tmp_path / "last"))
    assert not last.exists()  # the later --out counts
    card = (tmp_path / "last" / "README.md").read_text()
    assert "| validation accuracy |" in card
    assert "3 epochs (20 steps)" in card
    earlier = tmp_path / "run" / "checkpoints" / "step_4.pt"
    export.main([str(earlier), "--to", "hub", "--out", str(tmp_path / "earlier")])
    card = (tmp_path / "earlier" / "README.md").read_text()
    assert "to step 4;" in card
    assert "validation" not in card


def test_what_was_exported_is_a_beginning_but_no_run(straight, pictures, tmp_path):
    from fastrot import evaluate

    file = out_of(straight, "safetensors", tmp_path)
    words = [
        "probe-linear",
        *TINY[3:5],
        *TINY[7:],
        "--schedule.steps",
        "1",
        "--data",
        str(pictures),
    ]
    words += ["--start-from", str(file), "--method.stages", "conv5", "--out", str(tmp_path / "p")]
    assert train.main(words) == 0
    mine = fastrot.load(tmp_path / "p").net.state_dict()
    theirs = fastrot.load(straight).net.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(UsageError, match="holds a trunk alone: name the run"):
        evaluate.main([str(file), "rotation", "--data", str(pictures)])


def test_a_damaged_file_is_one_sentence(straight, tmp_path):
    file = out_of(straight, "safetensors", tmp_path)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UsageError, match="is cut short or changed"):
        fastrot.load(file)


def test_a_runs_folder_is_no_place_for_a_hubs(straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(UsageError, match="is a run's folder: name one of its own"):
        export.main([str(run), "--to", "hub", "--out", str(run)])
    (run / "model.safetensors").write_bytes(b"")  # whoever put it there
    assert fastrot.load(run).size == 32


def test_what_differs_is_not_handed_on(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(exported.torch, "allclose", lambda *_: False)
    with pytest.raises(RunError, match="did not say what the network says, and is taken away"):
        out_of(straight, "torch-export", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--to", "timm"],
            "is AlexNet, which was not built by timm: use --to safetensors, torchvision or onnx",
        ),
        (["--to", "torchvision"], "is AlexNet of 32 pixels, torchvision has AlexNet of 224"),
        (["--to", "onnx", "--stages", "conv9"], "there is no stage 'conv9': choose from"),
        (["--to", "hub", "--probes", "nowhere"], "--probes nowhere has no summary.json"),
    ],
)
def test_a_form_that_the_net_does_not_fit_is_refused(straight, tmp_path, words, says):
    with pytest.raises(UsageError, match=says) as told:
        export.main([str(straight), *words, "--out", str(tmp_path / "out")])
    assert "\n" not in str(told.value)


def test_what_was_not_written_here_and_what_is_not_there_are_refused(straight, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="was not written by fastrot export: name one that was"):
        fastrot.load(tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="there is no checkpoint"):
        export.main([str(tmp_path / "no"), "--to", "onnx"])


def test_a_package_that_is_missing_is_one_sentence(straight, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r'wants onnxruntime .*: type  pip install "fastrot'):
        out_of(straight, "onnx", tmp_path)
