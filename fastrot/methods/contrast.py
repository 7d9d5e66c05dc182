"""Features told apart by a memory bank: a picture's own row against K rows of others, by NCE or InfoNCE.

Shapes.  B pictures, D features of unit length, K negatives drawn for each picture and step.
Z.       NCE's constant, from the first batch of all ranks; it stays, or follows as a moving mean. It is kept as
         Z / population, the mean of exp(s / T), which does not depend on how many rows a rank holds.
"""

from typing import Any

import torch
from torch import Tensor

from fastrot import dist
from fastrot.config import MemoryBank
from fastrot.core import DTYPES, Batch, DataInfo
from fastrot.methods.bank import Bank
from fastrot.ops.nce import Draw, Each, Features, estimate_z, nce_loss_and_mass

EMA = 0.99  # of Z, where it follows: what He found to work (HobbitLong/CMC, issue 23)


class Contrast:
    """A bank, and what is asked of it.

    cfg    a method's config, whose knobs of the bank are called as config.MemoryBank's
    asked  whether for `loss`, whose constant Z is then kept up where it is NCE's
    unit   whether fresh rows have unit length
    eps    of NCE: see ops/nce.py
    """

    def __init__(
        self,
        cfg: MemoryBank,
        info: DataInfo,
        *,
        asked: bool = True,
        unit: bool = False,
        eps: float = 1e-7,
    ):
        self.cfg, self.info, self.wants_z = cfg, info, asked and cfg.contrast == "nce"
        self.eps = eps
        kind = {"dtype": DTYPES[cfg.bank_dtype], "sharded": cfg.bank == "sharded", "unit": unit}
        self.bank = Bank(info, cfg.dim, **kind, momentum=cfg.bank_momentum)
        self.mean_exp = torch.full((), torch.nan, device=info.device)

    def negatives(self, batch: Batch, view: int = 0) -> Tensor | Draw:
        """Drawn for each picture, view and step inside the kernel: the same whatever its rank or place."""
        cfg, seed, step = self.cfg, self.info.seed ^ view << 48, batch.epoch_step[1]
        return Draw(cfg.negatives, seed, batch.index, step, exclude_self=cfg.exclude_self)

    def before_first_step(self, features: Features, batch: Batch, view: int = 0) -> None:
        """Z, from the first batch of all ranks."""
        if self.wants_z:
            asked = self._asked(features, batch, view)
            mean = estimate_z(*asked, temperature=self.cfg.temperature, population=1)
            self.mean_exp = dist.sum_over_ranks(mean) / dist.world()

    def loss(
        self, features: Features, batch: Batch, view: int = 0
    ) -> tuple[Each, dict[str, Tensor]]:
        """Each picture's loss, and of this batch `z`, where there is one; each `view` of pictures has negatives of its own."""
        population = self.bank.population
        loss, mass = nce_loss_and_mass(
            *self._asked(features, batch, view),
            temperature=self.cfg.temperature,
            eps=self.eps,
            z=self.mean_exp * population if self.wants_z else None,
            population=population,
            kind=self.cfg.contrast,
        )
        if not self.wants_z:
            return loss, {}
        return loss, {"z": mass.mean() / (self.cfg.negatives + 1) * population}

    def distance(self, features: Features, batch: Batch) -> Each:
        """Square distance from each picture's own row."""
        return (features - self.bank.of(batch.index)).square().sum(dim=1)

    @torch.no_grad()
    def after_step(self, features: Tensor, batch: Batch, z: Tensor | None) -> None:
        """The features of before the step go into the bank; Z follows where it shall. `z`: of the batch."""
        self.bank.update(batch.index, features.detach())
        if self.cfg.z == "ema" and self.wants_z:
            assert z is not None
            now = z.detach() / self.bank.population
            if not self.bank.sharded:
                now = dist.sum_over_ranks(now) / dist.world()
            # in place: a captured graph goes on reading this tensor
            self.mean_exp.copy_(EMA * self.mean_exp + (1 - EMA) * now)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"bank.{name}": value for name, value in self.bank.state_dict().items()}
        if self.wants_z:  # a rank's own, with a sharded bank
            state["mean_exp"] = dist.gather_rows(self.mean_exp[None])
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        bank = {k.removeprefix("bank."): v for k, v in state.items() if k.startswith("bank.")}
        self.bank.load_state_dict(bank)
        if self.wants_z:
            each = state["mean_exp"].to(self.mean_exp.device)
            own = each[dist.rank()] if len(each) == dist.world() else each.mean()
            self.mean_exp = own.clone()

    def resume_contract(self) -> dict[str, Any]:
        return {"bank": {"rows": self.bank.images, "dim": self.cfg.dim}}

    def _asked(self, features: Tensor, batch: Batch, view: int = 0) -> tuple[Any, ...]:
        """The features, the bank, each picture's row of it, and its negatives."""
        place, negatives = self.bank.place[batch.index], self.negatives(batch, view)
        return features, self.bank.rows, place, negatives
