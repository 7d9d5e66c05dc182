"""What data, machine and net can do, in a few seconds: each stage of training timed alone, then all of them together.

    read      the bytes of pictures, by as many threads as there are workers: the first time, and then again
    decode    crops of pictures that were just read, by one worker and by all of them
    formats   the same pictures shrunk and written as a .beton and a .pack, decoded by one worker
    step      training steps on one held batch of random pixels
    copy      a batch to the GPU
    together  training steps on the data itself, as a run takes them

A stage has a share of the seconds and ends with what it has done by then. On a CPU steps may be of fewer pictures
than a run's, so that some fit in: those of two batches then make a line, seconds over pictures, on which the run's lies.
"""

import contextlib
import dataclasses
import mmap
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int32, Int64

from fastrot import assemble
from fastrot.config import Config
from fastrot.core import DTYPES, Batch, DamagedRecord, Data, Pending, View
from fastrot.data.loader import Loader
from fastrot.data.pack import layout
from fastrot.speed import bounds, cost
from fastrot.speed.bounds import wait_for
from fastrot.training.loop import train_step
from fastrot.training.optim import LRSchedule
from fastrot.training.state import TrainState, build

SHARES = {  # of the seconds; what is left is for all together
    **{"read": 0.08, "decode_one": 0.08, "decode_all": 0.15, "formats": 0.14},
    **{"ceilings": 0.02, "step": 0.2, "copy": 0.02, "val": 0.1},
}
LEAST = 0.1  # of the seconds, for all together, whatever the stages before took
LATE = 0.3  # of the seconds: a stage that would take so much more than there is left is not begun
SAMPLE = 4096  # pictures that are read, at most
TRIED = 64  # pictures that are written in other formats, at most
FEW = 2  # pictures of the first step on a CPU: batch norm wants two
ROUNDS = 8  # batches of a worker that a stage should have time for
MORE = 16  # pictures of the second one, at least
TIMES = 3  # steps that a stage should have time for
SLOWER = 3  # times what the ceilings allow: so long a step may take, when its batch is chosen
QUIET = 1e-6  # learning rate: weights stay finite on random pixels, and a step costs the same
NOISE = 0.02  # share of a decoder's time below which what is not reading cannot be told from noise

T = TypeVar("T")
Told = Callable[[str, float], None]  # the stage that goes on, and the seconds so far


@dataclass(frozen=True, kw_only=True)
class FormatTrial:
    """The pictures as another format would hold them."""

    bytes: float  # a picture
    decode_one: float  # images/s of one worker
    convert: float  # seconds of one core a picture


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured. LRSchedule are images/s; None: there is no such stage, or it was not measured."""

    images: int  # of the data
    workers: int  # threads or processes that decode; 0: the one that trains
    batch: int  # pictures of a run's step, which the figures of a step are of
    opened: float  # seconds to make a loader of the data, and on a GPU to place it there
    bytes: float | None  # a picture, as the data holds it; None: it is made, not read
    from_disk: float | None  # share of the bytes read; None: the system does not tell
    read: float | None  # by all workers, the first time
    reread: float | None  # the same pictures again
    decode_one: float  # crops by one worker, of pictures just read, reading them again included
    decode_all: float  # the same by all workers
    decoding: float  # the same, without what reading again takes of it
    loading: float  # by all workers, who read each picture for the first time and decode it
    copy: float | None  # to the GPU
    step: float  # on a held batch
    step_batch: int  # pictures of the step that was timed; where these are fewer, a line through two batches
    together: float  # on the data
    together_batch: int  # pictures of the steps that were timed there
    steps: (
        int  # that were timed there; 0: it would have taken too long, and follows from the others
    )
    val_seconds: float | None  # of a validation pass
    short: int  # pixels that a converted picture's short side has at most
    median_short: int  # pixels, of the data's pictures
    pack_bytes: int  # of the whole data as a .pack of that short side
    forms: dict[str, FormatTrial]
    damaged: tuple[str, ...]  # pictures that could not be read, a sentence each
    ceilings: bounds.Ceilings
    measured: bounds.Measured
    seconds: float  # that all of this took

    @property
    def bound(self) -> str:
        """The stage that all others wait for: one of `bounds.Bound`, or read."""
        kind = bounds.bound(self.measured)
        reads = kind == "decode" and self.read is not None and self.read < self.decoding
        return "read" if reads else kind


class TimeBudget:
    """The time that there is, and whoever wants to hear how it goes."""

    def __init__(self, seconds: float, told: Told = lambda stage, so_far: None):
        self.seconds, self._told = seconds, told
        self._begun, self._stage = time.perf_counter(), ""
        self._until = self._begun

    def begin(self, stage: str, share: float | None = None) -> float:
        """A stage, with its share of the seconds (None: what is left, LEAST at least); how many these are."""
        now = time.perf_counter()
        left = max(self._begun + self.seconds - now, LEAST * self.seconds)
        own = left if share is None else share * self.seconds
        self._stage, self._until = stage, now + own
        self.goes_on()
        return own

    def goes_on(self) -> bool:
        """Whether the stage has time left."""
        now = time.perf_counter()
        self._told(self._stage, now - self._begun)
        return now < self._until

    @property
    def so_far(self) -> float:
        """Seconds since it began, without those that are not counted."""
        return time.perf_counter() - self._begun

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens in here is not counted."""
        begun = time.perf_counter()
        yield
        self._begun += time.perf_counter() - begun


