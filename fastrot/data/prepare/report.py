"""What a conversion tells: progress, the summary, the estimate."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastrot import entry
from fastrot.data.files import shown


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a conversion did."""

    out: Path
    manifest: dict[str, Any]
    rejects: list[tuple[str, str]]  # path, reason
    rejected_at: Path  # the file that names them all
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    converted: int = 0  # records of this run
    resumed: int = 0  # records that stood in whole parts of an earlier run
    already: bool = False  # it was finished before

    def lines(self) -> Iterator[str]:
        told = self.manifest
        if self.already:
            yield f"{self.out} is already there, made with the same options: nothing to do"
        cut = f" + {told['beyond_limit']:,} beyond --limit" if told["beyond_limit"] else ""
        yield (
            f"{told['rows']:,} written + {len(self.rejects):,} rejected + {told['skipped']:,} skipped{cut} "
            f"= {told['seen']:,} files seen"
        )
        if self.already:
            return
        yield (
            f"{self.out}: {told['bytes']:,} bytes in {self.seconds:.1f} s, "
            f"{self.converted / self.seconds:,.0f} images/s, "
            f"{self.converted / max(self.cpu_seconds, 1e-9):,.0f} images/s and core"
        )
        if self.resumed:
            yield f"{self.resumed:,} of them stood in whole parts of an earlier run"
        if "parts" in told:
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
def progress_bar(share: int, before: int, rank: int) -> Iterator[Callable[[int], None]]:
    """A bar with images/s and the time left, on standard error: of rank 0's share, where there are ranks."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn
    from rich.progress import TimeRemainingColumn as Remaining

    class Rate(ProgressColumn):
        def render(self, task: Any) -> str:
            rate = (task.completed - before) / (task.finished_time or task.elapsed or 1)
            return f"{rate:,.0f} images/s, left:"  # rich's own leaves out how workers start

    columns = BarColumn(), MofNCompleteColumn(), Rate(), Remaining()
    with Progress(*columns, console=Console(stderr=True), disable=rank > 0) as bar:
        yield partial(bar.advance, bar.add_task("", total=before + share, completed=before))
