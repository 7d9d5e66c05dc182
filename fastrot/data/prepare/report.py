"""What a conversion tells: progress, the summary, the estimate."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastrot import entry
from fastrot.data.files import counted, shown, some


@dataclass(frozen=True, kw_only=True)
class _Account:
    """What became of all files."""

    manifest: dict[str, Any]  # or, of a dry run, `Source.account`
    rejects: list[tuple[str, str]]  # path, reason

    def total(self, taken: str) -> str:
        told = self.manifest
        cut = f" + {cut:,} beyond --limit" if (cut := told.get("beyond_limit")) else ""
        left = f"{len(self.rejects):,} rejected + {told['skipped']:,} left out{cut}"
        return f"{taken} + {left} = {counted(told['seen'], 'file')} seen"

    @property
    def wanting(self) -> bool:
        """Whether pictures are missing for a reason that their owner can mend."""
        return bool(self.rejects or self.manifest.get("mendable"))


@dataclass(frozen=True, kw_only=True)
class Summary(_Account):
    """What a conversion did."""

    out: Path
    beside: Callable[[str], Path]  # where rejects.jsonl and skipped.jsonl name them all
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    converted: int = 0  # records of this run
    resumed: int = 0  # records that stood in whole parts of an earlier run
    already: bool = False  # it was finished before

    def lines(self) -> Iterator[str]:
        told = self.manifest
        if self.already:
            yield f"{self.out} is already there, made with the same options: nothing to do"
        yield self.total(f"{told['rows']:,} written")
        yield from listed(told, self.beside("skipped.jsonl"))
        if truncated := told.get("truncated"):
            yield f"{truncated:,} of those written were cut short (--allow-truncated)"
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
        yield from named(self.rejects, f"see {self.beside('rejects.jsonl')}")


@dataclass(frozen=True, kw_only=True)
class DryRun(_Account):
    """What a conversion would find."""

    root: Path
    left_out_at: Path  # the file that names what would be left out

    def lines(self) -> Iterator[str]:
        told = self.manifest
        taken = counted(told["seen"] - len(self.rejects) - told["skipped"], "picture")
        yield self.total(f"{self.root}: {taken}") + "; nothing was converted"
        yield from listed(told, self.left_out_at)
        yield from named(self.rejects, "a conversion names them all")


def listed(account: dict[str, Any], left_out_at: Path) -> Iterator[str]:
    """How a source was read, its classes and what was left out, in words; old manifests do not tell."""
    yield from map(entry.printable, account.get("notes", []))
    counts, names = account.get("class_counts", []), account.get("classes", [])
    each = [f"{name}: {count:,}" for name, count in zip(names, counts, strict=False)]
    if len(each) == 1:
        yield entry.printable(f"1 class for all pictures: {each[0]} (none with --label-from none)")
    elif each:
        smallest = min(range(len(counts)), key=counts.__getitem__)
        few = f"{each[0]}, {each[1]}, ..., {each[-1]}; smallest: {each[smallest]}"
        few = few if len(each) > 4 else ", ".join(each)
        yield entry.printable(f"{len(each):,} classes, pictures in each: {few}")
    yield from map(entry.printable, classes_without(account))
    if account.get("left_out"):
        yield entry.printable(f"{left_out_words(account)}; named in {left_out_at}")


def classes_without(account: dict[str, Any]) -> Iterator[str]:
    """That there are classes of which no picture was taken, if so; --limit leaves many without."""
    if account.get("beyond_limit"):
        return
    counts, names = account.get("class_counts", []), account.get("classes", [])
    if none := [name for name, count in zip(names, counts, strict=False) if not count]:
        yield f"no picture is of {counted(len(none), 'class', 'es')}: {some(none, 5)}"


def left_out_words(account: dict[str, Any]) -> str:
    """How many files were left out, by kind."""
    kinds = [f"{count:,} {kind}" for kind, count in account["left_out"].items()]
    return f"{account['skipped']:,} left out: {some(kinds, 8)}"


def named(rejects: list[tuple[str, str]], rest: str) -> Iterator[str]:
    """The first rejects; `rest`: where to see the others."""
    for path, reason in rejects[:10]:
        yield f"rejected: {entry.printable(shown(path))}: {reason}"
    if len(rejects) > 10:
        yield f"and {len(rejects) - 10:,} more: {rest}"


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
