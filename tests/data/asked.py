"""Batches of a reader, without a Loader."""

import contextlib
from collections.abc import Iterable

import torch

from fastrot.core import CropRequest, Data, Decoded


def asked(data: Data, requests: Iterable[CropRequest], workers: int = 0) -> list[Decoded]:
    """What becomes of each request, all begun at once."""
    with contextlib.closing(data.open_reader(torch.device("cpu"), workers)) as reader:
        return [pending.result() for pending in [reader.begin(each) for each in requests]]
