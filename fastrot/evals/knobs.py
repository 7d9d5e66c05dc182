"""The knobs of each evaluation; the first lines are its help. Standard library only: a wrong one is told before torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastrot.config import LoaderName


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Ask which way up each picture is, rotated four ways; a folder of folds: the net that never saw it."""

    data: str | None = None  # pictures to ask about; default: all that the run's data holds
    table: Path | None = None  # write the probabilities: FILE.npz, or the original's text FILE.dat
    batch: int | None = None  # pictures at once in each process; default: the run's
    workers: int | None = None  # threads or processes that decode; default: one a core
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    loader: LoaderName = "auto"  # what reads the data; auto: by its format
    on_bad_record: Literal["stop", "skip"] = "stop"  # a picture that cannot be read; skip counts
