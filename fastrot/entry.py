"""What all commands share at the door: errors for people in one sentence, the status, and said once.

0 done; 1 stopped or rejects; 2 wrong use; 130 interrupted. Standard library only.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from fastrot.config import Refused, Stopped


def rank() -> int:
    """This process among those that a launcher started, before anything else is known."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's main function and leave with its status."""
    try:
        status = main() or 0
    except (Refused, Stopped, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # no file of the user's: a fault of ours
        complain(str(error))
        status = 1 if isinstance(error, Stopped) else 2
    except KeyboardInterrupt:
        complain("interrupted")
        status = 130
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def complain(sentence: str) -> None:
    """One sentence on stderr. Rank 0 speaks at once; another only if its launcher lets it live on."""
    if rank():
        time.sleep(5)  # rank 0 met the same, or torchrun ends this process
        sentence = f"rank {rank()}: {sentence}"
    print(f"fastrot: {sentence}", file=sys.stderr)