def examine(
    cfg: Config,
    data: Data,
    device: torch.device,
    *,
    workers: int,
    budget: TimeBudget,
    val: Data | None = None,
) -> Measurements:
    """Time every stage. `cfg`: resolved, its precision chosen. Raises UsageError for data that cannot train it.

    Placing the data, building and compiling the net are not counted in the budget's seconds.
    """
    budget.begin("opening")
    begun = time.perf_counter()
    with budget.stopped():
        loader = _opened(cfg, data, device, workers, cfg.batch)
    opened = time.perf_counter() - begun
    looked = _loading(loader, workers, budget)
    budget.begin("building the net")
    with budget.stopped():  # torch imports its compiler with the first optimiser
        state = _state(cfg, loader, device)
    budget.begin("ceilings")
    ceilings = bounds.ceilings(device, state.dtype, SHARES["ceilings"] * budget.seconds)
    steps = _step(state, data, cfg, ceilings, budget)
    copy = _copy(steps.held, device, budget)
    fit = len(steps.held.index)
    judged = None if val is None else _validation(cfg, val, state, fit, workers, budget)
    load = 1 / looked["loading"]
    seconds = budget.begin("all together")
    fit = min(fit, _in_time(cfg.batch, seconds, load * max(1, workers)))
    loader = _opened(cfg, data, device, workers, fit)
    lead = 2 if steps.seconds(fit) < seconds / TIMES / 2 else 1
    if (lead + 1) * steps.seconds(fit) < seconds + LATE * budget.seconds:
        together = _together(state, loader, lead, budget)
    else:
        together = _foretold(steps.seconds(fit), load * fit)
    if looked["read"] is None:  # pictures that are made: that is calls, as a step's own
        load = 0.0
    scale = cfg.batch / len(steps.held.index)
    arithmetic, memory = (scale * floor for floor in _floors(state, steps.held, ceilings))
    floors = (arithmetic, memory + _descent(state, ceilings))
    whole = (fit, cfg.batch, steps, load, copy, floors, device)
    measured = _measured(together, *whole)
    sizes = data.sizes(np.arange(data.rows))
    looked["damaged"] = tuple(sorted(looked["damaged"] | loader.skipped))
    return Measurements(
        images=data.rows,
        workers=workers,
        batch=cfg.batch,
        opened=opened,
        **looked,
        copy=None if copy is None else 1 / copy,
        step=cfg.batch / steps.seconds(cfg.batch),
        step_batch=len(steps.held.index),
        together=cfg.batch / measured.step,
        together_batch=fit,
        steps=together.steps,
        val_seconds=judged,
        median_short=int(np.median(sizes.min(axis=1))),
        pack_bytes=pack_bytes(data, sizes, looked["short"]),
        ceilings=ceilings,
        measured=measured,
        seconds=budget.so_far,
    )


def _loading(loader: Loader, workers: int, budget: TimeBudget) -> dict[str, Any]:
    """What Measurements knows of loading, by its names: pictures read, decoded, and tried in other formats."""
    data, draw = loader.data, np.random.default_rng(loader.seed)
    rows = draw.choice(data.rows, min(data.rows, SAMPLE), replace=False).astype(np.int64)
    reading = _read(data, rows, workers, budget)
    one, every = _decoding(loader, reading.rows, workers, budget)
    short = short_side(loader.view)
    forms = _formats(data, reading.rows, short, loader.view, budget)
    decoding = decoding_alone(every, reading.reread)
    read = 0 if reading.read is None else 1 / reading.read
    return {
        "bytes": reading.bytes,
        "from_disk": reading.from_disk,
        "read": reading.read,
        "reread": reading.reread,
        "decode_one": one,
        "decode_all": every,
        "decoding": decoding,
        "loading": 1 / (1 / decoding + read),
        "short": short,
        "forms": forms,
        "damaged": reading.damaged,
    }


