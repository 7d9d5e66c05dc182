"""Run by test_end_to_end under torchrun: the gradients of one batch a rank, as each form of sending them gives them."""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastrot import assemble, config, dist
from fastrot.training import state

CPU = torch.device("cpu")


def main(out: str) -> None:
    here = dist.place()
    dist.start(here, CPU)
    torch.manual_seed(0)
    net = assemble.backbone(config.AlexNet(width=0.125, kernel=5, stride=2), 32)
    net.to(memory_format=torch.channels_last).eval()
    torch.manual_seed(1 + here.rank)
    views = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)

    def gradients(forward) -> torch.Tensor:
        net.zero_grad()
        forward(views).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    own = dist.gather_rows(gradients(net)[None])
    found = {"own": own}
    for sent in ("fp32", "bf16"):
        cfg = dataclasses.replace(config.Config(), gradients=sent)
        wrapped = state.wrapped(net, cfg, CPU)
        gradients(wrapped)  # behind it the buckets are others
        mine = gradients(wrapped).clone()
        each = dist.gather_rows(mine[None])
        found |= {sent: each[0].clone(), f"other_{sent}": each[-1].clone()}
        del wrapped
    if here.rank == 0:
        torch.save(found, out)
    dist.stop(together=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
