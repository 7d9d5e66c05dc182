"""What a conversion tells: progress, the summary, the estimate."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastrot import entry
from fastrot.data.files import shown


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a conversion did."""

    out: Path
    written: int
    rejects: list[tuple[str, str]]  # path, reason
    skipped: int
    beyond_limit: int  # records left out by --limit
    seen: int
    bytes: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    converted: int = 0  # records of this run
    resumed: int = 0  # records that stood in whole parts of an earlier run
    already: bool = False  # it was finished before
    parts: bool = False  # --out is a folder of parts
    rejected_at: Path  # the file that names all rejects

    def lines(self) -> Iterator[str]:
        if self.already:
            yield f"{self.out} is already there, made with the same options: nothing to do"
        cut = f" + {self.beyond_limit:,} beyond --limit" if self.beyond_limit else ""
        yield (
            f"{self.written:,} written + {len(self.rejects):,} rejected + {self.skipped:,} skipped{cut} "
            f"= {self.seen:,} files seen"
        )
        if self.already:
            return
        yield (
            f"{self.out}: {self.bytes:,} bytes in {self.seconds:.1f} s, "
            f"{self.converted / self.seconds:,.0f} images/s, "
            f"{self.converted / max(self.cpu_seconds, 1e-9):,.0f} images/s and core"
        )
        if self.resumed:
            yield f"{self.resumed:,} of them stood in whole parts of an earlier run"
        if self.parts:
            yield f"{self.out} is a folder of parts that is read as one file: --data {self.out}"
        for path, reason in self.rejects[:10]:
            yield f"rejected: {entry.printable(shown(path))}: {reason}"
        if len(self.rejects) > 10:
            yield f"and {len(self.rejects) - 10:,} more: see {self.rejected_at}"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a conversion would give and cost."""

    pictures: int
    tried: int
    bytes: int
    minutes: float
    psnr: float | None  # dB over all pixels tried; None: exact

    def lines(self) -> Iterator[str]:
        quality = "exact" if self.psnr is None else f"PSNR {self.psnr:.1f} dB"
        yield (
            f"estimate from {self.tried:,} pictures for {self.pictures:,}: {self.bytes:,} bytes, "
            f"{self.minutes:.2f} minutes, {quality}; nothing was written"
        )


@contextlib.contextmanager
def progress_bar(share: int, before: int, rank: int, world: int) -> Iterator[Callable[[int], None]]:
    """A bar with images/s and the time left, on standard error: of rank 0's share, where there are ranks."""
    if rank:
        yield lambda images: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    rate = TextColumn("{task.fields[rate]} images/s, left:")
    columns = BarColumn(), MofNCompleteColumn(), rate, Remaining()
    start, done = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        before = before if world == 1 else 0
        task = bar.add_task("", total=before + share, completed=before, rate="-")

        def tick(images: int) -> None:
            nonlocal done
            done += images
            rate = done / (time.perf_counter() - start + 1e-9)
            bar.update(task, advance=images, rate=f"{rate:,.0f}")

        yield tick