def _opened(
    cfg: Config,
    data: Data,
    device: torch.device,
    workers: int,
    batch: int,
    *,
    view: View | None = None,
) -> Loader:
    return assemble.open_loader(
        data,
        assemble.training_view(cfg) if view is None else view,
        batch=batch,
        seed=cfg.seed,
        device=device,
        workers=workers,
        enlarge=cfg.enlarge,
        on_bad_record="skip",  # they are told at the end
    )


def _in_time(most: int, seconds: float, each: float) -> int:
    """Pictures of a batch, so that a worker who takes `each` seconds a picture makes ROUNDS of them in time."""
    return min(most, max(FEW, int(seconds / ROUNDS / each)))


@contextlib.contextmanager
def _closed(each: Iterator[T]) -> Iterator[Iterator[T]]:
    """A generator that ends early, with the workers behind it."""
    try:
        yield each
    finally:
        getattr(each, "close", lambda: None)()


# ---- reading ----


@dataclass(frozen=True)
class _Reading:
    rows: Int64[np.ndarray, " n"]  # those that were read
    damaged: set[str]
    bytes: float | None = None  # a picture
    from_disk: float | None = None
    read: float | None = None  # images/s
    reread: float | None = None


def _read(data: Any, rows: Int64[np.ndarray, " n"], workers: int, budget: TimeBudget) -> _Reading:
    """Read what time allows of these rows, and then the same again."""
    budget.begin("reading", SHARES["read"])
    if data.format == "synthetic":
        return _Reading(rows, set())
    before, damaged = _bytes_from_disk(), set[str]()
    done, seconds, size = _touched(data, rows, workers, budget, damaged)
    after = _bytes_from_disk()
    budget.begin("reading again", SHARES["read"] / 2)
    again, less, _ = _touched(data, rows[:done], workers, budget, set())
    share = None if before is None or after is None else min(1.0, (after - before) / max(size, 1))
    return _Reading(
        rows[:done], damaged, size / done, share, read=done / seconds, reread=again / less
    )


def _touched(
    data: Any, rows: Int64[np.ndarray, " n"], workers: int, budget: TimeBudget, damaged: set[str]
) -> tuple[int, float, int]:
    """Read rows until the stage ends: how many, in how many seconds, how many bytes."""

    def touch(some: Int64[np.ndarray, " s"]) -> int:
        size = 0
        for row in some.tolist():
            try:
                record = data.record(row)
                record[:: mmap.PAGESIZE].max()  # a mapped page is read when it is looked at
                size += record.nbytes
            except DamagedRecord as error:
                damaged.add(str(error))
        return size

    begun = time.perf_counter()
    size, done = touch(rows[:1]), 1
    # a millisecond's work for a thread: hand-offs would cost more than reading what is in memory
    task = min(64, max(1, int(1e-3 / (time.perf_counter() - begun))))
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        wave = task * max(workers, 1) * 4
        while done < len(rows) and budget.goes_on():
            some = rows[done : done + (wave if task > 1 else max(workers, 1))]
            size += sum(pool.map(touch, (some[at : at + task] for at in range(0, len(some), task))))
            done += len(some)
    return done, time.perf_counter() - begun, size


