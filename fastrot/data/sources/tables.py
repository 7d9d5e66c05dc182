"""Parquet and Arrow files as tables: how many rows each group has, and a group's column, in arrays.

A group is a row group of a parquet file, or a record batch of an Arrow one: a stream, as datasets' `save_to_disk`
writes it, or a file with an index, as Feather is. Both are read from any group on, an Arrow file through a map.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastrot.config import UsageError
from fastrot.data.files import one_line

PARQUET, ARROW = ".parquet", (".arrow", ".feather", ".ipc")
ROWS_AT_ONCE = 16  # as many as a worker is given
_INDEXED, _STREAM = b"ARROW1", b"\xff\xff\xff\xff"  # how an Arrow file begins
_STREAM_END = _STREAM + bytes(4)


class ParquetTable:
    def __init__(self, path: Path):
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        self.schema = self._file.schema_arrow

    def groups(self) -> list[int]:
        """Rows of each group."""
        said = self._file.metadata
        rows = [said.row_group(group).num_rows for group in range(said.num_row_groups)]
        if min(rows, default=0) < 0 or sum(rows) != said.num_rows:
            raise ValueError("its row groups do not add up")
        return rows

    def arrays(self, column: str, groups: range, rows: int = ROWS_AT_ONCE) -> Iterator[Any]:
        """A column of some groups, so many rows at once: so memory does not grow with a group."""
        how = {"row_groups": list(groups), "columns": [column], "use_threads": False}
        batches = self._file.iter_batches(rows, **how)
        return (batch.column(batch.schema.names.index(column)) for batch in batches)


class ArrowTable:
    def __init__(self, path: Path, indexed: bool):
        self._path, self._indexed = path, indexed
        if not indexed:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - len(_STREAM_END)))
                if file.read() != _STREAM_END:
                    raise ValueError("its stream has no end")
        with self._opened() as reader:
            self.schema = reader.schema

    def groups(self) -> list[int]:
        """Rows of each group."""
        plain = [i for i, field in enumerate(self.schema) if "binary" not in str(field.type)]
        return [batch.num_rows for batch in self._batches(0, (plain or [0])[0])]

    def arrays(self, column: str, groups: range, rows: int = ROWS_AT_ONCE) -> Iterator[Any]:
        """A column of some groups, group by group: it stays where it is mapped."""
        batches = self._batches(groups.start, self.schema.names.index(column))
        for batch in itertools.islice(batches, len(groups)):
            array = batch.column(0)
            array.validate(full=True)  # else damaged offsets lead out of the file
            yield array

    def _batches(self, first: int, field: int) -> Iterator[Any]:
        """One field of the batches from a certain one on; the others are not decompressed."""
        with self._opened([field]) as reader:
            if self._indexed:
                yield from map(reader.get_batch, range(first, reader.num_record_batches))
            else:
                yield from itertools.islice(reader, first, None)

    def _opened(self, fields: list[int] | None = None) -> Any:
        from pyarrow import ipc, memory_map

        how = ipc.open_file if self._indexed else ipc.open_stream
        return how(memory_map(str(self._path)), options=ipc.IpcReadOptions(included_fields=fields))


Table = ParquetTable | ArrowTable


def opened(path: Path) -> Table:
    """A table. Raises UsageError where a file is none, or damaged."""
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as e:
        if e.name != "pyarrow":
            raise  # it is installed, but something inside it is broken: show that instead
        raise UsageError("--source parquet needs pyarrow: pip install 'fastrot[parquet]'") from None
    with reading(path):
        with open(path, "rb") as file:
            head = file.read(8)
        indexed = head.startswith(_INDEXED)
        if indexed or head.startswith(_STREAM):
            return ArrowTable(path, indexed)
        return ParquetTable(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is raised of a file's bytes, nearly every type there is, becomes a UsageError."""
    try:
        yield
    except Exception as e:
        if of_the_machine(e) and not isinstance(e, MemoryError):  # damaged sizes want it all
            raise
        with open(path, "rb") as file:
            if file.read(32).startswith(b"version https://git-lfs"):
                told = f"{path} is a Git LFS pointer, not the file: git lfs pull fetches it"
                raise UsageError(told) from None
        if lacks_codec(e):
            told = f"{path} wants another build of pyarrow than is installed ({one_line(e)})"
            raise UsageError(told) from None
        told = f"{path} is no parquet or Arrow file, or cut short ({one_line(e)}): fetch it anew"
        raise UsageError(told) from None


def of_the_machine(error: Exception) -> bool:
    """Whether a failed call or full memory is to blame; else what was read is."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) is not None


def lacks_codec(error: Exception) -> bool:
    """Whether the file may be whole, but was compressed by what this pyarrow was built without."""
    return isinstance(error, NotImplementedError) and "codec" in str(error).lower()
