"""Run by test_end_to_end under torchrun, or alone: the losses of some steps of each method, in float64.

BatchNorm stays in eval mode: its batch statistics are each rank's own, so that in training mode two ranks
are not one process by construction. All else (order, crops, rotations, gradients, SGD) must agree.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastrot import assemble, config, dist
from fastrot.ops.nce import drawn
from fastrot.training.loop import train_step
from fastrot.training.optim import LRSchedule, sgd
from fastrot.training.state import TrainState, wrapped

STEPS, GLOBAL_BATCH, SIZE = 12, 8, 32
CROP = config.RandomResized(size=SIZE)
METHODS = {
    "rotnet": config.RotNet(crop=CROP),
    "decoupling": config.Decoupling(crop=CROP, dim=16, negatives=50, z="ema", proximal=0.1),
    "pirl": config.Pirl(crop=CROP, dim=16, negatives=20, z="ema"),
}

RATES = {
    "rotnet": 0.05,
    "decoupling": 0.002,
    "pirl": 0.002,
}  # without BatchNorm's help more would not last


def main(pictures: str, out: str) -> None:
    here = dist.place()
    dist.start(here, torch.device("cpu"))
    told = {name: of_method(pictures, name, here) for name in METHODS}
    if here.rank == 0:
        Path(out).write_text(json.dumps(told))
    dist.stop(together=True)


def of_method(pictures: str, name: str, here: dist.Place) -> dict:
    cfg = config.Config(
        batch=GLOBAL_BATCH // here.world,
        method=METHODS[name],
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
    info = assemble.data_info(cfg, loader, None, torch.device("cpu"), torch.float64)
    torch.manual_seed(0)
    method = assemble.method(cfg, info)
    method.net.double().eval()
    contrast = getattr(method, "contrast", None)
    if contrast is not None:
        bank = contrast.bank
        bank.rows, contrast.mean_exp = bank.rows.double(), contrast.mean_exp.double()
    rates = LRSchedule(cfg.schedule, epochs=9, batches=len(loader), steps=STEPS, lr=RATES[name])
    state = TrainState(
        method=method,
        net=wrapped(method.net, cfg, torch.device("cpu")),
        optimizer=sgd(method.net, cfg.optim, RATES[name]),
        schedule=rates,
        device=torch.device("cpu"),
        dtype=torch.float32,  # no autocast: the weights are float64
    )
    losses, seen, negatives = [], [], []
    while state.step < STEPS:
        for batch in loader.epoch(*divmod(state.step, len(loader))):
            total = train_step(state, batch).total
            losses.append((dist.sum_over_ranks(total) / here.world).item())
            index = dist.gather_rows(batch.index)
            seen.append(sorted(index.tolist()))
            if contrast is not None:
                draw = contrast.negatives(batch)
                mine = drawn(draw, bank.place[batch.index], len(bank.rows))
                negatives.append(dist.gather_rows(mine)[index.argsort()].tolist())
            state.step += 1
            if state.step == STEPS:
                break
    weights = torch.cat([p.detach().flatten() for p in method.net.parameters()])
    told = {"losses": losses, "seen": seen, "weights": weights[:2000].tolist()}
    if contrast is not None:
        told |= {"negatives": negatives, "bank": bank.rows.flatten().tolist()}
        told |= {"z": float(contrast.mean_exp)}
        of_all = dist.gather_rows(bank.rows[None])
        assert all(torch.equal(of_all[0], other) for other in of_all), "banks differ"
    return told


if __name__ == "__main__":
    main(*sys.argv[1:])
    threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    # one that ends with the interpreter may abort the process
    assert not any("gloo" in name for name in threads), threads
