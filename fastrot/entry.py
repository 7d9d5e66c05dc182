"""What all commands share at the door: errors for people in one sentence, the status, and said once.

0 done; 1 stopped, or pictures rejected; 2 wrong use; 130 interrupted. FASTROT_TRACEBACK=1 shows where an
error came from. Standard library only.
"""

import os
import sys
import time
from collections.abc import Callable

from fastrot.config import Refused, Stopped


def rank() -> int:
    """This process among those that a launcher started, before anything else is known."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def status(main: Callable[[], int | None]) -> int:
    """Run a command's main function; the status to leave with."""
    try:
        code = main() or 0
    except (Refused, Stopped, OSError) as error:
        if os.environ.get("FASTROT_TRACEBACK") == "1":
            raise
        file = getattr(error, "filename", None)  # of an OSError that met a file
        complain(str(error) if file is None else f"{file}: {getattr(error, 'strerror', error)}")
        code = 2 if isinstance(error, Refused) else 1
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on where it was")
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def complain(sentence: str) -> None:
    """One sentence on stderr. Rank 0 speaks at once; another only if its launcher lets it live on."""
    if rank():
        time.sleep(5)  # rank 0 met the same, or torchrun ends this process
        sentence = f"rank {rank()}: {sentence}"
    print(f"fastrot: {printable(sentence)}", file=sys.stderr)


def printable(text: str) -> str:
    """Text that any terminal takes: odd bytes and control characters of file names as escapes."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
