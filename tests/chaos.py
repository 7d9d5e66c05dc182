"""Kill training processes at random moments, start the same command again, compare with a run that was never killed.

    python tests/chaos.py [--kills 100] [--seed 0] [--out FILE.jsonl or FOLDER]

SIGKILL, SIGTERM and SIGUSR1, to a single process, to one rank of two, to torchrun; during start-up, steps, validation, and
while a checkpoint is copied, or written beside whatever comes next; from an image folder and a `.beton`. A run is killed
several times before it may end; then every leaf of last.pt, best.pt and each step_N.pt (weights, optimiser, order, meter,
random state) and every line of metrics.jsonl, its clock left out, must be those of the straight run. A kill before the
first checkpoint does not count: there is nothing to go on from.

How the moment is known: the child process is this file with CHAOS_PHASES set. It runs fastrot.train.main with
train_step, validate and the loop's save wrapped so that each notes its phase in a shared page of memory before the real
function is called, and checkpoint.save so that the thread which writes notes that it does. That page outlives the process,
so the phase of a SIGKILL is the one that it died in.
"""

import os
import sys
from pathlib import Path

if str(Path(__file__).parents[1]) not in sys.path:  # run as a script: the project's root goes first
    sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import contextlib
import itertools
import json
import mmap
import random
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from rich.progress import Progress

from fastrot import entry
from fastrot.config import RunError, UsageError

# torch is imported where it is used: the child notes its number before that

ROOT = Path(__file__).parents[1]
PHASES = ("start-up", "steps", "checkpoint", "validation", "end")
START, STEPS, CHECKPOINT, VALIDATION, END = range(5)
WITHIN = (3.0, 0.3, 0.01, 0.03)  # seconds from a phase's beginning to a kill, at most
NOTE = struct.Struct("<BBI")  # of each rank: phase, whether its thread writes, process number
LATE = 24  # steps until ranks hear of a warning: they ask each other every 20, and log every 3
MOST = 8  # kills that one run goes through
PATIENCE = 600.0  # seconds that a struck process may take to end, or a phase to come
# all that may differ from the straight run
CLOCK = ("images_per_s", "wait_share", "seconds", "waited", "saving")
FREE = (".config.out", ".config.max_steps", ".config.workers")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TORCHRUN += (
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
)  # else it dies of SIGUSR1
STEPS_EACH = 160  # of a run
SMALL = ("demo", "--image-size", "32", "--backbone.width", "0.1", "--enlarge", "--hold-out", "0.3")
SMALL += ("--log-every", "3", "--checkpoint-every", "5", "--validate-every", "1", "--workers", "1")
SMALL += ("--keep-every", "7", "--keep-best")  # all that is kept is compared
SMALL += ("--no-tensorboard", "--device", "cpu", "--precision", "fp32")
BATCH = 4  # over all ranks
REFUSED = "another run writes into"  # what a second start is told


class Kill(NamedTuple):
    """Who is to be struck, by what, in which phase."""

    phase: int
    signal: signal.Signals
    target: str  # process, rank 0, rank 1, torchrun


class Struck(NamedTuple):
    """A kill as it came about."""

    phase: int  # the one really hit
    kill: Kill
    step: int  # of the last log line before it
    counts: bool  # there was a checkpoint to go on from


KILL, TERM, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1
ONE = [(each, "process") for each in (KILL, TERM, USR1)]
TWO = [(KILL, "rank 0"), (KILL, "rank 1"), (TERM, "rank 1"), (USR1, "rank 0")]
TWO += [(TERM, "torchrun"), (USR1, "torchrun"), (KILL, "torchrun")]


def planned(kills: int, ranks: int, draw: random.Random) -> list[Kill]:
    """That many kills: all combinations of signal, target and phase in random order, again and again."""
    ways = ONE if ranks == 1 else TWO
    plan: list[Kill] = []
    while len(plan) < kills:
        each = [Kill(p, *way) for p, way in itertools.product(range(END), ways)]
        plan += draw.sample(each, len(each))
    return plan[:kills]


# ---- in the child: the real run, which notes its phase ----