def _bytes_from_disk() -> int | None:
    """What this process has had fetched from disks and networks so far, read-ahead included; Linux alone tells."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["read_bytes"])
    return None


# ---- decoding ----


def decoding_alone(every: float, reread: float | None) -> float:
    """images/s, without what reading again takes of it."""
    if reread is None:
        return every
    return 1 / max(1 / every - 1 / reread, NOISE / every)


def _decoding(
    loader: Loader, rows: Int64[np.ndarray, " n"], workers: int, budget: TimeBudget
) -> tuple[float, float]:
    """images/s of one worker and of all, of pictures that were just read."""
    seconds = budget.begin("decoding, one worker", SHARES["decode_one"])
    begun = time.perf_counter()
    _rate(loader, rows, FEW, 0, budget, most=2)
    each = (time.perf_counter() - begun) / (3 * FEW)
    one = _rate(loader, rows, _in_time(loader.batch, seconds, each), 0, budget)
    if not workers:
        return one, one
    name = f"decoding, {workers} worker{'s'[: workers > 1]}"
    seconds = budget.begin(name, SHARES["decode_all"])
    return one, _rate(loader, rows, _in_time(loader.batch, seconds, 1 / one), workers, budget)


def _rate(
    loader: Loader,
    rows: Int64[np.ndarray, " n"],
    batch: int,
    workers: int,
    budget: TimeBudget,
    most: int | None = None,
) -> float:
    """images/s of the data alone, on the device that the loader is for, rows again and again until the stage ends.

    The first batch of each worker is not counted: they begin, and hand out what they have together.
    """
    at, lead, done, begun = np.arange(batch), max(1, workers), 0, 0.0
    pending = deque[Pending]()
    with contextlib.closing(loader.data.open_reader(loader.device, workers)) as reader:
        while True:
            while len(pending) <= reader.ahead(batch):
                pending.append(reader.begin(loader.request(rows[at % len(rows)], 0)))
                at += batch
            pending.popleft().result()
            done += 1
            if done == lead:
                wait_for(loader.device)
                begun = time.perf_counter()
            elif done > lead and (done - lead == most or not budget.goes_on()):
                break
        wait_for(loader.device)
        return batch * (done - lead) / (time.perf_counter() - begun)


# ---- other formats ----


def short_side(view: View) -> int:
    """Pixels of the short side that a prepared picture should have for crops of this size: 256 for 224."""
    return round(max(crop.size for crop in view.crops) * 256 / 224)


def pack_bytes(data: Any, sizes: Int32[np.ndarray, "n 2"], short: int) -> int:
    """Bytes of the data as a .pack (ycc) of that short side; of a .pack what it has."""
    if data.format == "pack":
        return data.file.tiles.nbytes
    least = sizes.min(axis=1, keepdims=True).astype(np.int64)
    shrunk = np.where(least > short, short * sizes // least, sizes)  # as pictures.shrink does it
    return int(layout.lengths(shrunk.astype(np.int32), "ycc").sum()) * layout.WIDTH["ycc"]


def _formats(
    data: Any, rows: Int64[np.ndarray, " n"], short: int, view: View, budget: TimeBudget
) -> dict[str, FormatTrial]:
    """What some of the pictures are as a .beton and as a .pack; nothing of data that has no pictures."""
    seconds = budget.begin("other formats", SHARES["formats"])
    if data.format in ("synthetic", "pack"):
        return {}
    from fastrot.data.pictures import BadPicture, shrink

    kept, begun = [], time.perf_counter()
    for row in rows[:TRIED].tolist():
        if time.perf_counter() - begun > seconds / 4:
            break
        with contextlib.suppress(BadPicture, DamagedRecord):
            kept.append(shrink(data.picture(row), short))
    if not kept:
        return {}
    each = (time.perf_counter() - begun) / len(kept)
    forms = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("beton", _write_beton), ("pack", _write_pack)):
            begun = time.perf_counter()
            path = write(Path(folder) / f"tried.{name}", kept)
            convert = each + (time.perf_counter() - begun) / len(kept)
            tried = assemble.open_data(path)
            loader = assemble.open_loader(tried, view, batch=1, workers=0, enlarge=True)
            everyone = np.arange(tried.rows)
            size = sum(tried.record(row).nbytes for row in everyone.tolist()) / tried.rows
            budget.begin(f"decoding as a .{name}", SHARES["formats"] / 4)
            rate = _rate(loader, everyone, min(16, tried.rows), 0, budget)
            forms[name] = FormatTrial(bytes=size, decode_one=rate, convert=convert)
    return forms


def _write_beton(path: Path, pictures: list[np.ndarray]) -> Path:
    from fastrot.data import prepare
    from fastrot.data.beton.write import Coder, write_part
    from fastrot.data.sources.records import Record

    records = [Record(str(row), -1) for row in range(len(pictures))]
    chunk = prepare.Chunk(prepare.Held(records, pictures), 0)
    coded = prepare.encode_chunk(prepare.Recipe(Coder()), chunk)
    write_part(
        Coder(), path, (each for each in coded if isinstance(each, prepare.Encoded)), len(coded)
    )
    return path


def _write_pack(path: Path, pictures: list[np.ndarray]) -> Path:
    from fastrot.data.pack.write import write_pack

    return write_pack(path, pictures)


# ---- steps ----


def _state(cfg: Config, loader: Loader, device: torch.device) -> TrainState:
    """All that a run's step needs, its net not yet compiled; it learns next to nothing."""
    info = assemble.data_info(cfg, loader, None, device, DTYPES[cfg.precision])
    schedule = LRSchedule(cfg.schedule, epochs=1, batches=len(loader), steps=len(loader), lr=QUIET)
    state = build(dataclasses.replace(cfg, compile=False, graph=False), info, schedule)
    state.method.set_schedule(1, schedule.begins)
    return state


