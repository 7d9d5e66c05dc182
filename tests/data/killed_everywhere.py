"""A conversion killed before each of its changes to the disk, started again, and compared: prints what it found.

    python killed_everywhere.py PICTURES FOLDER SCENARIO

A fork for each kill: a process of its own would cost a third of a second.
"""

import contextlib
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fastrot.data.beton import write
from fastrot.data.prepare import report
from fastrot.data.prepare.convert import convert

# quick: processes are killed here, not the machine; and nobody looks
os.fsync = lambda file: None
report.progress_bar = lambda *_: contextlib.nullcontext(lambda images: None)

ROOT, HERE, SCENARIO = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
OUT = HERE / "a.beton"
KEEP = SCENARIO.startswith("keep")
OLD = SCENARIO.endswith("over-old")  # a finished file of other options is there
KEPT = SCENARIO == "merge-kept"


def converted(**how) -> None:
    options = dict(source="imagefolder", root=ROOT, out=OUT, workers=0, limit=7)
    convert(write.BetonOptions(**options | how), part=3)


def wanted() -> None:
    converted(keep_parts=KEEP, overwrite=OLD)


def before() -> None:
    if OLD:
        converted(quality=50)
    if KEPT:
        converted(keep_parts=True)


def child(do) -> int:
    """Do it in a fork; its status, or minus the signal that ended it."""
    pid = os.fork()
    if not pid:
        os.dup2(os.open(SAID, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        do()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(number: int) -> None:
    """Do it, and be killed before change `number` to the disk."""
    changes = iter(range(1, 10**9))

    def deadly(function):
        def wrapped(*args, **how):
            if next(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **how)

        return wrapped

    for place, functions in ((os, ("replace", "rename", "fsync")), (Path, ("unlink", "rmdir"))):
        for name in functions:
            setattr(place, name, deadly(getattr(place, name)))
    wanted()


def files() -> dict[str, bytes]:
    """All that a reader may see: of the file only where the .beton is there, of the set where its .json is."""
    found = {p.name: p.read_bytes() for p in HERE.glob("a.beton*") if p.is_file()}
    found = found if OUT.exists() else {}
    for file in HERE.glob("a.beton.set/*"):
        if (file.parent / "set.json").exists():
            found[f"set/{file.name}"] = file.read_bytes()
    found.pop("set/lock", None)
    return found


def fresh() -> None:
    shutil.rmtree(HERE)
    shutil.copytree(BEFORE, HERE)


BEFORE, SAID = HERE.with_name("before"), HERE.with_name("said")
HERE.mkdir()
before()
shutil.copytree(HERE, BEFORE)
old = files()
wanted()
new = files()
names = {p.name for p in HERE.iterdir()}
assert new
assert new != old
kills = 0
while True:
    fresh()
    kills += 1
    status = child(partial(killed_at, kills))
    there = files()
    both = KEPT and {**old, **new} == there  # merged, and the set is not yet removed
    if OLD or KEPT:
        assert both or there in (old, new, {}), f"kill {kills}: {[*there]}"
    else:
        assert there in ({}, new), f"kill {kills}: {[*there]}"
    if status == 0:
        break
    assert status == -signal.SIGKILL, f"kill {kills}: status {status}"
    assert child(wanted) == 0, f"not resumed after kill {kills}: {SAID.read_text()}"
    assert files() == new, f"other bytes after kill {kills}"
    assert {p.name for p in HERE.iterdir()} == names, f"rubble left by kill {kills}"
    assert not (HERE / "a.beton.set" / "lock").exists()
print(kills - 1)
