"""Run by test_end_to_end under torchrun, or alone: the losses of some steps of RotNet, in float64.

BatchNorm stays in eval mode: its batch statistics are each rank's own, so that in training mode two ranks
are not one process by construction. All else (order, crops, turns, gradients, SGD) must agree.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastrot import assemble, config, dist
from fastrot.loop import TrainState, train_step
from fastrot.optim import Rates, sgd

STEPS, GLOBAL_BATCH, SIZE = 12, 8, 32


def main(pictures: str, out: str) -> None:
    here = dist.place()
    dist.start(here, torch.device("cpu"))
    cfg = config.Config(
        batch=GLOBAL_BATCH // here.world,
        method=config.RotNet(crop=config.RandomResized(size=SIZE)),
        backbone=config.AlexNet(width=0.125, kernel=5, stride=2),
    )
    loader = assemble.open_loader(
        pictures,
        assemble.training_view(cfg),
        batch=cfg.batch,
        rank=here.rank,
        world=here.world,
        workers=0,
        enlarge=True,
    )
    facts = assemble.facts(cfg, loader, None, torch.device("cpu"), torch.float64)
    torch.manual_seed(0)
    method = assemble.method(cfg, facts)
    method.net.double().eval()
    rates = Rates(cfg.schedule, epochs=9, batches=len(loader), steps=STEPS, lr=0.05)
    state = TrainState(
        method=method,
        net=assemble.wrapped(method.net, cfg, torch.device("cpu")),
        optimizer=sgd(method.net, cfg.optim, 0.05),
        rates=rates,
        device=torch.device("cpu"),
        dtype=torch.float32,  # no autocast: the weights are float64
    )
    losses, seen = [], []
    while state.step < STEPS:
        for batch in loader.epoch(*divmod(state.step, len(loader))):
            total = train_step(state, batch).total
            losses.append((dist.sum_over_ranks(total) / here.world).item())
            seen.append(sorted(dist.gather_rows(batch.index).tolist()))
            state.step += 1
            if state.step == STEPS:
                break
    weights = torch.cat([p.detach().flatten() for p in method.net.parameters()])
    if here.rank == 0:
        Path(out).write_text(
            json.dumps({"losses": losses, "seen": seen, "weights": weights[:2000].tolist()})
        )
    dist.stop(together=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
