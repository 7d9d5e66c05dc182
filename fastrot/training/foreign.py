"""Networks that are no checkpoint of ours: what `fastrot export` wrote, and what the papers' released code did."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrot.config import UsageError

MODEL = "model.safetensors"  # in a hub's folder
BLOCKS = {"0": "conv1", "2": "conv2", "4": "conv3", "5": "conv4", "6": "conv5"}  # AlexNet's
LINEARS = {"1": "fc1", "2": "bn1", "4": "fc2", "5": "bn2"}
LAYERS = {"1": "wide", "2": "point1", "3": "point2"}  # of a block of Nin


def exported(source: str | Path) -> Path | None:
    """The .safetensors that is meant, or lies in a hub's folder; None: it is a run or checkpoint."""
    path = Path(os.path.expanduser(source))
    file = path / MODEL if path.is_dir() and not (path / "checkpoints").exists() else path
    return file if file.suffix == ".safetensors" and file.exists() else None


def read_exported(file: Path) -> dict[str, Any]:
    """As a checkpoint of the run that it was exported from: `config`, `run_identity`, `step`, and of `net` the trunk."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        way = 'type  pip install "fastrot[export]"'
        raise UsageError(f"{file} wants safetensors ({error}): {way}") from None
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("fastrot", "{}"))
            weights = {f"trunk.{name}": opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{file} is cut short or changed ({error}): export it anew") from error
    if "config" not in about:
        raise UsageError(f"{file} was not written by fastrot export: name one that was")
    return about | {"net": weights}


def original_weights(path: Path) -> dict[str, Tensor] | None:
    """The weights in a file of the papers' code, those of the trunk behind `trunk.`; None: it is no such file, or damaged.

    A dict of tensors, or one with such as its `network`, in whatever form torch has saved; a checkpoint of VISSL, whose
    AlexNet for rotations has the same trunk, without fc_block, and whose ResNets have torchvision's. No pickled code is run.
    Raises UsageError for layers that their networks do not have.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError):
        raise  # says nothing of the file's bytes
    except Exception:  # whoever asks has a sentence for a file that is not ours either
        return None
    for name in ("classy_state_dict", "base_model", "model", "trunk", "network"):
        state = state.get(name, state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        return None
    named = {
        str(key).removeprefix("module."): value for key, value in state.items()
    }  # of DataParallel
    if not any(key.startswith("_feature_blocks.") for key in named):
        return None
    try:
        ours = from_original(named, "trunk.")
    except (AssertionError, KeyError) as error:
        told = f"{path} has a layer {error}, unlike the AlexNet and the NIN of the papers' code, or VISSL's ResNets"
        raise UsageError(f"{told}: name a file that this code has saved") from None
    for name in [
        name for name in ours if name.endswith(".running_mean")
    ]:  # torch before 0.4.1 did not count
        counted = name.replace("running_mean", "num_batches_tracked")
        ours.setdefault(counted, torch.zeros((), dtype=torch.int64))
    return ours


def from_original(state: Mapping[str, Any], trunk: str = "") -> dict[str, Tensor]:
    """The weights of an AlexNet or a Nin of theirs by the names of ours; `trunk.` before those of a Classifier's."""
    ours = {our_name(key): value for key, value in state.items()}
    return {k if k.startswith("head.") else trunk + k: v for k, v in ours.items()}


def our_name(key: str) -> str:
    start = r"_feature_blocks\."
    if match := re.fullmatch(start + r"\d+\.Block(\d+)_ConvB(\d)\.layers\.(\w+)\.(\w+)", key):
        block, layer, kind, leaf = match.groups()
        return f"conv{block}.{LAYERS[layer]}.{'conv' if kind == 'Conv' else 'bn'}.{leaf}"
    if match := re.fullmatch(start + r"\d+\.Classifier\.(\w+)", key):
        return f"head.{match[1]}"
    if match := re.fullmatch(start + r"((?:conv1|bn1|layer\d)\..+)", key):  # a ResNet of VISSL's
        return match[1] if match[1].startswith("layer") else f"conv1.{match[1]}"
    match = re.fullmatch(start + r"(\d)\.(\d)\.(\w+)", key)
    assert match, key
    block, layer, leaf = match.groups()
    if block in BLOCKS:
        return f"{BLOCKS[block]}.{('conv', 'bn')[int(layer)]}.{leaf}"
    return f"fc_block.{LINEARS[layer]}.{leaf}" if block == "8" else f"head.{leaf}"
