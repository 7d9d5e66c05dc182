"""CIFAR-10 as its authors hand it out: Python batches, read without running what is in them."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from fastrot.config import UsageError
from fastrot.data.sources.records import InMemory, Listing, Record, Source, not_empty

CIFAR_SPLITS = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


@dataclass(kw_only=True)
class Cifar10(Source):
    """The official Python batches. Pixels are read when a process first wants them, and never pickled."""

    _pixels: dict[str, UInt8[np.ndarray, "n 32 32 3"]] = field(default_factory=dict, repr=False)

    def read(self, i: int) -> UInt8[np.ndarray, "h w 3"]:
        batch, place = self.records[i].path.split("/")
        if batch not in self._pixels:
            self._pixels[batch], _ = _cifar_batch(self.root / batch)
        return np.ascontiguousarray(self._pixels[batch][int(place)])

    def part(self, first: int, stop: int) -> InMemory:
        """With their pixels: workers would each read whole batches."""
        pixels = [self.read(i) for i in range(first, stop)]
        records = self.records[first:stop]
        return InMemory(root=self.root, records=records, classes=(), seen=0, pictures=pixels)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": {}}


def cifar10(root: Path, how: Listing) -> Source:
    """CIFAR-10 as its authors hand it out: splits train (also where none is named) and test."""
    inner = root / "cifar-10-batches-py"
    root = inner if inner.is_dir() else root
    names = CIFAR_SPLITS.get(how.split or "train")
    if names is None:
        raise UsageError(f"--split {how.split} is none of CIFAR-10's: {', '.join(CIFAR_SPLITS)}")
    classes = CIFAR_CLASSES if how.labelled else ()
    source = Cifar10(root=root, records=[], classes=classes, seen=0)
    for name in names:
        if not (root / name).is_file():
            raise UsageError(f"{root} has no {name}: give the folder cifar-10-batches-py, unpacked")
        source._pixels[name], labels = _cifar_batch(root / name)
        for place, label in enumerate(labels):
            source.records.append(Record(f"{name}/{place:05d}", label if how.labelled else -1))
    source.seen = len(source.records)
    return not_empty(source, root)


def _cifar_batch(path: Path) -> tuple[UInt8[np.ndarray, "n 32 32 3"], list[int]]:
    """Pixels and labels of a batch."""
    with open(path, "rb") as file:
        try:
            batch = _CifarUnpickler(file, encoding="bytes").load()
            pixels, labels = batch[b"data"].pixels(), batch[b"labels"]
            fits = pixels.ndim == 2 and pixels.shape[1] == 3072 and len(labels) == len(pixels)
            known = all(type(label) is int and 0 <= label < 10 for label in labels)
        except Exception as e:  # a damaged pickle raises nearly every type there is
            said = f"it has no {e}" if isinstance(e, KeyError) else " ".join(str(e).split())[:120]
            raise UsageError(
                f"{path} is no CIFAR-10 batch ({said or type(e).__name__}): unpack it anew"
            ) from e
    if not fits or not known:
        raise UsageError(
            f"{path} is no CIFAR-10 batch: it holds pixels {list(pixels.shape)} and {len(labels)} labels "
            "instead of n x 3072 and n labels from 0 to 9; unpack it anew"
        )
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _CifarUnpickler(pickle._Unpickler):
    """Admits the four names that the official batches hold, and runs none of them: stand-ins take their place.

    In Python, for 40 ms a batch: the one in C makes a table as long as a pickle of nine bytes asks for.
    """

    def find_class(self, module: str, name: str):
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which is not allowed")
        return _ADMITTED[module, name]


class _Array:
    """What a pickle says of a numpy array."""

    state: tuple

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        self.state = state

    def pixels(self) -> UInt8[np.ndarray, "..."]:
        _version, shape, dtype, by_columns, data = self.state
        if dtype.name not in (b"u1", "u1"):
            raise ValueError(f"its data is of type {dtype.name!r}, not u1")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Type:
    """What a pickle says of a numpy dtype."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, _):
        pass


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in Python 2's pickles."""
    return text.encode("latin1")


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,
}
