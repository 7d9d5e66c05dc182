"""A conversion from its first record to the finished file: the same for all prepared formats.

Under torchrun or srun each rank makes a share of the missing parts; rank 0 alone decides what is missing, puts the
parts together, and speaks.
"""

import contextlib
import dataclasses
import itertools
import json
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastrot.config import RunError, UsageError
from fastrot.data.files import shown
from fastrot.data.manifest import side
from fastrot.data.prepare import parts as part_files
from fastrot.data.prepare import report
from fastrot.data.prepare.encode import Chunk, EncodedPicture, Result, encode_all
from fastrot.data.prepare.options import Options, plan_of, same_pictures
from fastrot.data.prepare.parts import CHUNK, Part, PartStats
from fastrot.data.prepare.ranks import ALONE, Ranks, appears, await_shared, joined_ranks, make_claim
from fastrot.data.prepare.report import DryRun, Estimate, Summary
from fastrot.data.prepare.writer import SKIPPED, Converted, FormatWriter, write_left_out
from fastrot.data.sources.records import Source
from fastrot.entry import PreemptionSignal

TRIED = 200  # pictures that --estimate converts


def run(options: Options, *, part: int | None = None) -> int:
    """Convert, tell it, and give the exit status, the same on all ranks: 1 where pictures are missing."""
    again = PreemptionSignal((signal.SIGINT,), "the same command goes on")
    with contextlib.closing(again), joined_ranks() as ranks:
        done = convert(options, ranks, part=part)
    wanting = not isinstance(done, Estimate) and done.wanting and not options.allow_rejects
    if ranks.rank == 0:
        print(*done.lines(), sep="\n")
        if wanting:
            print("status 1, since pictures are missing: mend that, or --allow-rejects accepts it")
    return int(wanting)


