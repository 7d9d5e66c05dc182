"""A conversion into a pack, killed before each of its changes to the disk, and started again: prints the kills.

    python killed_packs.py PICTURES FOLDER SCENARIO

As killed_everywhere.py does it for a .beton: a fork for each kill.
"""

import contextlib
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fastrot.data.pack import write
from fastrot.data.prepare import report
from fastrot.data.prepare.convert import convert

# quick: processes are killed here, not the machine; and nobody looks
os.fsync = lambda file: None
report.progress_bar = lambda *_: contextlib.nullcontext(lambda images: None)

ROOT, HERE, SCENARIO = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
OUT, BEFORE, SAID = HERE / "a.pack", HERE.with_name("before"), HERE.with_name("said")
OLD = SCENARIO == "over-old"  # a finished pack of other options is there
CHANGES = {os: ("replace", "rename", "unlink", "rmdir"), Path: ("unlink", "rmdir")}


def converted(**how) -> None:
    options = dict(source="imagefolder", root=ROOT, out=OUT, workers=0, limit=4)
    convert(write.PackOptions(**options | how), part=2)


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
    converted(overwrite=OLD)


def files() -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in OUT.iterdir()} if OUT.exists() else {}


HERE.mkdir()
if OLD:
    converted(encoding="raw")
shutil.copytree(HERE, BEFORE)
old = files()
converted(overwrite=OLD)
new = files()
assert new
assert new != old
kills = 0
while True:
    shutil.rmtree(HERE)
    shutil.copytree(BEFORE, HERE)
    kills += 1
    status = child(partial(killed_at, kills))
    assert files() in (old, new, {}), f"kill {kills}: {[*files()]}"
    if status == 0:
        break
    assert status == -signal.SIGKILL, f"kill {kills}: status {status}: {SAID.read_text()}"
    assert child(partial(converted, overwrite=OLD)) == 0, f"after kill {kills}: {SAID.read_text()}"
    assert files() == new, f"other bytes after kill {kills}"
    assert [p.name for p in HERE.iterdir()] == ["a.pack"], f"rubble left by kill {kills}"
print(kills - 1)
