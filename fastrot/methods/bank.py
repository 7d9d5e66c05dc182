"""The memory bank: one row per picture of the training view, on every rank or shared out among them.

Shapes.  N rows of D numbers, float32 or bfloat16. A picture's place is its position in the training view: pictures
         that are held out have none, so population and draws range over rows that are trained.
Idea.    Replicated: each rank holds all rows; the features of all ranks are gathered and written in rank order, so that
         the banks stay equal to the bit. Sharded: rank r of W holds the places p with p % W == r, which are the pictures
         that it learns from (`View.owned`); it contrasts with these alone and asks nobody.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from fastrot import dist
from fastrot.config import UsageError
from fastrot.core import DataInfo
from fastrot.ops.rows import update_rows

CHUNK = 2**16  # rows that are initialised or gathered at once
BANK = 0x62616E6B  # "bank": keeps its draws apart from those of the weights, which come from the same seed


class Bank:
    """Rows that learn by their own rule, not by gradients.

    rows        [n, dim]: all N of them, or this rank's
    place       int64 [data rows]: the row of `rows` that is a picture's; -1: it has none here
    population  n, which NCE wants to know

    A fresh row is uniform in +-sqrt(3 / dim) with a mean square length of 1, as in Wu 2018's code, with `unit` of length 1, as in
    PIRL's; it depends on the seed and its place alone, not on the ranks.
    """

    def __init__(
        self,
        info: DataInfo,
        dim: int,
        *,
        dtype: torch.dtype,
        sharded: bool,
        momentum: float,
        unit: bool = False,
    ):
        self.sharded, self.momentum = sharded and dist.world() > 1, momentum
        self.images, self.fingerprint = info.images, info.fingerprint
        self._rank, self._world = (dist.rank(), dist.world()) if self.sharded else (0, 1)
        of_data = torch.arange(info.images) if info.rows is None else torch.from_numpy(info.rows)
        mine = of_data[self._rank :: self._world]
        place = torch.full((info.data_rows,), -1, dtype=torch.int64)
        place[mine] = torch.arange(len(mine))
        self.place, self.population = place.to(info.device), len(mine)
        self.rows = torch.empty(len(mine), dim, dtype=dtype, device=info.device)
        self._fill(info.seed, unit)

    def of(self, index: Int64[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """The rows of some pictures, in float32 at least; NaN for one that has none here."""
        place = self.place[index]
        rows = self.rows[place].masked_fill((place < 0)[:, None], torch.nan)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def update(self, index: Int64[Tensor, " b"], features: Float[Tensor, "b d"]) -> None:
        """Blend the features of all ranks' pictures into their rows: unit(m row + (1 - m) feature).

        A picture that occurs twice gets its last feature: the highest rank's, the last of its batch.
        """
        if not self.sharded:
            index, features = dist.gather_rows(index), dist.gather_rows(features)
        # where row and feature cancel out the original writes NaN; guarded, the row becomes zero and recovers
        update_rows(self.rows, self.place[index], features, self.momentum, eps=1e-12)

    def state_dict(self) -> dict[str, Tensor]:
        """All N rows in the order of the view, on rank 0; called on all ranks. What it gives is not a copy."""
        state = {"fingerprint": torch.tensor(list(self.fingerprint.encode()), dtype=torch.uint8)}
        if not self.sharded:
            return {"rows": self.rows, **state}
        most = -(-self.images // self._world)  # rows of a rank; the last ranks may have one less
        shape = (self.images if self._rank == 0 else 0, self.rows.shape[1])
        whole = torch.empty(shape, dtype=self.rows.dtype)
        for start in range(0, most, CHUNK):
            length = min(CHUNK, most - start)
            mine = self.rows.new_zeros(length, self.rows.shape[1])
            own = self.rows[start : start + length]
            mine[: len(own)] = own
            each = dist.gather_rows(mine).unflatten(0, (self._world, length))
            if self._rank == 0:
                in_order = each.transpose(0, 1).flatten(0, 1).cpu()
                part = whole[start * self._world : (start + length) * self._world]
                part.copy_(in_order[: len(part)])
        return {"rows": whole, **state} if self._rank == 0 else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take this rank's rows of all N, whatever the number of ranks that saved them.

        Raises UsageError for rows of another training view.
        """
        rows, found = state["rows"], bytes(state["fingerprint"].tolist()).decode()
        if found != self.fingerprint or len(rows) != self.images:
            other = "the memory bank is of other pictures"
            raise UsageError(f"{other}: give the --data it was made from, or --out NEW")
        self.rows.copy_(rows[self._rank :: self._world])

    def describe(self) -> str:
        size = self.rows.numel() * self.rows.element_size() / 2**20
        dtype = str(self.rows.dtype).removeprefix("torch.")
        what = f"{len(self.rows):,} x {self.rows.shape[1]} {dtype}, {size:,.1f} MB"
        if not self.sharded:
            return f"memory bank: {what} on each rank"
        return (
            f"memory bank: {self.images:,} rows over {self._world} ranks; rank {self._rank} holds {what}, "
            f"and contrasts with its own: population {len(self.rows):,}"
        )

    def _fill(self, seed: int, unit: bool) -> None:
        """All ranks draw the same N rows, and keep their own."""
        draw = torch.Generator().manual_seed(seed ^ BANK)
        bound, done = math.sqrt(3 / self.rows.shape[1]), 0
        for start in range(0, self.images, CHUNK):
            whole = torch.empty(min(CHUNK, self.images - start), self.rows.shape[1])
            whole.uniform_(-bound, bound, generator=draw)
            if unit:
                whole = F.normalize(whole, dim=1)
            first = (self._rank - start) % self._world
            mine = whole[first :: self._world]
            self.rows[done : done + len(mine)] = mine.to(self.rows.device)
            done += len(mine)