def child(notes: str) -> int:
    """fastrot.train.main with the words of this command line; each rank notes phase and process number."""
    with open(notes, "r+b") as file:
        page = mmap.mmap(file.fileno(), 0)
    at = NOTE.size * entry.rank()
    NOTE.pack_into(page, at, START, False, os.getpid())

    from fastrot import train
    from fastrot.training import checkpoint, loop

    def noting(phase: int, function: Callable, behind: int | None = None, at: int = at) -> Callable:
        def noted(*args: Any, **more: Any) -> Any:
            before, page[at] = page[at], phase
            try:
                return function(*args, **more)
            finally:
                page[at] = before if behind is None else behind

        return noted

    loop.train_step = noting(STEPS, loop.train_step, STEPS)
    loop.validate = noting(VALIDATION, loop.validate)
    loop.fit = noting(STEPS, loop.fit, END)
    loop._Fit.save = noting(CHECKPOINT, loop._Fit.save)
    checkpoint.save = noting(True, checkpoint.save, at=at + 1)
    return train.main(sys.argv[1:])


# ---- a run in processes of its own ----


class Running:
    """A training command that was started: its processes, phases, and what it says."""

    def __init__(self, command: Sequence[str | Path], ranks: int, run: Path):
        self.ranks, self.run = ranks, run
        self.step = last_step(run)  # where it should go on
        self.notes = run.parent / f"{run.name}.phases"
        self.notes.unlink(missing_ok=True)  # processes of before keep theirs
        self.notes.write_bytes(bytes(NOTE.size * ranks))
        with self.notes.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 0)
        self.said = run.parent / f"{run.name}.said"
        self.said.unlink(missing_ok=True)
        self.process = self.begun([str(word) for word in (*command, "--out", run)])

    def begun(self, words: list[str]) -> Any:
        """The command's process, a new one."""
        more = {"CHAOS_PHASES": str(self.notes), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env = os.environ | more | {"PYTHONUNBUFFERED": "1"}
        words = [sys.executable, *(TORCHRUN if self.ranks > 1 else ()), __file__, *words]
        with self.said.open("wb") as file:
            return subprocess.Popen(words, cwd=ROOT, env=env, stdout=file, stderr=file)

    def phase(self) -> int:
        """What rank 0 is at, or was when it died: it alone writes checkpoints, and all else is done together."""
        phase, writes = self._page[:2]
        return CHECKPOINT if writes else phase

    def number(self, target: str) -> int:
        """Process number of a target; 0 where it has not begun."""
        if target in ("process", "torchrun"):
            return self.process.pid
        return self.ranks_begun()[int(target.removeprefix("rank "))]

    def ranks_begun(self) -> list[int]:
        """The process number of each rank; 0 where it has not begun."""
        return [number for *_, number in NOTE.iter_unpack(self._page[:])]

    def ended(self) -> bool:
        return self.process.poll() is not None

    def words(self) -> str:
        return self.said.read_text(errors="replace")

    def wait(self) -> int:
        """The status. Raises RunError where it does not end."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.end()
            raise RunError(f"{self.run} did not end: {self.words()[-2000:]}") from None

    def end(self) -> None:
        """Kill all that is left of it: a torchrun that was killed leaves its ranks alive."""
        alive = [n for n in (self.process.pid, *self.ranks_begun()) if n and is_alive(n)]
        for number in alive:
            send(number, signal.SIGKILL)
        self.process.wait()
        until(lambda: not any(map(is_alive, alive)))


def send(number: int, what: signal.Signals) -> None:
    """A signal to a process that may have ended, or not begun: 0 would be this process and its neighbours."""
    if number > 0:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, what)


def is_alive(number: int) -> bool:
    """Whether a process runs: neither gone nor a zombie."""
    return state_of(number) not in ("", "Z")


def state_of(number: int) -> str:
    """A process's state as the system has it: R, S, T (stopped), Z...; empty where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def until(true: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Wait until something is true; False where it does not come true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True


def last_step(run: Path, name: str = "last.pt") -> int | None:
    """The step of a run's last checkpoint; None where there is none."""
    from fastrot.training import checkpoint

    last = run / "checkpoints" / name
    return checkpoint.load(last)["step"] if last.exists() else None


def last_logged(run: Path) -> int:
    """The step of a run's last log line; 0 where there is none."""
    from fastrot.training.journal import read_lines

    return max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0)


# ---- strike, and look at what it did ----


def strike(running: Running, kill: Kill, draw: random.Random) -> Struck | None:
    """Send the signal at a random moment of its phase, wait for the end. None: it had ended before."""
    last = running.run / "checkpoints" / "last.pt"
    _wait(running, lambda: running.number(kill.target) > 0)
    if kill.phase == START:
        time.sleep(draw.uniform(0, WITHIN[START]))
    else:
        _wait(running, last.exists)
        _hold(running, kill.phase, draw)
    if running.ended():
        return None
    hit, step = running.phase(), last_logged(running.run)
    send(running.number(kill.target), kill.signal)
    send(running.ranks_begun()[0], signal.SIGCONT)
    running.wait()
    if kill.signal == KILL and kill.target in ("process", "rank 0"):
        hit = running.phase()  # the phase that it died in
    return Struck(hit, kill, step, last.exists())


