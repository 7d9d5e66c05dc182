"""Weights that the papers' released code wrote, under our names: what --start-from takes beside our own."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCKS = {"0": "conv1", "2": "conv2", "4": "conv3", "5": "conv4", "6": "conv5"}  # AlexNet's
LINEARS = {"1": "fc1", "2": "bn1", "4": "fc2", "5": "bn2"}
LAYERS = {"1": "wide", "2": "point1", "3": "point2"}  # of a block of Nin


def original_weights(path: Path) -> dict[str, Tensor] | None:
    """The weights in a file of theirs, those of the trunk behind `trunk.`; None: it is no such file, or damaged.

    A dict of tensors, or one with such as its `network`, in whatever form torch has saved. No pickled code is run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whoever asks has a sentence for a file that is not ours either
        return None
    state = state.get("network", state) if isinstance(state, dict) else {}
    named = {
        str(key).removeprefix("module."): value for key, value in state.items()
    }  # of DataParallel
    if not any(key.startswith("_feature_blocks.") for key in named):
        return None
    return from_original(named, "trunk.")


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
    match = re.fullmatch(start + r"(\d)\.(\d)\.(\w+)", key)
    assert match, key
    block, layer, leaf = match.groups()
    if block in BLOCKS:
        return f"{BLOCKS[block]}.{('conv', 'bn')[int(layer)]}.{leaf}"
    return f"fc_block.{LINEARS[layer]}.{leaf}" if block == "8" else f"head.{leaf}"
