"""A trained network in the forms that others read: `export.py RUN --to ...`. What is written is read back and compared."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from fastrot import config
from fastrot.backbones.convolved import Convolved
from fastrot.backbones.named import OF_TORCHVISION, TIMM, TimmNet, library_names
from fastrot.config import RunError, UsageError, net_name
from fastrot.disk import replace_bytes, write_atomically
from fastrot.evals.trained import Trained, Trunk, load, net_of
from fastrot.training import checkpoint
from fastrot.training.foreign import MODEL

NEAR = 1e-3  # relative and absolute, in float32: other libraries add up in another order


class Exported(NamedTuple):
    """What is asked for."""

    net: Trained
    trunk: Trunk
    out: Path
    stages: tuple[str, ...]
    probes: tuple[Path, ...]


def write(
    run: str, to: str, out: Path | None, stages: tuple[str, ...], probes: tuple[Path, ...]
) -> Path:
    """Write a run's network in the form `to`, and return where. Raises UsageError where it has no such form."""
    net = net_of(run)
    writer, name = FORMS[to]
    out = out or checkpoint.of_run(run).parent.parent / "exported" / name
    trunk = load(run)
    for stage in stages:
        trunk.net.check_stage(stage)
    if to == "hub" and (out / "checkpoints").exists():
        raise UsageError(f"--out {out} is a run's folder: name one of its own")
    writer(Exported(net, trunk, out, stages or trunk.stages[-1:], probes))
    return out


# ---- weights ----


def _safetensors(e: Exported) -> None:
    """The trunk's weights by its own names, and the run's config beside them."""
    library, file = _needed("safetensors.torch"), e.out
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in e.trunk.net.state_dict().items()}
    about = {"format": "pt", "fastrot": json.dumps(_about(e))}
    replace_bytes(file, library.save(weights, about))
    again = load(file).net.state_dict()
    _check(all(torch.equal(value, again[name]) for name, value in weights.items()), file)


def _about(e: Exported) -> dict[str, Any]:
    plain = config.to_plain(e.net.cfg)
    identity = {k: v for k, v in e.net.identity.items() if k not in ("folder", "data")}
    return {"config": plain, "step": e.net.step, "run_identity": identity}


def _torchvision(e: Exported) -> None:
    """Under torchvision's names. Its AlexNet has no batch norm: what ours does is put into the layers before, as in eval mode."""
    from torchvision.models import get_model

    cfg = e.net.cfg.backbone
    if net_name(cfg) in OF_TORCHVISION:
        theirs: Any = get_model(net_name(cfg), weights=None)
        last = "fc" if hasattr(theirs, "fc") else "classifier"
        theirs.load_state_dict(library_names(e.trunk.net), strict=False)
    else:
        last, theirs = "classifier.6", _folded_alexnet(e, get_model("alexnet", weights=None))
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith(f"{last}.")}
    e.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(e.out, lambda file: torch.save(weights, file))
    again: Any = get_model(net_name(cfg).lower(), weights=None)
    again.load_state_dict(torch.load(e.out, weights_only=True), strict=False)
    again.set_submodule(last, nn.Identity())
    _check_same(e, again)
    print(f"the last layer, {last}, is not in it: load_state_dict(..., strict=False)")


def _folded_alexnet(e: Exported, theirs: Any) -> Any:
    cfg, size = e.net.cfg.backbone, e.trunk.size
    plain = isinstance(cfg, config.AlexNet) and (cfg.width, cfg.kernel, cfg.stride) == (1.0, 11, 4)
    if not plain or size != 224:
        told = f"{e.net.source} is {net_name(cfg)} of {size} pixels"
        known = "AlexNet of 224, ResNets, MobileNetV2 and EfficientNet-B0"
        raise UsageError(f"{told}, torchvision has {known}: use --to safetensors, or onnx")
    layers = [stage for stage in e.trunk.net.children() if isinstance(stage, Convolved)]
    for place, stage in zip((0, 3, 6, 8, 10), layers, strict=True):
        theirs.features[place] = fuse_conv_bn_eval(stage.conv, stage.bn)
    block: Any = e.trunk.net.get_submodule("fc_block")
    theirs.classifier[1] = fuse_linear_bn_eval(block.fc1, block.bn1)
    theirs.classifier[4] = fuse_linear_bn_eval(block.fc2, block.bn2)
    return theirs


def _timm(e: Exported) -> None:
    """Weights as timm.create_model(NAME, num_classes=0, checkpoint_path=FILE) takes them."""
    name, size = net_name(e.net.cfg.backbone), e.trunk.size
    if not isinstance(e.trunk.net, TimmNet):
        told = f"{e.net.source} is {name}, which was not built by timm"
        raise UsageError(f"{told}: use --to safetensors, torchvision or onnx")
    if e.out.suffix != ".safetensors":
        raise UsageError(f"--out {e.out}: timm is given its weights as NAME.safetensors")
    weights = {k: v.contiguous() for k, v in e.trunk.net.net.state_dict().items()}
    e.out.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(e.out, _needed("safetensors.torch").save(weights, {"format": "pt"}))
    again = TimmNet(name.removeprefix(TIMM), size).net
    _needed("timm.models").load_checkpoint(again, str(e.out))
    _check_same(e, again)


def _check_same(e: Exported, theirs: nn.Module) -> None:
    """That a library's net says what ours does."""
    pixels = torch.randn(2, 3, e.trunk.size, e.trunk.size)
    with torch.no_grad():
        _check(torch.allclose(theirs.eval()(pixels), e.trunk.net(pixels), NEAR, NEAR), e.out)