def _held(data: Data, view: View, batch: int, device: torch.device) -> Batch:
    """A batch of random pixels on the device."""
    draw = torch.Generator().manual_seed(0)
    index = np.arange(batch, dtype=np.int64) % data.rows
    crops = (
        torch.randint(256, (batch, crop.size, crop.size, 3), dtype=torch.uint8, generator=draw)
        for crop in view.crops
    )
    return Batch(
        crops=tuple(crop.to(device) for crop in crops),
        index=torch.from_numpy(index).to(device),
        label=torch.from_numpy(data.labels[index]).to(device),
        epoch_step=torch.zeros(2, dtype=torch.int64, device=device),
    )


@dataclass(frozen=True)
class _Steps:
    """What steps on held pictures cost: seconds as a line over the pictures of a batch."""

    held: Batch  # the larger batch that was timed
    fixed: float  # weights are read and written, whatever the batch
    each: float  # a picture
    issue: float | None  # of the held batch: the host's time; None: no GPU

    def seconds(self, batch: int) -> float:
        return self.fixed + self.each * batch


def _step(
    state: TrainState, data: Data, cfg: Config, ceilings: bounds.Ceilings, budget: TimeBudget
) -> _Steps:
    """Steps of a run's own batch; on a CPU of as many pictures as fit into the time, and of FEW."""
    view, device = assemble.training_view(cfg), state.device
    seconds = budget.begin("steps on held pictures", SHARES["step"])
    state.method.net.train()
    if device.type == "cuda":
        held = _held(data, view, cfg.batch, device)
        _wrap(state, cfg, held, budget)
        step, issue = _timed(state, held, budget)
        return _Steps(held, 0.0, step / cfg.batch, issue)
    small = _held(data, view, min(FEW, cfg.batch), device)
    first, _ = _timed(state, small, budget, most=1)
    least = sum(_floors(state, small, ceilings)) / len(small.index)
    batch = min(cfg.batch, max(MORE, int(seconds / TIMES / (SLOWER * least))))
    if batch == len(small.index):
        return _Steps(small, 0.0, first / batch, None)
    if first > budget.seconds / 2:  # no time for another
        each = min(first / batch, SLOWER * least)
        return _Steps(small, first - each * len(small.index), each, None)
    few = first if first > seconds / TIMES else _timed(state, small, budget, most=1)[0]
    held = _held(data, view, batch, device)
    _wrap(state, cfg, held, budget)
    step, _ = _timed(state, held, budget)
    each = max(least, (step - few) / (batch - len(small.index)))
    return _Steps(held, max(0.0, step - each * batch), each, None)


def _wrap(state: TrainState, cfg: Config, held: Batch, budget: TimeBudget) -> None:
    """The net as a run calls it, compiled where asked; warm, where that is quick."""
    state.net = assemble.wrapped(state.method.net, cfg, state.device)
    if cfg.compile or state.device.type == "cuda":
        with budget.stopped():
            _timed(state, held, budget, most=3)


def _timed(
    state: TrainState, held: Batch, budget: TimeBudget, most: int | None = None
) -> tuple[float, float]:
    """Seconds of a step (the median), and those in which the host issued it. Until the stage ends, once at least.

    On a GPU some steps are issued at a time, as in a run, which waits for none of them.
    """
    each, issued = [], []
    at_once = 4 if state.device.type == "cuda" else 1
    while not each or (len(each) != most and budget.goes_on()):
        begun = time.perf_counter()
        for _ in range(at_once):
            train_step(state, held)
        issued.append((time.perf_counter() - begun) / at_once)
        wait_for(state.device)
        each.append((time.perf_counter() - begun) / at_once)
    return float(np.median(each)), float(np.median(issued))


def _copy(held: Batch, device: torch.device, budget: TimeBudget) -> float | None:
    """Seconds in which a picture's crops cross to the GPU from pinned memory; None: there is none."""
    if device.type != "cuda":
        return None
    budget.begin("copying", SHARES["copy"])
    host = [crop.cpu().pin_memory() for crop in held.crops]
    done, begun = 0, time.perf_counter()
    while done < 3 or budget.goes_on():
        for crop in host:
            crop.to(device, non_blocking=True)
        wait_for(device)
        done += 1
    return (time.perf_counter() - begun) / done / len(held.index)


