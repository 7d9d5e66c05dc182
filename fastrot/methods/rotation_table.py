"""Rotation probabilities of every picture of a data set, as a file: what PU weights are made of.

Two formats. `.npz` holds plain arrays: `probabilities` float32 [rows, 4, 4] by (picture, rotation that it was shown,
rotation that the net says), `fold` int8 [rows], `fingerprint` of the data. `.dat` and `.txt` hold the text of the
original code, one number a line: line 4 i + r is the probability that picture i, rotated r times, is upright.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, Float32, Int8

from fastrot.config import UsageError
from fastrot.disk import write_atomically

SUFFIXES = (".npz", ".dat", ".txt")
ROTATIONS = 4
WRITTEN_BY = "fastrot evaluate RUN rotation --table FILE"
_ZIP = b"PK\x03\x04"  # the first bytes of an .npz
_NAME_ONE = f"name one that {WRITTEN_BY} wrote, or a prob.dat of one probability a line"
_ANEW = f": write it from this data, by {WRITTEN_BY}"


@dataclass(frozen=True)
class RotationTable:
    """What a net says of the four rotations of each picture."""

    # by (picture, rotation that it was shown, rotation that the net says); of the last a text holds only rotation 0
    probabilities: Float32[np.ndarray, "rows 4 k"]
    fold: Int8[np.ndarray, " rows"]  # whose net said it; -1: there were no folds
    fingerprint: str | None  # of the data; None: a text holds none

    @property
    def upright(self) -> Float32[np.ndarray, "rows 4"]:
        """The probability that copy r of a picture is in default orientation."""
        return self.probabilities[:, :, 0]

    @property
    def digest(self) -> str:
        """Of what weights are made from: the same in both formats."""
        upright = np.ascontiguousarray(self.upright)
        return hashlib.blake2b(upright.tobytes(), digest_size=16).hexdigest()


def pu_weights(upright: Float[np.ndarray, "rows 4"], gamma: float) -> Float[np.ndarray, "rows 4"]:
    """1 for the picture as it is, 1 - p ** gamma for a rotated copy: one that looks upright may be a wrong label."""
    weights = 1 - upright**gamma
    weights[:, 0] = 1
    return weights


# ---- writing ----


def write(path: str | Path, table: RotationTable) -> None:
    """An .npz, or by its name the original's text, which holds `upright` alone. Appears whole or not at all."""

    def fill(file: BinaryIO) -> None:
        if Path(path).suffix == ".npz":
            name = np.array(table.fingerprint or "")
            np.savez(file, probabilities=table.probabilities, fold=table.fold, fingerprint=name)
        else:
            for each in table.upright:  # nine digits give a float32 back exactly
                file.write(b"%.9g\n%.9g\n%.9g\n%.9g\n" % tuple(each.tolist()))

    write_atomically(path, fill)


def check_name(path: str | Path, knob: str) -> None:
    """Refuse a file that could not be written, before anything is computed for it."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{knob} {path} wants a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"{knob} {path} cannot be written: name a file in a folder that exists")


# ---- reading ----


def read(path: str | Path, *, rows: int, fingerprint: str) -> RotationTable:
    """The table of a data set of so many rows, in either format. Nothing in it is ever unpickled.

    Raises UsageError for a file that is not there, is no table, is another data set's, or holds what is no probability.
    """
    name = f"--method.pu-table {path}"
    if not Path(path).is_file():
        raise UsageError(f"{name} is no file: {_NAME_ONE}")
    with open(path, "rb") as file:
        start = file.read(4096)
    if start.startswith(_ZIP):
        table = _read_npz(Path(path), name)
    elif len(start) == 4096 and b"\n" not in start:
        raise _no_table(name)
    else:
        table = _read_text(Path(path), rows, name)
    if len(table.fold) != rows:
        held = len(table.fold)
        raise UsageError(f"{name} holds {held:,} pictures, but the data has {rows:,}{_ANEW}")
    if table.fingerprint not in (None, fingerprint):
        which = f"fingerprint {table.fingerprint}, now {fingerprint}"
        raise UsageError(f"{name} was written from other data ({which}){_ANEW}")
    return table


def _no_table(name: str) -> UsageError:
    return UsageError(f"{name} is no table of rotations: {_NAME_ONE}")


def _read_npz(path: Path, name: str) -> RotationTable:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("probabilities", "fold", "fingerprint")}
    except Exception as error:  # damaged bytes make zipfile and numpy raise nearly every type
        if isinstance(error, MemoryError):
            raise  # says nothing of the file
        raise _no_table(name) from error
    probabilities, fold, fingerprint = arrays.values()
    kinds = probabilities.dtype, fold.dtype, fingerprint.dtype.kind
    shapes = probabilities.shape, fold.shape, fingerprint.shape
    right = (fold.size, ROTATIONS, ROTATIONS), (fold.size,), ()
    if kinds != (np.float32, np.int8, "U") or shapes != right:
        raise _no_table(name)
    bad = np.flatnonzero(~_shares(probabilities).all(axis=(1, 2)))
    if len(bad):
        row = probabilities[bad[0]]
        raise _no_share(name, f"row {bad[0]}", row[~_shares(row)][0])
    return RotationTable(probabilities, fold, str(fingerprint) or None)


def _read_text(path: Path, rows: int, name: str) -> RotationTable:
    with open(path, "rb") as file:
        upright = np.fromiter(_numbers(file, name), np.float32)
    if len(upright) != rows * ROTATIONS:
        asked = f"the data's {rows:,} pictures want {rows * ROTATIONS:,}, four each"
        raise UsageError(f"{name} has {len(upright):,} lines, but {asked}{_ANEW}")
    return RotationTable(upright.reshape(rows, ROTATIONS, 1), np.full(rows, -1, np.int8), None)


def _numbers(file: BinaryIO, name: str) -> Iterator[float]:
    """The numbers of a text, line by line."""
    for line, text in enumerate(file, 1):
        try:
            number = float(text)
        except ValueError:
            shown = text[:40].decode("ascii", "backslashreplace").strip()
            told = f"{name}: line {line} is no number ({shown!r}); {_NAME_ONE}"
            raise UsageError(told) from None
        if not 0 <= number <= 1:
            raise _no_share(name, f"line {line}", number)
        yield number


def _shares(numbers: np.ndarray) -> np.ndarray:
    return (numbers >= 0) & (numbers <= 1)  # both are false of NaN


def _no_share(name: str, where: str, value: Any) -> UsageError:
    return UsageError(f"{name}: {where} holds {value:g}, and a probability is from 0 to 1{_ANEW}")