def convert(
    options: Options, ranks: Ranks = ALONE, *, part: int | None = None
) -> Summary | DryRun | Estimate:
    """Open the source and write what the options ask for; the ranks share the work.

    `part`: records a part; None: as many as the format has. The result is the same on all ranks.
    """
    options.check()
    writer: FormatWriter = options.writer()
    source = options.open_source()
    plan = plan_of(options, source)
    plans = ranks.all_gather(plan)
    ranks.on_rank_0(lambda: same_pictures(plans, options.root))
    workers = ranks.cores if options.workers is None else options.workers
    if options.dry_run:
        return ranks.on_rank_0(lambda: dry_run(writer, source))
    if options.estimate:
        return ranks.on_rank_0(lambda: estimate(writer, source, workers, ranks.world))

    start, cpu = time.perf_counter(), cpu_seconds()
    with contextlib.ExitStack() as held:
        work = ranks.on_rank_0(
            lambda: _begin(writer, source, plan, part or writer.part, ranks.world, held)
        )
        if isinstance(work, Summary):
            return work
        mine = work.missing[ranks.rank :: ranks.world]
        share, left, records = (
            sum(len(p.records) for p in each) for each in (mine, work.missing, work.parts)
        )
        if work.claim is not None:
            await_shared(work.claim)
        chunks = itertools.chain.from_iterable(part.chunks(source) for part in mine)
        encoded = encode_all(writer.encode_spec, chunks, min(workers, -(-share // CHUNK)))
        bar = report.progress_bar(share, 0 if ranks.world > 1 else records - left, ranks.rank)
        with bar as tick, contextlib.closing(encoded):
            for each in mine:  # workers read ahead over their borders
                each.make(results_of(each, encoded, work.claim, tick), writer.write_part)
        others = sum(ranks.all_gather(cpu_seconds() - cpu)[1:])

        def finish() -> Summary:
            manifest = writer.write(_whole(writer, source, plan, work))
            seconds, used = time.perf_counter() - start, others + cpu_seconds() - cpu
            done = {"converted": left, "resumed": records - left}
            return _summary(writer, manifest, seconds=seconds, cpu_seconds=used, **done)

        return ranks.on_rank_0(finish)


class _Work(NamedTuple):
    """What rank 0 found, and decided for all."""

    parts: list[Part]
    missing: list[Part]
    claim: Path | None  # of several ranks


def _begin(
    writer: FormatWriter, source: Source, plan: dict[str, Any], part: int, world: int, held
) -> Summary | _Work:
    """Look at what is there; unless that is all, hold the folder of parts until `held`, an ExitStack, is closed."""
    existing = writer.existing(plan, part)
    if existing.manifest is not None:
        return _summary(writer, existing.manifest, already=True)
    folder, part = existing.folder or writer.parts_folder, existing.part or part
    begun, overwrite = {**plan, "part": part}, writer.options.overwrite
    held.enter_context(part_files.parts_folder(writer.parts_folder, begun, overwrite))
    count = len(source.records[: writer.options.limit])
    parts = part_files.parts_of(folder, count, writer.suffix, plan, part)
    missing = [each for each in parts if not each.whole()]
    return _Work(parts, missing, make_claim(folder) if world > 1 and missing else None)


def _whole(writer: FormatWriter, source: Source, plan: dict[str, Any], work: _Work) -> Converted:
    """The parts, all of them there, with at least one picture."""
    if not appears(lambda: all(part.whole() for part in work.parts)):
        raise RunError(f"{work.parts[0].file.parent} lacks parts that ranks have made: run again")
    if work.claim is not None:
        work.claim.unlink(missing_ok=True)
    stats = PartStats()
    for part in work.parts:
        stats.add(part.stats())
    converted = Converted(source, plan, work.parts, stats)
    if not len(converted.records):
        part_files.remove(writer.parts_folder)
        path, reason = converted.rejects[0]
        raise UsageError(
            f"no picture of {len(converted.rejects):,} could be used; the first, {shown(path)}: {reason}"
        )
    return converted


def _summary(writer: FormatWriter, manifest: dict[str, Any], **how) -> Summary:
    (out, beside), rejects = writer.paths(manifest), []
    if manifest["rejected"]:
        with open(beside("rejects.jsonl"), "rb") as file:
            rejects = [(line["path"], line["reason"]) for line in map(json.loads, file)]
    told = {**manifest, "numbers": None}  # one a row, which no rank asks for
    return Summary(out=out, manifest=told, rejects=rejects, beside=beside, **how)


def results_of(
    part: Part, encoded: Iterator[list[Result]], claim: Path | None, tick: Callable[[int], None]
) -> Iterator[Result]:
    """The next results, as many as the part has; `tick(n)` hears of n more. With a `claim`, it must stand at the end."""
    for results in itertools.islice(encoded, -(-len(part.records) // CHUNK)):
        tick(len(results))
        yield from results
    if claim is not None and not claim.exists():
        raise RunError(f"another start has taken over {claim.parent}: this one is at its end")


def dry_run(writer: FormatWriter, source: Source) -> DryRun:
    """What would be taken, and what not; the latter is named in a file beside --out."""
    at = side(writer.options.out, f"dry-run.{SKIPPED}")  # that of a finished file stays
    if source.left_out:
        at.parent.mkdir(parents=True, exist_ok=True)
        write_left_out(at, source)
    told = source.account(np.array([record.label for record in source.records], np.int64))
    return DryRun(root=source.root, manifest=told, rejects=source.rejected, left_out_at=at)


def estimate(writer: FormatWriter, source: Source, workers: int, world: int) -> Estimate:
    """Convert pictures spread evenly over the records, in memory. `world`: ranks that would share the work."""
    records = len(source.records[: writer.options.limit])
    numbers = sorted({i * records // TRIED for i in range(TRIED)})
    chunks = (Chunk(i, source.part(i, i + 1)) for i in numbers)
    spec = dataclasses.replace(writer.encode_spec, measure_loss=True)
    with contextlib.closing(encode_all(spec, chunks, workers)) as encoded:
        tried = [
            (len(p.data) + writer.row_bytes, p.height * p.width, p.loss or 0, p.seconds)
            for p in itertools.chain.from_iterable(encoded)
            if isinstance(p, EncodedPicture)
        ]
    if not tried:
        raise UsageError(f"none of {len(numbers)} pictures tried could be decoded: check --root")
    size, pixels, loss, seconds = map(sum, zip(*tried, strict=True))
    return Estimate(
        pictures=records,
        tried=len(tried),
        bytes=round(size / len(tried) * records),
        minutes=seconds / len(tried) * records / max(workers, 1) / world / 60,
        psnr=float(10 * np.log10(255**2 * 3 * pixels / loss)) if loss else None,
    )


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