def _hold(running: Running, phase: int, draw: random.Random) -> None:
    """Stop rank 0 at a random moment of a phase, or at the run's end: phases are short, and looking takes time."""
    for _ in range(draw.randint(0, 2)):
        _comes_anew(running, phase)
    while not running.ended():
        _comes_anew(running, phase)
        time.sleep(draw.uniform(0, WITHIN[phase]))
        first = running.ranks_begun()[0]
        send(first, signal.SIGSTOP)
        _wait(running, lambda number=first: state_of(number) == "T")
        if running.phase() == phase:
            return
        send(first, signal.SIGCONT)


def _comes_anew(running: Running, phase: int) -> None:
    _wait(running, lambda: running.phase() != phase)
    _wait(running, lambda: running.phase() == phase)


def _wait(running: Running, true: Callable[[], bool]) -> None:
    """Until it is true, or the run has ended. Raises RunError where neither comes: a run that hangs."""
    if not until(lambda: true() or running.ended()):
        running.end()
        raise RunError(
            f"{running.run} hangs in {PHASES[running.phase()]}: {running.words()[-2000:]}"
        )


def complaints(running: Running, struck: Struck | None) -> list[str]:
    """What is wrong with a start that has ended, a sentence each."""
    said, status, wrong = running.words(), running.process.returncode, []
    for name in ("last.pt", "previous.pt"):
        try:
            last_step(running.run, name)
        except UsageError as error:
            wrong.append(str(error))
    went_on = [int(step) for step in re.findall(r"resumed at step (\d+)", said)]
    should = [] if running.step is None else [running.step]
    if re.search(r"^step \d", said, re.MULTILINE) and went_on != should:
        wrong.append(f"it went on at {went_on}, where the last checkpoint was of {running.step}")
    done = re.search(r"is done after (\d+) steps", said)
    if struck is None and not done:
        wrong.append(f"nobody struck it, but it ended with status {status}: {said[-1000:]}")
    if struck is None:
        return wrong
    number, warned = struck.kill.signal, struck.kill.signal != KILL
    if done:
        if warned and struck.phase != END and int(done[1]) > struck.step + LATE:
            wrong.append(f"after {number.name} behind step {struck.step} it went on to its end")
        return wrong
    if struck.kill.target == "process":
        fine = {128 + number} if warned else {-number}
        if struck.phase in (START, END):  # no handler stands, or none any more
            fine.add(-number)
        if status not in fine:
            wrong.append(f"status {status} by {number.name} during {PHASES[struck.phase]}")
    if warned and struck.phase not in (START, END):
        at = last_step(running.run)
        if f"{number.name}: saved at step {at} of " not in said:
            wrong.append(f"by {number.name} it did not save and say so (step {at}): {said[-1000:]}")
    return wrong


def differences(straight: Path, run: Path) -> tuple[list[str], int]:
    """Names of what is not the same in two finished runs, and how many leaves of checkpoints were compared."""
    mine, others = (dict(_kept(each / "checkpoints")) for each in (straight, run))
    wrong = sorted(mine.keys() ^ others.keys())
    wrong += [name for name in mine if name in others and not same(mine[name], others[name])]
    if told(straight) != told(run):
        wrong.append("metrics.jsonl")
    return wrong, len(mine)


def _kept(folder: Path) -> Iterator[tuple[str, Any]]:
    """The leaves of all checkpoints in a folder, and whatever else is there."""
    from fastrot.training import checkpoint

    for file in folder.iterdir():
        if file.suffix != ".pt":
            yield file.name, None
        elif file.name != "previous.pt":  # which one that is depends on where a run was broken off
            yield from leaves(checkpoint.load(file), file.name)


