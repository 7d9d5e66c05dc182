"""Backbones: the originals' outputs to the digit, their sizes, and what every trunk promises."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from torch import nn
from truth import golden

from fastrot import assemble, config
from fastrot.backbones import alexnet, nin
from fastrot.backbones.named import NETS
from fastrot.backbones.staged import Classifier, Staged
from fastrot.config import UsageError
from fastrot.ops.rotate import rotated_views
from fastrot.training.foreign import from_original

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = ["conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc_block"]
# without AVX2 float32 sums have another order: 3.6e-5 apart
F32 = 1e-4 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 3e-5
TOLERANCE = {"f32": dict(rtol=1e-5, atol=F32), "f64": dict(rtol=1e-12, atol=1e-12)}
DTYPES = {"f32": torch.float32, "f64": torch.float64}


def weights(file: dict, prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) :]: torch.tensor(v) for k, v in file.items() if k.startswith(prefix)}


def views(file: dict, kind: str) -> torch.Tensor:
    images = torch.tensor(file["image_u8"])
    return rotated_views(images, (0, 1, 2, 3), MEAN, STD, torch.float32).to(DTYPES[kind])


def compare(got: torch.Tensor, want: np.ndarray, kind: str) -> None:
    want = torch.as_tensor(want).to(got.dtype)
    torch.testing.assert_close(got.detach(), want, **TOLERANCE[kind])


def compare_stage(out: torch.Tensor, file: dict, key: str, kind: str) -> None:
    """A stage's output against whatever the file keeps of it."""
    flat = out.double().flatten()
    sums = np.array([flat.sum().item(), flat.square().sum().item()])
    # a sum cancels: its error is measured against the sum of magnitudes
    scale = {"f32": 1e-5, "f64": 1e-12}[kind] * np.array([flat.abs().sum().item(), sums[1]])
    assert (np.abs(sums - [file[f"{key}_sum"], file[f"{key}_sumsq"]]) <= scale).all()
    if key in file:
        compare(out, file[key], kind)
    if f"{key}_first2" in file:
        compare(out[:2], file[f"{key}_first2"], kind)
    if f"{key}_probe" in file:
        # (read in the original's order of memory)
        compare(
            out.contiguous().flatten()[:: max(1, out.numel() // 257)], file[f"{key}_probe"], kind
        )


# ---- parity ----


@pytest.fixture(scope="module")
def small() -> dict:
    return golden("alexnet_small")


def small_alexnet(file: dict, kind: str) -> Staged:
    net = alexnet.alexnet(config.AlexNet(), 224, (4, 6, 8, 5, 5), 48)
    net.load_state_dict(from_original(weights(file, "sd__")))
    return net.to(DTYPES[kind])


def heads(file: dict, kind: str) -> tuple[nn.Linear, nn.Linear]:
    """The original's rotation head and its embedding, on halves of fc_block."""
    out = []
    for name in ("cls__fc_classifier.0", "norm__norm.0"):
        weight, bias = torch.tensor(file[f"{name}.weight"]), torch.tensor(file[f"{name}.bias"])
        head = nn.Linear(weight.shape[1], weight.shape[0])
        head.load_state_dict({"weight": weight, "bias": bias})
        out.append(head.to(DTYPES[kind]))
    return out[0], out[1]


@pytest.mark.parametrize("kind", ["f32", "f64"])
@torch.no_grad()
def test_small_alexnet_in_eval_gives_every_stage_of_the_original(small, kind):
    net = small_alexnet(small, kind).eval()
    outputs = dict(zip(STAGES, net.outputs(views(small, kind), STAGES), strict=True))
    for stage in STAGES:
        compare_stage(outputs[stage], small, f"eval_{kind}_{stage}", kind)
    rotation, embedding = heads(small, kind)
    half = outputs["fc_block"].shape[1] // 2
    kept, left = outputs["fc_block"].split(half, dim=1)
    compare(rotation(kept), small[f"eval_{kind}_logits_rot"], kind)
    compare(rotation(left), small[f"eval_{kind}_logits_inv"], kind)
    mean = left.unflatten(0, (-1, 4)).mean(dim=1)
    embed = embedding(mean)
    compare(embed / embed.norm(dim=1, keepdim=True), small[f"eval_{kind}_embed"], kind)


@pytest.mark.parametrize("kind", ["f32", "f64"])
@torch.no_grad()
def test_small_alexnet_in_training_gives_the_original_and_its_running_statistics(small, kind):
    net = small_alexnet(small, kind).train()
    compare(net(views(small, kind)), small[f"train_{kind}_fc_block"], kind)
    after = from_original({**weights(small, "sd__"), **weights(small, f"train_{kind}_after__")})
    now = net.state_dict()
    for key in (k for k in after if "running" in k):
        compare(now[key], after[key].numpy(), kind)


def from_recipe(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The weights of alexnet_full, as tests/golden/README.md describes them."""
    draw = np.random.RandomState((zlib.crc32(name.encode()) + seed) & 0xFFFFFFFF)
    if name.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    if name.endswith(("running_mean", "bias")):
        return (0.1 * draw.standard_normal(shape)).astype(np.float32)
    if name.endswith("running_var") or len(shape) == 1:
        return draw.uniform(0.5, 1.5, shape).astype(np.float32)
    return (np.sqrt(2 / np.prod(shape[1:])) * draw.standard_normal(shape)).astype(np.float32)


@pytest.mark.soak
@torch.no_grad()
def test_full_alexnet_gives_every_stage_of_the_original():
    file = golden("alexnet_full")
    shapes = json.loads(str(file["param_shapes_json"]))
    state = {}
    names = [str(n) for n in file["param_names"]]
    for name, shape, sha in zip(
        names,
        shapes.values() if isinstance(shapes, dict) else shapes,
        file["param_sha256"],
        strict=True,
    ):
        value = from_recipe(name, tuple(shape), seed=0)
        assert hashlib.sha256(value.tobytes()).hexdigest() == sha, name
        state[name] = torch.tensor(value)
    net = alexnet.alexnet(config.AlexNet(), 224)
    net.load_state_dict(from_original(state))
    net = net.double().eval()
    for stage, out in zip(STAGES, net.outputs(views(file, "f64"), STAGES), strict=True):
        assert list(out.shape[1:]) == list(file[f"eval_f64_{stage}_shape"][1:]), stage
        compare_stage(out, file, f"eval_f64_{stage}", "f64")


@pytest.mark.parametrize(
    ("name", "stages", "classes", "pooled"),
    [("s4", 4, 4, False), ("s3", 3, 10, True), ("s5", 5, 4, False), ("s4avg", 4, 4, True)],
)
@torch.no_grad()
def test_small_nin_gives_the_original(name, stages, classes, pooled):
    file = golden("nin_small")
    images = torch.tensor(file["x"])
    for kind, dtype in DTYPES.items():
        cfg = config.Nin(stages=stages, pool_conv3=pooled)
        net = Classifier(nin.nin(cfg, 32, (12, 10, 6)), classes)
        net.load_state_dict(from_original(weights(file, f"{name}__sd__"), "trunk."))
        net = net.to(dtype).eval()
        names = net.trunk.stages
        for stage, out in zip(names, net.trunk.outputs(images.to(dtype), names), strict=True):
            assert tuple(out.shape) == tuple(file[f"{name}__{stage}_shape"])
            if kind == "f64":
                compare_stage(out, file, f"{name}__eval_f64_{stage}", kind)
            elif stage == "conv2":
                compare(out, file[f"{name}__eval_f32_conv2"], kind)
        compare(net(images.to(dtype)), file[f"{name}__eval_{kind}_classifier"], kind)
        net.train()
        compare(net(images.to(dtype)), file[f"{name}__train_{kind}_classifier"], kind)


# ---- sizes and counts ----


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        assert count(alexnet.alexnet(config.AlexNet(), 224)) == 57_014_336
        assert count(Classifier(nin.nin(config.Nin(), 32), 4)) == 1_411_140
        assert count(Classifier(nin.nin(config.Nin(stages=3), 32), 10)) == 1_005_642


def test_width_scales_every_layer():
    net = alexnet.alexnet(config.AlexNet(width=0.25), 64)
    assert [net.channels[s] for s in STAGES if s[:4] == "conv"] == [16, 48, 96, 64, 64]
    assert net.channels["fc_block"] == 1024
    assert set(alexnet.alexnet(config.AlexNet(width=1e-6), 64).channels.values()) == {1}


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "side"),
    [
        pytest.param(63, 11, 4, 1, id="least"),
        pytest.param(64, 11, 4, 1, id="small-crops"),
        pytest.param(96, 11, 4, 2, id="medium"),
        pytest.param(128, 11, 4, 3, id="large"),
        pytest.param(224, 11, 4, 6, id="paper"),
        pytest.param(29, 5, 2, 1, id="small-kernel-least"),
        pytest.param(64, 5, 2, 3, id="small-kernel"),
    ],
)
@torch.no_grad()
def test_alexnet_takes_any_size_from_its_least_on(size, kernel, stride, side):
    cfg = config.AlexNet(width=0.05, kernel=kernel, stride=stride)
    net = alexnet.alexnet(cfg, size).eval()
    pool5, last = net.outputs(torch.rand(2, 3, size, size), ("pool5", "fc_block"))
    assert pool5.shape == (2, net.channels["pool5"], side, side)
    assert last.shape == (2, net.channels["fc_block"])


def test_alexnet_refuses_smaller_images_and_names_the_way_out():
    with pytest.raises(UsageError, match=r"--image-size got 62: .* at least 63; .*kernel 5"):
        alexnet.alexnet(config.AlexNet(), 62)
    with pytest.raises(UsageError, match="at least 29"):
        alexnet.alexnet(config.AlexNet(kernel=5, stride=2), 28)


# ---- what every trunk promises ----

SMALL = {
    "AlexNet": (config.AlexNet(width=0.05), 64),
    "Nin": (config.Nin(width=0.05), 32),
    **{name: (config.Named(name=name), 64) for name in NETS},
    "timm": (config.Named(name="timm/resnet10t"), 64),
    "transformer": (config.Named(name="timm/vit_tiny_patch16_224"), 64),
}


@pytest.fixture(params=SMALL)
def trunk_and_images(request):
    if request.param in ("timm", "transformer"):
        pytest.importorskip("timm")
    cfg, size = SMALL[request.param]
    torch.manual_seed(0)
    return assemble.backbone(cfg, size), torch.rand(3, 3, size, size)


@torch.no_grad()
def test_outputs_come_in_the_order_of_the_request(trunk_and_images):
    trunk, images = trunk_and_images
    trunk.eval()
    backwards = trunk.outputs(images, trunk.stages[::-1])
    for stage, out in zip(trunk.stages[::-1], backwards, strict=True):
        assert torch.equal(out, trunk.outputs(images, (stage,))[0])
        assert out.shape[1] == trunk.channels[stage]
    assert torch.equal(trunk(images), backwards[0])


@torch.no_grad()
def test_later_stages_are_not_run(trunk_and_images):
    trunk, images = trunk_and_images
    ran = []
    for name in trunk.stages:
        # a stage of timm's lies within its net, by the name that timm gives
        inside = (m for n, m in trunk.named_modules() if n.replace(".", "_").endswith(name))
        next(inside).register_forward_hook(lambda *_, name=name: ran.append(name))
    trunk.outputs(images, (trunk.stages[1], trunk.stages[0]))
    assert ran == list(trunk.stages[:2])


def test_an_unknown_stage_is_refused(trunk_and_images):
    trunk, images = trunk_and_images
    with pytest.raises(UsageError, match=f"no stage 'conv9': choose from {trunk.stages[0]}"):
        trunk.outputs(images, ("conv9",))


def test_a_classifier_learns_in_bfloat16_and_channels_last(trunk_and_images):
    trunk, images = trunk_and_images
    net = Classifier(trunk, 4).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(images.contiguous(memory_format=torch.channels_last))
    assert logits.shape == (3, 4)
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


TRACE = """
import sys

import torch
from fastrot import assemble, config
from fastrot.backbones.staged import Classifier
from fastrot.ops.rotate import rotated_views

def compiled(run):
    return torch.compile(run, fullgraph=True, backend="aot_eager")

for cfg, size in ((config.AlexNet(width=0.05, space_to_depth=True), 64), (config.Nin(width=0.05), 32)):
    trunk = assemble.backbone(cfg, size)
    net, first = Classifier(trunk, 4), next(trunk.parameters())

    def step(crops):
        return net(rotated_views(crops, (0, 1, 2, 3), (0.5,) * 3, (0.2,) * 3, torch.float32, trunk.space_to_depth))

    for run, given in (
        (step, torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)),
        (net, torch.rand(2, 3, size, size)),  # which AlexNet cuts into cells itself
    ):
        mine, own = compiled(run)(given), run(given)
        torch.testing.assert_close(mine, own)
        (mine,), (own,) = (torch.autograd.grad(out.square().sum(), first) for out in (mine, own))
        torch.testing.assert_close(mine, own, rtol=1e-3, atol=1e-4)

for name in sys.argv[1:]:
    torch._dynamo.reset()
    net = Classifier(assemble.backbone(config.Named(name=name), 64), 4)
    torch.compile(net, fullgraph=True, backend="eager")(torch.rand(2, 3, 64, 64))
"""


@pytest.mark.versions
@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_views_and_networks_trace_without_a_graph_break(named):
    # in a process of its own: the shape checks that tests switch on cannot be traced
    names = [
        *(n for n in NETS if n not in ("resnet50", "mobilenet_v2")),
        *(["timm/resnet10t"] if importlib.util.find_spec("timm") else []),
    ]
    command = [sys.executable, "-c", TRACE, *(names if named else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
