"""dataprep/to_ffcv.py with parts of a few records, held up where a test wants to kill it.

    python small_parts.py PART MOMENT [arguments of to_ffcv.py]

At its MOMENT it prints `reached` and waits. `never`: it does not; `die`: rank 1 kills itself in its second part;
`full`: none of rank 1's files may grow beyond 5,000 bytes.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def hold() -> None:
    print("reached", flush=True)
    time.sleep(600)


def die() -> None:
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def at_call(function, number: int, do):
    """The function, with `do` before its call of that number."""
    calls = iter(range(1, 10**9))

    def wrapped(*args, **how):
        if next(calls) == number:
            do()
        return function(*args, **how)

    return wrapped


def replaced(source, target) -> None:
    if str(target).endswith(".beton.crc.npy"):
        hold()
    real_replace(source, target)


if __name__ == "__main__":
    part, moment = int(sys.argv[1]), sys.argv[2]
    sys.path[:0] = [str(ROOT), str(ROOT / "dataprep")]
    import to_ffcv

    from fastrot.data.beton import write
    from fastrot.data.prepare.parts import Part

    write.BetonWriter.part = part
    real_replace = os.replace
    if moment in ("part", "die"):
        write.Packer.add = at_call(write.Packer.add, part + 3, hold if moment == "part" else die)
    elif moment == "full" and os.environ.get("RANK") == "1":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    elif moment == "between":
        Part.make = at_call(Part.make, 2, hold)
    elif moment == "merge":
        write.merge = at_call(write.merge, 1, lambda: setattr(write.Packer, "add", at_add))
        at_add = at_call(write.Packer.add, 5, hold)
    elif moment == "publish":
        os.replace = replaced
    sys.exit(to_ffcv.main(sys.argv[3:]))