# ---- graphs ----


class Served(nn.Module):
    """Stages of a trunk behind its normalisation: float32 RGB pixels from 0 to 1 in."""

    def __init__(self, trunk: Trunk, stages: tuple[str, ...]):
        super().__init__()
        self.net, self.stages = trunk.net, stages
        self.mean, self.std = (
            nn.Buffer(torch.tensor(each).view(3, 1, 1)) for each in (trunk.mean, trunk.std)
        )

    def forward(self, pixels: Float[Tensor, "b 3 s s"]) -> tuple[Tensor, ...]:
        return tuple(self.net.outputs((pixels - self.mean) / self.std, self.stages))


def _graph(e: Exported) -> tuple[Served, Tensor, dict[str, Any]]:
    size = e.trunk.size
    e.out.parent.mkdir(parents=True, exist_ok=True)
    served = Served(e.trunk, e.stages).eval().requires_grad_(False)
    return served, torch.rand(2, 3, size, size), {"pixels": {0: torch.export.Dim("batch")}}


def _onnx(e: Exported) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _needed(name)
    import onnxruntime

    served, pixels, shapes = _graph(e)
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": list(e.stages)}
    program = torch.onnx.export(
        served, (pixels,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names
    )
    assert program is not None
    program.save(str(e.out))
    session = onnxruntime.InferenceSession(str(e.out), providers=["CPUExecutionProvider"])
    for batch in (pixels, torch.rand(5, *pixels.shape[1:])):
        found: list[Any] = list(session.run(None, {"pixels": batch.numpy()}))
        both = zip(found, served(batch), strict=True)
        _check(all(np.allclose(mine, own.numpy(), NEAR, NEAR) for mine, own in both), e.out)


def _torch_export(e: Exported) -> None:
    served, pixels, shapes = _graph(e)
    program = torch.export.export(served, (pixels,), dynamic_shapes=shapes)
    write_atomically(e.out, lambda file: torch.export.save(program, file))
    again: Any = torch.export.load(e.out).module()
    for batch in (pixels, torch.rand(5, *pixels.shape[1:])):
        both = zip(again(batch), served(batch), strict=True)
        _check(all(torch.allclose(mine, own, NEAR, NEAR) for mine, own in both), e.out)


# ---- a model hub ----


def _hub(e: Exported) -> None:
    """model.safetensors, config.json and a card: what a model hub shows and hands out."""
    card = _card(e)
    _safetensors(e._replace(out=e.out / MODEL))
    replace_bytes(e.out / "config.json", json.dumps(_about(e), indent=1).encode())
    replace_bytes(e.out / "README.md", card.encode())


def _card(e: Exported) -> str:
    cfg, run = e.net.cfg, checkpoint.of_run(e.net.source).parent.parent
    summary, environment = (_json(run / f"{n}.json") for n in ("summary", "environment"))
    val = summary.get("val") if summary.get("steps") == e.net.step else None  # of this checkpoint
    length = f"{e.net.identity['epochs']} epochs ({e.net.identity['steps']:,} steps)"
    commit = environment.get("commit") or (environment.get("versions") or {}).get("commit")
    lines = [
        "---", "library_name: fastrot", "tags: [self-supervised, rotation, image-feature-extraction]",
        "---", "", f"# {cfg.preset}", "",
        f"{net_name(cfg.backbone)} trained by {type(cfg.method).__name__} with fastrot, "
        f"to step {e.net.step:,}; crops of {e.trunk.size} pixels.", "",
        "| what | |", "| --- | --- |",
        f"| data | {e.net.identity.get('images', 0):,} pictures, fingerprint {e.net.identity['data_fingerprint']} |",
        f"| recipe | {length}, batch {e.net.identity.get('global_batch', cfg.batch)}, rate {cfg.lr:g} at first, "
        f"seed {cfg.seed}: config.json has every knob |",
        f"| fastrot | commit {commit or 'unknown'} |",
        *(f"| validation {name} | {value:.4g} |" for name, value in (val or {}).items()),
        *(row for probe in e.probes for row in _probed(probe)),
        "", "```python", "import fastrot", "",
        'net = fastrot.load("this/folder")  # the trunk, in eval mode',
        f'features = net.features(images, stage="{e.trunk.net.telling}")  # uint8 RGB pictures', "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _probed(run: Path) -> list[str]:
    summary = _json(run / "summary.json")
    if not summary.get("val"):
        raise UsageError(f"--probes {run} has no summary.json with a validation: name probes' runs")
    scores = {k: v for k, v in summary["val"].items() if k.startswith(("top1_", "top5_"))}
    return [f"| {summary['preset']}, {name} | {value:.2%} |" for name, value in scores.items()]


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# ---- inside ----


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        way = 'type  pip install "fastrot[export]"'
        raise UsageError(f"this form wants {package} ({error}): {way}") from None


def _check(same: bool, file: Path) -> None:
    if not same:
        file.unlink(missing_ok=True)
        raise RunError(f"{file} did not say what the network says, and is taken away: tell us")


FORMS: dict[str, tuple[Callable[[Exported], None], str]] = {  # with the name that each has
    "safetensors": (_safetensors, "trunk.safetensors"),
    "torchvision": (_torchvision, "torchvision.pth"),
    "timm": (_timm, "timm.safetensors"),
    "onnx": (_onnx, "trunk.onnx"),
    "torch-export": (_torch_export, "trunk.pt2"),
    "hub": (_hub, "hub"),
}
