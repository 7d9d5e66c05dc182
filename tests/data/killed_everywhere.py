"""A conversion killed before its changes to the disk, started again, and compared: prints the number of kills.

    python killed_everywhere.py PICTURES FOLDER FORMAT SCENARIO EVERY

It is killed before each change, or before every fifth where EVERY is 5. A fork for each kill: a process of its
own would cost a third of a second.
"""

import contextlib
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fastrot.data.beton.write import BetonOptions
from fastrot.data.pack.write import PackOptions
from fastrot.data.prepare import report
from fastrot.data.prepare.convert import convert

# quick: processes are killed here, not the machine; and nobody looks
os.fsync = lambda file: None
report.progress_bar = lambda *_: contextlib.nullcontext(lambda images: None)

ROOT, HERE = Path(sys.argv[1]), Path(sys.argv[2])
FORMAT, SCENARIO, EVERY = sys.argv[3], sys.argv[4], int(sys.argv[5])
BETON = FORMAT == "beton"
OUT = HERE / f"a.{FORMAT}"
KEEP = SCENARIO.startswith("keep")
OLD = SCENARIO.endswith("over-old")  # a finished file of other options is there
KEPT = SCENARIO == "merge-kept"
CHANGES = {
    os: ("replace", "rename", *(("fsync",) if BETON else ("unlink", "rmdir"))),
    Path: ("unlink", "rmdir"),
}


def prepare(**how) -> None:
    given = dict(source="imagefolder", root=ROOT, out=OUT, workers=0, limit=7 if BETON else 4)
    kind = BetonOptions if BETON else PackOptions
    convert(kind(**given | how), part=3 if BETON else 2)


def wanted() -> None:
    prepare(overwrite=OLD, **({"keep_parts": True} if KEEP else {}))


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

    for place, functions in CHANGES.items():
        for name in functions:
            setattr(place, name, deadly(getattr(place, name)))
    wanted()


def files() -> dict[str, bytes]:
    """All that a reader may see: of the file only where the .beton is there, of the set where its .json is."""
    if not BETON:
        return {p.name: p.read_bytes() for p in OUT.iterdir()} if OUT.exists() else {}
    found = {p.name: p.read_bytes() for p in HERE.glob("a.beton*") if p.is_file()}
    found = found if OUT.exists() else {}
    for file in HERE.glob("a.beton.set/*"):
        if (file.parent / "set.json").exists():
            found[f"set/{file.name}"] = file.read_bytes()
    found.pop("set/lock", None)
    return found


BEFORE, SAID = HERE.with_name("before"), HERE.with_name("said")
HERE.mkdir()
if OLD:
    prepare(encoding="raw")
if KEPT:
    prepare(keep_parts=True)
shutil.copytree(HERE, BEFORE)
old = files()
wanted()
new = files()
names = {p.name for p in HERE.iterdir()}
assert new
assert new != old
number = kills = 0
while True:
    shutil.rmtree(HERE)
    shutil.copytree(BEFORE, HERE)
    number += EVERY
    status = child(partial(killed_at, number))
    there = files()
    both = KEPT and {**old, **new} == there  # merged, and the set is not yet removed
    assert both or there in (old, new, {}), f"kill {number}: {[*there]}"
    if status == 0:
        break
    kills += 1
    assert status == -signal.SIGKILL, f"kill {number}: status {status}: {SAID.read_text()}"
    assert child(wanted) == 0, f"not resumed after kill {number}: {SAID.read_text()}"
    assert files() == new, f"other bytes after kill {number}"
    assert {p.name for p in HERE.iterdir()} == names, f"rubble left by kill {number}"
    assert not (HERE / "a.beton.set" / "lock").exists()
print(kills)
