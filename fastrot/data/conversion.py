"""A conversion from its first record to the finished file: what all prepared formats share.

A format is a `Form`: how a picture is coded, how a part is written, and how whole parts become what is wanted.
All else is here: what was begun before, the ranks that share the parts, what is known of the whole, the summary.
"""

import contextlib
import json
import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt32

import fastrot
from fastrot.config import RunError, UsageError
from fastrot.data import prepare
from fastrot.data.files import shown
from fastrot.data.keys import order_fingerprint, path_keys
from fastrot.data.manifest import side
from fastrot.data.ranks import ALONE, Ranks, Sign, same_pictures, seen
from fastrot.data.sources.records import Source
from fastrot.disk import sync_folder, write_atomically


class Work(NamedTuple):
    """Whole parts, and what they were made from."""

    source: Source
    plan: dict[str, Any]  # what decides the bytes; see prepare.plan_of
    parts: list[prepare.Part]
    found: "Found"


class Found(NamedTuple):
    """What the parts hold, together."""

    total: prepare.Tally  # statistics alone
    crcs: UInt32[np.ndarray, " n"]  # crc32 of each picture's bytes
    written: Int64[np.ndarray, " n"]  # numbers of records in the source
    rejects: list[tuple[str, str]]  # path, reason; those of the source first


class There(NamedTuple):
    """What an earlier start left."""

    facts: dict[str, Any] | None = None  # of a finished file made from the same plan
    folder: Path | None = None  # of parts to take up again, where they are not at `Form.folder`
    part: int | None = None  # records a part in it


class Form(ABC):
    """A prepared format.

    suffix     of a part's file
    row_bytes  what a picture takes beside its own bytes, for --estimate
    packages   whose versions the manifest names
    """

    suffix: str
    row_bytes: int
    packages: tuple[str, ...] = ("numpy", "simplejpeg")

    def __init__(self, options: prepare.Options):
        self.options = options

    @property
    @abstractmethod
    def recipe(self) -> prepare.Recipe:
        """What is done to every picture; travels to the workers."""

    @property
    def folder(self) -> Path:  # *
        """The folder in which parts are made."""
        return side(self.options.out, "parts")

    @abstractmethod
    def there(self, plan: dict[str, Any], part: int) -> There:
        """What is there already; called with --overwrite too. Raises UsageError for what is not ours to replace."""

    @abstractmethod
    def write_part(self, path: Path, pictures: Iterable[prepare.Encoded], room: int) -> None:
        """A part's file, whole or not at all; `room` records at most."""

    @abstractmethod
    def publish(self, work: Work) -> dict[str, Any]:
        """Make of whole parts what the options ask for; its facts (see `facts_of`), with its `bytes`."""

    @abstractmethod
    def told(self, facts: dict[str, Any]) -> dict[str, Any]:
        """`out`, `rejected_at` and `parts` of the Summary of a finished conversion."""


class FolderForm(Form):
    """A format that is a folder: it gets its name by one rename. One that is replaced is moved aside, and removed last."""

    named: str  # what the folder is, in words

    @property
    def out(self) -> Path:
        """Where it goes: a link stays a link, and what it points to is replaced."""
        return Path(os.path.realpath(self.options.out))

    @property
    def folder(self) -> Path:
        return side(self.out, "parts")

    @abstractmethod
    def ours(self, file: Path) -> bool:
        """Whether a file of the folder belongs to the format."""

    @abstractmethod
    def opened(self) -> dict[str, Any]:
        """The facts of what is there. Raises UsageError where that is not whole."""

    @abstractmethod
    def fill(self, new: Path, work: Work) -> dict[str, Any]:
        """Write all files into a folder; its facts."""

    def there(self, plan: dict[str, Any], part: int) -> There:
        out, ways = self.out, "add --overwrite or choose another --out"
        with contextlib.suppress(OSError):
            out.rmdir()  # where it is empty
        if not out.exists():
            return There()
        if foreign := sorted(file.name for file in out.iterdir() if not self.ours(file)):
            raise UsageError(
                f"{out} is there, and holds {foreign[0]}, which is no file of {self.named}: remove it or "
                "choose another --out"
            )
        if self.options.overwrite:
            return There()
        try:
            facts = self.opened()
        except UsageError as error:
            raise UsageError(f"--out is there, but is not whole ({error}): {ways}") from None
        if differs := prepare.difference(plan, facts["options"]):
            raise UsageError(f"{out} is there, made {differs}: {ways}")
        if self.folder.exists():  # a start was killed at its very end
            whole = {**plan, "part": part}
            with contextlib.suppress(UsageError), prepare.parts_folder(self.folder, whole, False):
                prepare.remove(self.folder)
        return There(facts)

    def publish(self, work: Work) -> dict[str, Any]:
        new, old = self.folder / prepare.NEW, self.folder / f"{prepare.NEW}.old"
        new.mkdir()
        facts = self.fill(new, work)
        # all of it is on the disk: from here on names change, which needs no space
        if self.out.exists():
            os.rename(self.out, old)
        os.rename(new, self.out)
        sync_folder(self.out.parent)
        prepare.remove(self.folder)
        return facts

    def told(self, facts: dict[str, Any]) -> dict[str, Any]:
        rejects = self.out / "rejects.jsonl"
        return {"out": self.options.out, "parts": False, "rejected_at": rejects}


