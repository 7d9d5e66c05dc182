"""A conversion from its first record to the finished file: the same for all prepared formats.

`convert` reads from the top: open the source, see what an earlier start left, make the missing parts (parts.py,
encode.py), put them together (writer.py). Under torchrun or srun the missing parts are dealt out to the ranks
(ranks.py), each with workers of its own; rank 0 alone decides what is missing, puts the parts together, and
speaks. A rank that dies leaves its part missing, for the next start to make.
"""

import contextlib
import dataclasses
import itertools
import json
import resource
import time
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fastrot.config import RunError, UsageError
from fastrot.data.files import shown
from fastrot.data.prepare import parts as part_files
from fastrot.data.prepare import report
from fastrot.data.prepare.encode import Chunk, EncodedPicture, encode_chunk, spread
from fastrot.data.prepare.options import Options, plan_of
from fastrot.data.prepare.ranks import ALONE, Claim, Ranks, appears, joined_ranks, same_pictures
from fastrot.data.prepare.report import Estimate, Summary
from fastrot.data.prepare.writer import Converted, FormatWriter
from fastrot.data.sources.records import Source

TRIED = 200  # pictures that --estimate converts


def run(options: Options, *, part: int | None = None) -> int:
    """Convert, tell it, and give the exit status, the same on all ranks: 1 with rejects."""
    with joined_ranks() as ranks:
        done = convert(options, ranks, part=part)
    lines = [*done.lines()] if ranks.rank == 0 else []
    rejected = isinstance(done, Summary) and done.rejects and not options.allow_rejects
    if rejected and lines:
        lines.append("status 1, since pictures were rejected: --allow-rejects accepts them")
    print("".join(f"{line}\n" for line in lines), end="")
    return int(bool(rejected))


def convert(
    options: Options, ranks: Ranks = ALONE, *, part: int | None = None
) -> Summary | Estimate:
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
    if options.estimate:
        return ranks.on_rank_0(lambda: estimate(writer, source, workers, ranks.world))

    start, cpu = time.perf_counter(), cpu_seconds()
    with contextlib.ExitStack() as held:
        work = ranks.on_rank_0(
            lambda: _begin(writer, source, plan, part or writer.part, ranks.world, held)
        )
        if work.summary is not None:
            return work.summary
        missing = [work.parts[i] for i in work.missing]
        mine = missing[ranks.rank :: ranks.world]
        share, left = (sum(len(p.records) for p in each) for each in (mine, missing))
        done_before = sum(len(p.records) for p in work.parts) - left
        if work.claim is not None:
            work.claim.await_shared()
        with report.progress_bar(share, done_before, ranks.rank, ranks.world) as tick:
            processes = min(workers, -(-share // part_files.CHUNK))
            part_files.make_parts(
                mine, source, writer.encode_spec, writer.write_part, processes, tick, work.claim
            )
        others = sum(ranks.all_gather(cpu_seconds() - cpu)[1:])

        def finish() -> Summary:
            manifest = writer.write(_whole(writer, source, plan, work))
            return _summary(
                writer,
                manifest,
                converted=left,
                resumed=done_before,
                seconds=time.perf_counter() - start,
                cpu_seconds=others + cpu_seconds() - cpu,
            )

        return ranks.on_rank_0(finish)


class _Work(NamedTuple):
    """What rank 0 found, and decided for all."""

    summary: Summary | None = None  # where nothing is left to do
    parts: list[part_files.Part] = []  # noqa: RUF012 (a tuple's default)
    missing: list[int] = []  # noqa: RUF012
    claim: Claim | None = None  # of several ranks


def _begin(
    writer: FormatWriter,
    source: Source,
    plan: dict[str, Any],
    part: int,
    world: int,
    held: contextlib.ExitStack,
) -> _Work:
    """Look at what is there; unless that is all, hold the folder of parts until `held` is closed."""
    existing = writer.existing(plan, part)
    if existing.manifest is not None:
        return _Work(_summary(writer, existing.manifest, already=True))
    folder, part = existing.folder or writer.parts_folder, existing.part or part
    held.enter_context(
        part_files.parts_folder(
            writer.parts_folder, {**plan, "part": part}, writer.options.overwrite
        )
    )
    count = len(source.records[: writer.options.limit])
    parts = part_files.parts_of(folder, count, writer.suffix, plan, part)
    missing = [i for i, each in enumerate(parts) if not each.whole()]
    claim = Claim.make(folder) if world > 1 and missing else None
    return _Work(None, parts, missing, claim)


def _whole(writer: FormatWriter, source: Source, plan: dict[str, Any], work: _Work) -> Converted:
    """The parts, all of them there, with at least one picture."""
    if not appears(lambda: all(part.whole() for part in work.parts)):
        raise RunError(
            f"{work.parts[0].folder} lacks parts that ranks have made: run the same command again"
        )
    if work.claim is not None:
        work.claim.path.unlink(missing_ok=True)
    converted = Converted.of(source, plan, work.parts)
    if not len(converted.records):
        part_files.remove(writer.parts_folder)
        path, reason = converted.rejects[0]
        raise UsageError(
            f"no picture of {len(converted.rejects):,} could be used; the first, {shown(path)}: {reason}"
        )
    return converted


def _summary(writer: FormatWriter, manifest: dict[str, Any], **how) -> Summary:
    paths, rejects = writer.paths(manifest), []
    if manifest["rejected"]:
        with open(paths.rejects, "rb") as file:
            rejects = [(line["path"], line["reason"]) for line in map(json.loads, file)]
    return Summary(
        out=paths.out,
        parts=paths.parts,
        rejected_at=paths.rejects,
        written=manifest["rows"],
        rejects=rejects,
        skipped=manifest["skipped"],
        beyond_limit=manifest["beyond_limit"],
        seen=manifest["seen"],
        bytes=manifest["bytes"],
        **how,
    )


def estimate(writer: FormatWriter, source: Source, workers: int, world: int) -> Estimate:
    """Convert pictures spread evenly over the records, in memory. `world`: ranks that would share the work."""
    records = len(source.records[: writer.options.limit])
    numbers = sorted({i * records // TRIED for i in range(TRIED)})
    chunks = (Chunk(i, source.part(i, i + 1)) for i in numbers)
    spec = dataclasses.replace(writer.encode_spec, measure_loss=True)
    size = pixels = loss = tried = 0
    seconds = 0.0
    with contextlib.closing(spread(partial(encode_chunk, spec), chunks, workers)) as encoded:
        for picture in itertools.chain.from_iterable(encoded):
            if isinstance(picture, EncodedPicture):
                tried += 1
                size += len(picture.data) + writer.row_bytes
                pixels += picture.height * picture.width
                loss += picture.loss or 0
                seconds += picture.seconds
    if not tried:
        raise UsageError(f"none of {len(numbers)} pictures tried could be decoded: check --root")
    return Estimate(
        pictures=records,
        tried=tried,
        bytes=round(size / tried * records),
        minutes=seconds / tried * records / max(workers, 1) / world / 60,
        psnr=float(10 * np.log10(255**2 * 3 * pixels / loss)) if loss else None,
    )


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
