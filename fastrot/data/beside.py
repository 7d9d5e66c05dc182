"""What a source laid beside its prepared pictures, by row: `Source.beside`, read again."""

import io
import zlib

import numpy as np

from fastrot.config import UsageError
from fastrot.core import Data


def read_beside(data: Data, name: str) -> dict[str, np.ndarray] | None:
    """The arrays of NAME.npz; None where the source laid none there. Raises UsageError where these are not its own."""
    if f"{name}.npz" not in data.beside:
        return None
    file, crc = data.beside[f"{name}.npz"]
    try:
        content = file.read_bytes()
    except OSError as error:
        told = f"{file} cannot be read ({error.strerror})"
        raise UsageError(f"{told}: copy it too, or prepare the pictures again") from None
    if zlib.crc32(content) != crc:
        told = f"{file} has changed since it was written, or is of other pictures"
        raise UsageError(f"{told}: copy it again, or prepare the pictures again")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)