def convert(
    form: Form, ranks: Ranks = ALONE, *, part: int = prepare.PART
) -> prepare.Summary | prepare.Estimate:
    """Open the source and write what the options ask for; the ranks share the work.

    `part`: records a part. The result is the same on all ranks.
    """
    options = form.options
    options.check()
    source = prepare.open_source_of(options)
    plan = prepare.plan_of(options, source)
    plans = ranks.everyones(plan)
    ranks.first(lambda: same_pictures(plans, options.root))
    count = len(source.records[: options.limit])
    workers = ranks.cores if options.workers is None else options.workers
    if options.estimate:
        return ranks.first(
            lambda: prepare.estimate(
                source, count, form.recipe, workers, form.row_bytes, ranks.world
            )
        )

    start, cpu = time.perf_counter(), prepare.cpu_seconds()
    with contextlib.ExitStack() as held:
        begun = ranks.first(lambda: _begin(form, plan, count, part, ranks.world, held))
        if begun.told is not None:
            return begun.told
        parts = prepare.parts_of(begun.folder, count, form.suffix, plan, begun.part)
        missing = [parts[i] for i in begun.missing]
        mine = missing[ranks.rank :: ranks.world]
        share, left = (sum(len(p.records) for p in each) for each in (mine, missing))
        if begun.sign is not None:
            begun.sign.find()
        with prepare.progress_bar(share, count - left, ranks) as tick:
            prepare.make_parts(
                mine,
                source,
                form.recipe,
                form.write_part,
                min(workers, -(-share // prepare.CHUNK)),
                tick,
                begun.sign,
            )
        cpus = ranks.everyones(prepare.cpu_seconds() - cpu)

        def finish() -> prepare.Summary:
            others = sum(cpus) - cpus[0]
            facts = form.publish(_whole(form, source, plan, parts, begun.sign))
            return _summary(
                form,
                facts,
                converted=left,
                resumed=count - left,
                seconds=time.perf_counter() - start,
                cpu_seconds=others + prepare.cpu_seconds() - cpu,
            )

        return ranks.first(finish)


class _Begun(NamedTuple):
    """What rank 0 found, and decided for all."""

    told: prepare.Summary | None  # where nothing is left to do
    folder: Path = Path()  # of the parts
    part: int = 0  # records a part
    missing: list[int] = []  # noqa: RUF012 (a tuple's default)
    sign: Sign | None = None  # of several ranks


def _begin(
    form: Form,
    plan: dict[str, Any],
    count: int,
    part: int,
    world: int,
    held: contextlib.ExitStack,
) -> _Begun:
    """Look at what is there; unless that is all, hold the folder of parts until `held` is closed."""
    there = form.there(plan, part)
    if there.facts is not None:
        return _Begun(_summary(form, there.facts, already=True))
    folder, part = there.folder or form.folder, there.part or part
    held.enter_context(
        prepare.parts_folder(form.folder, {**plan, "part": part}, form.options.overwrite)
    )
    parts = prepare.parts_of(folder, count, form.suffix, plan, part)
    missing = [i for i, p in enumerate(parts) if not p.whole()]
    shared = world > 1 and bool(missing)
    return _Begun(None, folder, part, missing, Sign.put_up(folder) if shared else None)


def _whole(
    form: Form,
    source: Source,
    plan: dict[str, Any],
    parts: list[prepare.Part],
    sign: Sign | None,
) -> Work:
    """The parts, all of them there, with at least one picture."""
    if not seen(lambda: all(part.whole() for part in parts)):
        raise RunError(
            f"{parts[0].folder} lacks parts that ranks have made: run the same command again"
        )
    if sign is not None:
        sign.path.unlink(missing_ok=True)
    found = _gather(parts, source)
    if not len(found.written):
        prepare.remove(form.folder)
        path, reason = found.rejects[0]
        raise UsageError(
            f"no picture of {len(found.rejects):,} could be used; the first, {shown(path)}: {reason}"
        )
    return Work(source, plan, parts, found)


def _gather(parts: list[prepare.Part], source: Source) -> Found:
    total, crcs, written, rejects = prepare.Tally(), [], [], list(source.rejected)
    for tally in (part.tally() for part in parts):
        total.add(tally)
        crcs.append(np.array(tally.crcs, np.uint32))
        written.append(np.array(tally.records, np.int64))
        rejects += [(source.records[i].path, reason) for i, reason in tally.rejects]
    return Found(total, np.concatenate(crcs), np.concatenate(written), rejects)


# ---- what is known of the whole ----


def labels_of(work: Work) -> Int64[np.ndarray, " n"]:
    """The label of each row."""
    return np.array([work.source.records[i].label for i in work.found.written], np.int64)


def keys_of(work: Work) -> np.ndarray:
    """uint64 [n]: the hash of each row's path."""
    written, keys = work.found.written, work.source.keys
    return (
        path_keys([work.source.records[i].path for i in written]) if keys is None else keys[written]
    )


def facts_of(
    name: str, work: Work, body: dict[str, Any], packages: tuple[str, ...]
) -> dict[str, Any]:
    """The manifest of prepared pictures; `body`: what it says of the file or files that hold them."""
    total, _, written, rejects = work.found
    source, limit = work.source, work.plan.get("limit")
    numbers = _numbers(work)
    counted = np.array_equal(numbers, np.arange(len(numbers)))
    mean, std = total.mean_and_std()
    return {
        "format": name,
        "rows": len(written),
        "classes": list(source.classes),
        "mean": mean,  # of red, green, blue, in 0..1, over all pixels before encoding
        "std": std,
        "fingerprint": order_fingerprint(keys_of(work), labels_of(work)),
        "numbers": None if counted else numbers.tolist(),  # torchvision's, where they differ
        **body,
        "max_height": total.largest[0],
        "max_width": total.largest[1],
        "pixels": total.pixels,
        "rejected": len(rejects),
        "skipped": source.skipped,
        "beyond_limit": len(source.records) - len(source.records[:limit]),
        "seen": source.seen,
        "options": work.plan,
        "versions": {
            "python": platform.python_version(),
            "fastrot": fastrot.__version__,
            **{name: version(name) for name in packages},
        },
    }


def write_paths(at: Path, work: Work) -> None:
    """{"path", "number"} of each row, a line each: relative to the source's root; its number there."""
    numbers = _numbers(work)
    rows = zip(work.found.written, numbers, strict=True)
    _write_lines(
        at, ({"path": work.source.records[i].path, "number": int(number)} for i, number in rows)
    )


def write_rejects(at: Path, work: Work) -> None:
    """{"path", "reason"} of each picture left out, a line each, where there are any."""
    if work.found.rejects:
        _write_lines(at, ({"path": path, "reason": why} for path, why in work.found.rejects))


def _numbers(work: Work) -> Int64[np.ndarray, " n"]:
    written = work.found.written
    return written if work.source.numbers is None else work.source.numbers[written]


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_atomically(
        path, lambda file: file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
    )


def _summary(form: Form, facts: dict[str, Any], **how) -> prepare.Summary:
    told, rejects = form.told(facts), []
    if facts["rejected"]:
        with open(told["rejected_at"], "rb") as file:
            rejects = [(line["path"], line["reason"]) for line in map(json.loads, file)]
    return prepare.Summary(
        **told,
        written=facts["rows"],
        rejects=rejects,
        skipped=facts["skipped"],
        beyond_limit=facts["beyond_limit"],
        seen=facts["seen"],
        bytes=facts["bytes"],
        **how,
    )
