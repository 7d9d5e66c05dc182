"""What a run has trained, to be asked and not trained further: its trunk, its task, the nets of its folds."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fastrot import assemble, config
from fastrot.backbones.staged import Staged
from fastrot.config import Config, UsageError
from fastrot.core import DataInfo, Method
from fastrot.ops.rotate import rotated_views
from fastrot.training import checkpoint
from fastrot.training.foreign import exported, read_exported


@dataclass(frozen=True)
class Trained:
    """What a checkpoint says of itself."""

    source: Path  # the run's folder, or the checkpoint
    cfg: Config
    identity: dict[str, Any]  # of the run: see training/resume.py
    step: int


class Trunk(nn.Module):
    """A trained backbone with the statistics it was trained under, in eval mode.

    stages  names that `features` can be asked for, first to last
    size    pixels a side of the crops it was trained on
    """

    def __init__(self, net: Staged, cfg: Config):
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.mean, self.std = cfg.mean, cfg.std
        self.size = cfg.method.crop.size
        self.stages = net.stages
        self.config = cfg

    @torch.no_grad()
    def features(self, images: Any, stage: str) -> Float[Tensor, "b ..."]:
        """Features of square uint8 RGB pictures behind a named stage, in float32.

        images  [h, w, 3] or [3, h, w], or a batch of these, of torch or numpy; or a picture of PIL

        [b, channels, h, w] behind a convolution or pool, [b, width] behind a linear stage; one picture is a batch of
        one. A net in half precision or on another device computes there. Raises UsageError for a stage that the
        network has not, and for pictures that it cannot take.
        """
        self.net.check_stage(stage)
        weights = next(self.net.parameters())
        pictures = self._batch(images).to(weights.device)
        views = rotated_views(pictures, (0,), self.mean, self.std, dtype=torch.float32)
        self.net.eval()  # whatever the mode of a model that holds it
        try:
            found = self.net.outputs(views.to(weights.dtype), (stage,))[0]
        except RuntimeError as error:
            side = pictures.shape[1]
            if side == self.size or isinstance(error, torch.OutOfMemoryError):
                raise
            told = f"pictures of {side} x {side} pixels do not fit {stage}"
            way = f"give {self.size} x {self.size}, as in its training, or name an earlier stage"
            raise UsageError(f"{told}: {way}") from error
        return found.float().contiguous()

    def _batch(self, images: Any) -> UInt8[Tensor, "b s s 3"]:
        """What `features` takes, as one batch; refused where it is anything else."""
        if hasattr(images, "convert"):  # PIL's
            images = images.convert("RGB")
        if not isinstance(images, Tensor):
            try:
                array = np.array(images)
            except ValueError as error:  # a list
                raise self._misfit("pictures of different sizes") from error
            if array.dtype != np.uint8:
                raise self._misfit(f"{type(images).__name__} of {array.dtype}")
            images = torch.from_numpy(array)
        batch = images[None] if images.ndim == 3 else images
        if batch.ndim == 4 and batch.shape[3] != 3 and batch.shape[1] == 3:
            batch = batch.permute(0, 2, 3, 1)
        square = batch.ndim == 4 and len(batch) and batch.shape[1] == batch.shape[2]
        if batch.dtype != torch.uint8 or not square or batch.shape[3] != 3:
            raise self._misfit(f"{images.dtype} {list(images.shape)}")
        return batch.contiguous()

    def _misfit(self, got: str) -> UsageError:
        wants = "square RGB pictures of uint8, 0 to 255: [h, w, 3], [3, h, w], or a batch of either"
        side = f"crop or resize others, to {self.size} x {self.size} as in training"
        return UsageError(f"features got {got.removeprefix('torch.')}: it wants {wants}; {side}")


def load(run: str | Path, device: torch.device | str = "cpu", *, learnt: bool = True) -> Trunk:
    """The trained backbone of a run's folder, its checkpoints/ or one of these: `load("runs/x").features(images, "conv5")`.

    Not `learnt`: the same network with random weights, always the same.
    """
    saved, weights = _read(run)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(saved.cfg.seed)  # a caller's GPU keeps its own
        trunk = assemble.backbone(saved.cfg.backbone, saved.cfg.method.crop.size)
    if learnt:
        checkpoint.load_weights(trunk, checkpoint.trunk_weights(weights), str(run))
    return Trunk(trunk, saved.cfg).to(device)


def trained_method(run: str | Path, device: torch.device, *, learnt: bool = True) -> Method:
    """The task and net of a run folder or checkpoint, in eval mode and float32: to be asked, not trained further.

    What a method keeps for training alone is left out. Not `learnt`: the same net with the weights that its seed gives.
    """
    if (file := exported(run)) is not None:
        raise UsageError(f"{file} holds a trunk alone: name the run that it was exported from")
    saved, weights = _read(run)
    cfg, known = saved.cfg, saved.identity
    kind = assemble.METHODS[type(cfg.method)]
    cfg = dataclasses.replace(cfg, method=kind.for_inference(cfg.method))
    none = {"images": 1, "rows": None, "data_rows": 1, "data_fingerprint": ""}
    own = {"mean": cfg.mean, "std": cfg.std, "size": cfg.method.crop.size, "seed": cfg.seed}
    own |= {"classes": known.get("classes", 0), "fingerprint": known["fingerprint"]}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg.seed)  # a caller's GPU keeps its own
        built = assemble.method(cfg, DataInfo(**none, **own, device=device, dtype=torch.float32))
    if learnt:
        checkpoint.load_weights(built.net, weights, str(run))
    built.net.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return built


def nets_of(run: str | Path) -> list[Trained]:
    """The net of a run or checkpoint; of a folder of folds those of all of them, in order.

    Raises UsageError where a fold is missing, unfinished, or one of another --folds.
    """
    folders = checkpoint.folds_in(Path(run))
    if not folders:
        return [_read(run)[0]]
    begun = {f: _read(f)[0] for f in folders if checkpoint.of_run(f).exists()}
    folds = max((net.cfg.folds or 0 for net in begun.values()), default=0)
    for fold in range(max(folds, 1)):
        net = begun.get(folder := Path(run) / f"fold{fold}")
        if net is None:
            way = f"train with --folds {folds or 'F'} --out {run} first, to the end"
            raise UsageError(f"{folder} holds no trained net: {way}")
        if (net.cfg.folds, net.cfg.fold) != (folds, fold):
            told = f"{folder} was trained as fold {net.cfg.fold} of --folds {net.cfg.folds}, where"
            raise UsageError(f"{told} fold {fold} of {folds} belongs: train it in another folder")
        if net.step < (end := net.identity["steps"]):
            told = f"{folder} is not trained to its end (step {net.step} of {end})"
            raise UsageError(f"{told}: the command that began it goes on there")
    return [begun[Path(run) / f"fold{fold}"] for fold in range(folds)]


def net_of(run: str | Path) -> Trained:
    """The one net of a run or checkpoint. Raises UsageError for a folder of folds."""
    net, *more = nets_of(run)
    if more:
        raise UsageError(f"{run} holds several nets: name one of them, such as {net.source}")
    return net


def _read(source: str | Path) -> tuple[Trained, dict[str, Tensor]]:
    """What the last checkpoint of a run, or what was exported of it, says of itself, and its net's weights."""
    file = exported(source)
    state = checkpoint.load(checkpoint.of_run(source)) if file is None else read_exported(file)
    cfg, identity = config.from_plain(state["config"]), state["run_identity"]
    return Trained(Path(source), cfg, identity, state["step"]), state["net"]