def _floors(state: TrainState, held: Batch, ceilings: bounds.Ceilings) -> tuple[float, float]:
    """Seconds that a step takes at least, by matrix arithmetic and by the traffic of other kernels."""
    views = state.method.views(held)
    net, each = state.method.net, views if isinstance(views, tuple) else (views,)
    layers = [layer for view in each for layer in cost.layers(net, view.shape, state.dtype)]
    flop, moved = (
        sum(getattr(layer, of) for layer in layers) for of in ("flop", "traffic_unfused")
    )
    return flop / ceilings.tflops / 1e12, moved / ceilings.gb_per_s / 1e9


def _descent(state: TrainState, ceilings: bounds.Ceilings) -> float:
    """Seconds that the optimiser takes at least, whatever the batch."""
    return cost.optimiser_bytes(state.method.net, state.dtype) / ceilings.gb_per_s / 1e9


# ---- all together ----


@dataclass(frozen=True)
class _Together:
    steps: int
    step: float  # seconds
    wait: float  # of these, for data


def _together(state: TrainState, loader: Loader, lead: int, budget: TimeBudget) -> _Together:
    """Train on the data until the stage ends, one step at least beyond the first `lead`, which are not counted."""
    done, waited, begun = 0, 0.0, time.perf_counter()
    with _closed(_epochs(loader)) as batches:
        asked = begun
        for batch in batches:
            waited += time.perf_counter() - asked
            train_step(state, batch)
            done += 1
            if done == lead:
                wait_for(state.device)
                waited, begun = 0.0, time.perf_counter()
            elif done > lead and not budget.goes_on():
                break
            asked = time.perf_counter()
        wait_for(state.device)
        seconds = time.perf_counter() - begun
    return _Together(done - lead, seconds / (done - lead), waited / (done - lead))


def _foretold(step: float, load: float) -> _Together:
    """No step taken: loading goes on beside a step, which waits where it takes longer."""
    return _Together(0, max(step, load), max(0.0, load - step))


def _measured(
    timed: _Together,
    batch: int,
    whole: int,
    steps: _Steps,
    load: float,
    copy: float | None,
    floors: tuple[float, float],
    device: torch.device,
) -> bounds.Measured:
    """A step of `whole` pictures, from steps of `batch`: what these took beyond their own work, for each picture,
    and never less than loading takes.

    load, copy  seconds a picture
    floors      seconds of a step of `whole` pictures
    """
    step, wait = timed.step, timed.wait
    if batch != whole:
        beyond = max(0.0, step - steps.seconds(batch)) / batch
        working = steps.seconds(whole) + beyond * whole
        wait = max(wait * whole / batch, load * whole - working)
        step = max(working, load * whole)
    wait = min(wait, step, load * whole)  # a batch is waited for no longer than it takes
    return bounds.Measured(
        step=step,
        wait=wait,
        decode=load * whole,
        copy=None if copy is None else copy * whole,
        issue=steps.issue,
        busy=min(step, steps.seconds(whole)) if device.type == "cuda" else step - wait,
        arithmetic=floors[0],
        memory=floors[1],
    )


def _epochs(loader: Loader) -> Iterator[Batch]:
    """Epoch after epoch."""
    number = 0
    while True:
        yield from loader.epoch(number)
        number += 1


@torch.no_grad()
def _validation(
    cfg: Config, val: Data, state: TrainState, size: int, workers: int, budget: TimeBudget
) -> float:
    """Seconds of a validation pass over `val`, from some of its batches."""
    budget.begin("validation", SHARES["val"])
    view = assemble.evaluation_view(cfg)
    loader = _opened(cfg, val, state.device, workers, size, view=view)
    method = state.method
    method.net.eval()
    done, images, begun = 0, 0, time.perf_counter()
    with _closed(loader.epoch(0)) as batches:
        for batch in batches:
            with state.autocast():
                method.score(method.net(method.views(batch)), batch)
            done += 1
            if done == 1 and len(loader) > 1:
                wait_for(state.device)
                begun = time.perf_counter()
                continue
            images += len(batch.index)
            if not budget.goes_on():
                break
        wait_for(state.device)
    method.net.train()
    return val.rows * (time.perf_counter() - begun) / max(images, 1)
