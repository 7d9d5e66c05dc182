"""The nouns that all floors share: View, CropRequest, Batch, DataInfo, Losses, Data, Reader, Method.

Shapes.  b pictures, s pixels a side of a crop. A `row` is a picture's number in the prepared data.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from fastrot.arrays import Boxes, Bytes, Keys, Numbers, Picture, Rows, RowSizes, Sizes
from fastrot.config import Config, Crop, RunError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by their knobs


@dataclass(frozen=True, kw_only=True)
class View:
    """How data is looked at; every Loader is built from one."""

    crops: tuple[Crop, ...]
    shuffled: bool = True  # False: data order, with the ragged tail
    rows: Path | Numbers | None = None  # or a .npy of them: a fold, a hold-out; None: all
    owned: bool = False  # rank r permutes the rows i % world == r
    asked: int | None = None  # --image-size, which a puzzle's crop is larger than
    blocks: tuple[int, int] | None = None  # pictures a block, blocks a window; None: all are mixed


@dataclass(frozen=True, slots=True)
class CropRequest:
    """What a batch is made of."""

    rows: tuple[Boxes, ...]  # which box of which row, for each crop of the view; see data/crops.py
    sizes: tuple[int, ...]  # pixels a side of the crops
    prefetch: Int64[np.ndarray, " c"] | None = None  # rows of later batches, to be read ahead


class Decoded(NamedTuple):
    """What became of a CropRequest."""

    crops: tuple[UInt8[Tensor, "b _s _s 3"], ...]  # in host memory, pinned for a GPU, or on it
    errors: list[tuple[int, str]]  # place in the batch and a sentence: those crops hold anything


@dataclass(frozen=True, slots=True)
class Pending:
    """A batch under way."""

    result: Callable[[], Decoded]  # waits for it; asked once, in the order of `begin`


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops on the device, with what addresses them."""

    crops: tuple[UInt8[Tensor, "b _s _s 3"], ...]  # one per crop of the view; sizes may differ
    index: Int64[Tensor, " b"]  # row of the prepared data, the same every epoch
    label: Int64[Tensor, " b"]  # -1 where the data has none
    epoch_step: Int64[Tensor, " 2"]  # (epoch, step) on the device: a captured graph reads today's

    @property
    def images(self) -> UInt8[Tensor, "b _s _s 3"]:
        return self.crops[0]


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """What a method may know of its surroundings."""

    images: int  # in the training view, over all ranks
    rows: Numbers | None  # which rows of the data these are; None: all
    data_rows: int  # of the data that they are taken from
    data_fingerprint: str
    classes: int  # 0 where the data has no labels
    mean: tuple[float, ...]  # of red, green, blue; 0 to 1
    std: tuple[float, ...]
    size: int  # pixels a side of the crops
    seed: int
    device: torch.device
    dtype: torch.dtype  # of the views that enter the network
    fingerprint: str  # of the training view's order


@dataclass(frozen=True, slots=True)
class Losses:
    """What a step computed: 0-d tensors on the device."""

    terms: dict[str, Tensor]  # weighted; their sum is descended
    metrics: dict[str, Tensor]  # shares from 0 to 1, unweighted values
    vector: Float[Tensor, " n"] | None = None  # of a step that is over: total, terms, metrics

    @property
    def total(self) -> Tensor:
        if self.vector is not None:
            return self.vector[0]
        return torch.stack(list(self.terms.values())).sum()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the vector's numbers."""
        return ("loss", *self.terms, *self.metrics)

    def detached(self) -> "Losses":
        """The same numbers without gradient, as views of one vector."""
        each = (self.total, *self.terms.values(), *self.metrics.values())
        vector = torch.stack([value.detach() for value in each])
        _, *parts = vector.unbind()
        terms = dict(zip(self.terms, parts, strict=False))
        metrics = dict(zip(self.metrics, parts[len(terms) :], strict=True))
        return Losses(terms, metrics, vector)


class DamagedRecord(RunError):
    """A picture whose bytes are not those that were written, or cannot be read."""