def leaves(state: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value of a checkpoint by its path, but for the clock and what changes no number."""
    if not isinstance(state, (dict, list, tuple)):
        yield at, state
        return
    for name, value in state.items() if isinstance(state, dict) else enumerate(state):
        if name not in CLOCK and not f"{at}.{name}".endswith(FREE):
            yield from leaves(value, f"{at}.{name}")


def same(mine: Any, other: Any) -> bool:
    """Equal to the bit: minus zero is not zero."""
    import torch

    if not isinstance(mine, torch.Tensor) or not isinstance(other, torch.Tensor):
        return repr(mine) == repr(other)
    if (mine.dtype, mine.shape) != (other.dtype, other.shape):
        return False
    a, b = (each.contiguous().reshape(-1).view(torch.uint8) for each in (mine, other))
    return torch.equal(a, b)


def told(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, without the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


# ---- one setting: a straight run, and others that are struck ----


@dataclass
class Setting:
    """What is trained, on how many ranks, from what."""

    ranks: int
    data: Path
    folder: Path  # for its runs
    steps: int = STEPS_EACH
    paused: float = 0.5  # how often the ranks that a killed torchrun leaves are stopped for a while
    running: type[Running] = Running

    @property
    def name(self) -> str:
        processes = "one process" if self.ranks == 1 else "two ranks"
        return f"{processes}, {'folder' if self.data.is_dir() else 'beton'}"

    def start(self, run: str) -> Running:
        knobs = ("--schedule.steps", str(self.steps), "--batch", str(BATCH // self.ranks))
        return self.running([*SMALL, *knobs, "--data", self.data], self.ranks, self.folder / run)

    def straight(self) -> Path:
        """A run that is never struck."""
        running = self.start("straight")
        if running.wait():
            raise RunError(f"the straight run failed: {running.words()[-2000:]}")
        return running.run


@dataclass
class Seen:
    """What came of the kills of a setting."""

    struck: list[Struck] = field(default_factory=list)
    refused: int = 0  # starts beside the ranks that a killed torchrun had left
    runs: int = 0  # compared with the straight one
    leaves: int = 0  # of a checkpoint
    survived: int = 0  # kills that count, of runs that ended with the same bits
    wrong: list[str] = field(default_factory=list)

    def counted(self) -> list[Struck]:
        return [each for each in self.struck if each.counts]


def batter(
    setting: Setting, plan: list[Kill], draw: random.Random, tell: Callable[[Seen], None]
) -> Seen:
    """Strike runs as planned, several times each, and compare each with the straight run."""
    straight, seen, plan = setting.straight(), Seen(), plan.copy()
    while plan:
        name = f"struck-{seen.runs}"
        before, wrong = len(seen.counted()), len(seen.wrong)
        _run_through(setting, name, plan, seen, draw, tell)
        different, seen.leaves = differences(straight, setting.folder / name)
        seen.runs += 1
        if different:
            some = ", ".join(different[:3])
            seen.wrong.append(f"{name}: {len(different)} leaves are not the straight run's: {some}")
        if len(seen.wrong) == wrong:
            seen.survived += len(seen.counted()) - before
    return seen


def _run_through(
    setting: Setting,
    name: str,
    plan: list[Kill],
    seen: Seen,
    draw: random.Random,
    tell: Callable[[Seen], None],
) -> None:
    """One run from its first start to its end; takes kills from the plan, at most MOST."""
    for struck_before in itertools.count():
        running = setting.start(name)
        kill = plan[0] if plan and struck_before < MOST else None
        if kill is None:
            running.wait()
            struck = None
        else:
            if kill.phase == START and running.step is None and struck_before:
                kill = kill._replace(phase=STEPS)  # else it would never get to a checkpoint
            struck = strike(running, kill, draw)
        seen.wrong += [f"{name}, start {struck_before}: {e}" for e in complaints(running, struck)]
        if struck is None:
            if kill is not None:
                plan.append(plan.pop(0))  # it came too late
            return
        seen.struck.append(struck)
        if struck.counts and kill is plan[0]:  # what stood in for a start-up leaves that planned
            plan.pop(0)
        if struck.kill.signal == KILL and struck.kill.target == "torchrun":
            refused, wrong = beside(running, setting, name, paused=draw.random() < setting.paused)
            seen.refused += refused
            seen.wrong += wrong
        running.end()
        tell(seen)


def beside(
    running: Running, setting: Setting, name: str, *, paused: bool
) -> tuple[bool, list[str]]:
    """Start the command beside the ranks that a killed torchrun left: whether it was refused, and what was wrong.

    Ranks that are paused behind their start hold their folder for certain; others may reach their end meanwhile.
    """
    for number in running.ranks_begun() if paused else ():
        send(number, signal.SIGSTOP)
    held = paused and running.phase() != START
    second = setting.start(name)
    second.wait()
    said = second.words()
    if REFUSED in said or ("is done after" in said and not held):
        return REFUSED in said, []
    return False, [f"{name}: beside living ranks a second start said {said[-1000:]}"]


# ---- the command ----


def pictures(folder: Path) -> tuple[Path, Path]:
    """Some of the demo's photographs, as an image folder and as a .beton."""
    from fastrot.data.beton.write import BetonOptions
    from fastrot.data.prepare.convert import convert

    root, beton = folder / "pictures", folder / "pictures.beton"
    for group in sorted((ROOT / "dataprep" / "demo_pictures" / "train").iterdir()):
        (root / group.name).mkdir(parents=True)
        for picture in sorted(group.glob("*.jpg"))[:9]:
            shutil.copy(picture, root / group.name)
    convert(BetonOptions(source="imagefolder", root=root, out=beton, workers=0))
    return root, beton


def settings(folder: Path, kills: int) -> dict[str, tuple[Setting, int]]:
    """Each setting and its share of the kills: a start of torchrun takes twice as long."""
    found, left = {}, kills
    for ranks, share in ((1, 0.32), (2, 0.18)):
        for data in pictures(folder) if not found else [s.data for s, _ in found.values()][:2]:
            setting = Setting(ranks, data, folder / f"{ranks}-{data.suffix[1:] or 'folder'}")
            setting.folder.mkdir()
            found[setting.name] = (setting, min(left, round(kills * share)))
            left -= found[setting.name][1]
    name, (setting, share) = list(found.items())[-1]
    found[name] = (setting, share + left)  # what rounding left over
    return found


def row(found: dict[str, Seen], asked: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The one line: kills that count, by phase, by signal and target, by setting."""
    from benchmarks import measure

    struck = [each for seen in found.values() for each in seen.counted()]
    every = [each for seen in found.values() for each in seen.struck]

    def count(names: Iterable[str]) -> dict[str, int]:
        return dict(sorted(Counter(names).items()))

    return measure.row(
        "kills survived to the same bits",
        theme="chaos",
        variant="SIGKILL, SIGTERM, SIGUSR1",
        mode=", ".join(PHASES[:END]),
        shape={"steps": STEPS_EACH, "batch": BATCH},
        dtype="fp32",
        **measure.middle([float(sum(seen.survived for seen in found.values()))], "kills"),
        warmup=0,
        target=asked.kills,
        better="higher",
        kills=len(struck),
        by_phase=count(PHASES[each.phase] for each in struck),
        by_signal=count(f"{each.kill.signal.name} to {each.kill.target}" for each in struck),
        by_setting={name: len(seen.counted()) for name, seen in found.items()},
        before_the_first_checkpoint=len(every) - len(struck),
        refused_beside_a_living_run=sum(seen.refused for seen in found.values()),
        runs_compared=sum(seen.runs for seen in found.values()),
        leaves_compared=max(seen.leaves for seen in found.values()),
        mismatches=sum(len(seen.wrong) for seen in found.values()),
        seed=asked.seed,
        seconds=round(seconds, 1),
    )


def summary(row: dict[str, Any]) -> str:
    lines = [
        f"{row['kills']} kills in {row['seconds']:.0f} s, {row['runs_compared']} runs compared "
        f"({row['leaves_compared']} leaves of all kept checkpoints each, and metrics.jsonl): "
        f"{row['mismatches']} mismatches"
    ]
    for name in ("by_phase", "by_signal", "by_setting"):
        lines.append("  " + ", ".join(f"{key} {n}" for key, n in row[name].items()))
    return "\n".join(
        [
            *lines,
            f"  not counted, before the first checkpoint: {row['before_the_first_checkpoint']}; second "
            f"starts refused beside a living run: {row['refused_beside_a_living_run']}",
        ]
    )


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="that count, over all settings")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and their order")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    asked = parser.parse_args(args)
    from benchmarks import measure

    draw, found, begun = random.Random(asked.seed), {}, time.perf_counter()
    measure.row("kills")  # without a commit it is refused now, and not after the last kill
    with tempfile.TemporaryDirectory() as folder, Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("kills", total=asked.kills)

        def tell(now: Seen) -> None:
            counted = sum(len(seen.counted()) for seen in (*found.values(), now))
            bar.update(task, completed=counted)

        for name, (setting, kills) in settings(Path(folder), asked.kills).items():
            found[name] = batter(setting, planned(kills, setting.ranks, draw), draw, tell)
            print(
                f"{name}: {len(found[name].counted())} kills, {found[name].runs} runs", flush=True
            )
            for wrong in found[name].wrong:
                print(f"  MISMATCH {wrong}", flush=True)
    made = row(found, asked, time.perf_counter() - begun)
    measure.append(measure.results("cpu", asked.out), made)
    print(summary(made))
    if made["mismatches"]:
        raise RunError(f"{made['mismatches']} mismatches, named above")
    return 0


if __name__ == "__main__":
    notes = os.environ.get("CHAOS_PHASES")
    sys.exit(entry.status(main if notes is None else partial(child, notes)))
