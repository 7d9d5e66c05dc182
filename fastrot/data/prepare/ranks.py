"""Ranks: the processes that share a conversion, how they meet, and the claim on their folder.

They meet through torch.distributed, although they share a file system: a process that dies closes its connections,
which tells the others, while a file that does not come tells nothing, and may be seen by others a minute late.
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from fastrot import entry
from fastrot.config import PeerLost, RunError, UsageError

CLAIM = "sign"  # so begins the name of a claim's file
SEEN_WITHIN = 120  # seconds until a file that one machine wrote must be seen by another

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun or srun started; by itself it is all of them."""

    rank: int = 0
    world: int = 1
    cores: int = field(default_factory=entry.cores)  # for this rank alone

    def all_gather(self, value: T) -> list[T]:
        """The values of all, rank 0's first; waits for them. Raises PeerLost where one is gone."""
        if self.world == 1:
            return [value]
        from fastrot import dist

        try:
            return dist.everyones(value)
        except RuntimeError:
            raise PeerLost(
                "another process of this conversion has ended: run the same command again to go on"
            ) from None

    def on_rank_0(self, do: Callable[[], T]) -> T:
        """What rank 0 gets by doing it. Where it raises an error for people, the others leave in silence."""
        told, error, status = None, None, 0
        if self.rank == 0:
            try:
                told = do()
            except (UsageError, RunError, OSError) as e:
                error, status = e, 2 if isinstance(e, UsageError) else 1
        told, status = self.all_gather((told, status))[0]
        if not status:
            return told  # type: ignore[return-value]
        with contextlib.suppress(PeerLost):
            self.all_gather(None)  # none leaves before all have heard
        if error is not None:
            raise error  # rank 0 tells it
        raise SystemExit(status)


ALONE = Ranks()


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes that the launcher started, met; they part where the work under it is done."""
    here = entry.place()
    if here.world == 1:
        yield ALONE  # without torch, which takes seconds
        return
    import torch

    from fastrot import dist

    # a rank may be done with its share days before another
    dist.start(here, torch.device("cpu"), patience=timedelta(days=100))
    finished = False
    try:
        yield Ranks(here.rank, here.world, entry.share_of_cores(here.local_world))
        finished = True
    finally:
        dist.stop(together=finished)


def make_claim(folder: Path) -> Path:
    """A file by which ranks know that they share one folder of parts, and that it is still theirs.

    The next start in that folder removes it, so that ranks which a killed launcher left behind stop.
    """
    claim = folder / f"{CLAIM}.{secrets.token_hex(4)}"
    claim.touch()
    return claim


def await_shared(claim: Path) -> None:
    """Raises UsageError where this rank does not see the folder that rank 0 sees."""
    if not appears(claim.exists):
        raise UsageError(
            f"{claim.parent} is not the same folder for all ranks: choose an --out that they share"
        )


def appears(there: Callable[[], bool]) -> bool:
    """Whether it is there, now or soon: other machines see a new file late."""
    until = time.monotonic() + SEEN_WITHIN
    while not there():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