class Data(ABC):
    """Prepared pictures, opened once per process; knows its format and nothing of order or boxes."""

    format: str  # the word of --loader
    rows: int
    labels: Numbers  # -1 where there is none
    classes: tuple[str, ...]
    keys: Keys  # hash of each path relative to the source's root
    _sizes: Sizes  # where `sizes` is as it stands
    fingerprint: str  # of keys and labels: which picture is which row
    mean: tuple[float, ...] | None = None  # pixel statistics, where the format carries them
    std: tuple[float, ...] | None = None
    numbers: Numbers | None = None  # in torchvision's ImageFolder; None: the row
    rejected: Sequence[tuple[str, str]] = ()  # path and reason of files that are no row
    beside: Mapping[str, tuple[Path, int]] = {}  # files of data/beside.py by name, and their crc32
    decoder: str = "fastrot's own"
    chosen: str | None = None  # where `place` has put the pictures for a GPU: resident, pinned

    def sizes(self, rows: Rows) -> RowSizes:
        """Heights and widths after EXIF orientation."""
        return self._sizes[rows]

    @abstractmethod
    def name(self, row: int) -> str:
        """Where the picture came from."""

    @abstractmethod
    def record(self, row: int) -> Bytes:
        """The bytes of a picture as they are kept. Raises DamagedRecord."""

    @abstractmethod
    def picture(self, row: int) -> Picture:
        """The whole picture, upright. Raises DamagedRecord."""

    @abstractmethod
    def open_reader(self, device: torch.device, workers: int) -> "Reader":
        """What makes crops for this device, with so many threads or processes; 0: the caller's own."""

    def place(self, rows: Numbers | None, device: torch.device) -> None:  # noqa: B027
        """Hear which rows (None: all) a Loader will ask for, and where: before its first epoch."""

    def describe(self) -> list[str]:
        """Lines for the beginning of a run: what decodes, and where the pictures are."""
        return []


class Reader(ABC):
    """Makes the crops of an epoch, batch by batch; whoever opened it closes it."""

    @abstractmethod
    def begin(self, request: CropRequest) -> Pending:
        """Begin a batch, and do not wait for it."""

    def ahead(self, images: int) -> int:
        """How many batches of so many images should be under way beyond the one that is waited for."""
        return 0

    def close(self) -> None:  # noqa: B027
        """End its threads and processes, with what is under way."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The score that a run is known by: on its page and in its last words."""

    title: str = "Accuracy"
    score: str = "accuracy"  # one of those that `Method.score` gives
    chance: float | None = None  # what guessing gives; None: nothing is guessed

    def say(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        return f"{value:.1%}" if self.score == "accuracy" else f"{value:.3g}"


class Method(ABC):
    """A task: what it wants to see, what the network makes of it, what it costs."""

    net: nn.Module  # all that is trained; the one thing that DDP and compile wrap
    headline: Headline = Headline()
    wants_labels: bool = False  # refuses, before the first step, data with a label of -1
    info: DataInfo
    augmented: Callable[..., Any] | None = (
        None  # what changes views' colours: compiled with the net
    )
    heads: tuple[str, ...] = ()  # names of the net's outputs that tell classes, [b, classes] each

    # static: told by the config alone, since data is opened before the method is built
    @staticmethod
    def crops(cfg: Any) -> tuple[Crop, ...]:
        """The crops that it wants in training."""
        return (cfg.crop,)

    @staticmethod
    def owned(cfg: Any) -> bool:
        """Whether each rank learns from rows of its own alone (a sharded bank)."""
        return False

    @staticmethod
    def trunk(cfg: Config) -> str | None:
        """The run whose trained trunk it stands on: its backbone, size, mean and std are that run's. None: its own."""
        return None

    @staticmethod
    def for_inference(cfg: Any) -> Any:
        """The config without what training alone needs: for a net that is asked, not trained."""
        return cfg

    @abstractmethod
    def views(self, batch: Batch) -> Any:
        """Pixels for the net, [v, 3, s, s] or a tuple of such. No gradient. An evaluation's batch has one crop."""

    @abstractmethod
    def losses(self, outputs: Any, batch: Batch) -> Losses:
        """Loss terms and metrics. Writes nothing."""

    @abstractmethod
    def score(self, outputs: Any, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Evaluation: name -> (sum, count), always `loss`, and `accuracy` where there is an answer.

        Never reads the bank.
        """

    @staticmethod
    def predicts_rotation(cfg: Any) -> bool:
        """Whether `rotation_logits` has an answer."""
        return False

    def rotation_logits(self, outputs: Any) -> Tensor | None:
        """What the net says of the four rotations, [4 b, 4] image-major; None: it is not asked."""
        return None

    def set_schedule(self, epochs: int, begins: Callable[[int], int]) -> None:  # noqa: B027
        """Once, before the first step: the run's epochs, and `begins(E)`, that in which the paper's E begins."""

    def before_first_step(self, outputs: Any, batch: Batch) -> None:  # noqa: B027 (a default that does nothing)
        """Once, before the first loss of a run."""

    def after_step(self, outputs: Any, batch: Batch, losses: Losses) -> None:  # noqa: B027
        """After the optimiser's step: the bank's write, if any."""

    def state_dict(self) -> dict[str, Tensor]:
        """What net and optimiser do not hold. Called on all ranks at one step; may gather.

        On a GPU what lies in host memory is given away, and never written to again.
        """
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """What `state_dict` gave."""

    def resume_contract(self) -> dict[str, Any]:
        """What a resumed run must agree with, beyond the config."""
        return {}

    def describe(self) -> list[str]:
        """Lines for the beginning of a run: what people should know of it."""
        return []
