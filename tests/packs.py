"""A pack of pictures in memory."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastrot.data.pack import write
from fastrot.data.pack.layout import Encoding
from fastrot.data.prepare.encode import Chunk, EncodeSpec, encode_chunk
from fastrot.data.prepare.parts import PartStats
from fastrot.data.prepare.writer import Converted
from fastrot.data.sources.records import InMemory, Record


def write_pack(
    path: str | Path,
    pictures: Sequence[np.ndarray],
    labels: Sequence[int] | np.ndarray | None = None,
    *,
    encoding: Encoding = "ycc",
    paths: Sequence[str] | None = None,
    classes: Sequence[str] = (),
) -> Path:
    """A pack of pictures in memory, as a conversion writes it. It replaces what stands there.

    `labels`: None: -1 each. `paths`: the rows' names, from which their keys are made.
    """
    path = Path(path)
    names = [f"{row:08d}" for row in range(len(pictures))] if paths is None else paths
    known = [-1] * len(pictures) if labels is None else labels
    records = [Record(name, int(label)) for name, label in zip(names, known, strict=True)]
    source = InMemory(root=path, records=records, classes=tuple(classes), pictures=pictures)
    stats = PartStats()
    coded = [*stats.kept(encode_chunk(EncodeSpec(write.Coder(encoding)), Chunk(0, source)))]
    assert len(coded) == len(records)
    converted = Converted.of(source, {"encoding": encoding}, [], [stats])
    sizes = np.array([(picture.height, picture.width) for picture in coded], np.int32)
    new = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    body = (picture.data[write.HEAD.itemsize :] for picture in coded)
    write.write_folder(new, encoding, converted, sizes, body)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(new, path)
    return path
