"""A validation's scores, and the net that gives them: with --compile a compiled one, but for a ragged batch."""

import dataclasses

import jaxtyping
import pytest
import torch

from fastrot import assemble, config
from fastrot.config import RotNet, Within
from fastrot.core import View
from fastrot.training import loop
from fastrot.training.optim import LRSchedule
from fastrot.training.state import TrainState, build

CPU = torch.device("cpu")
CROP = Within(size=32, short=36, random=False, flip=False)
CFG = config.Config(
    method=RotNet(crop=CROP),
    backbone=config.AlexNet(width=0.1, kernel=5, stride=2),
    precision="fp32",
)


@pytest.fixture
def shapes_unchecked():
    """As users run it: torch.compile cannot look into the shape checks that only tests switch on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def state_and_loader(cfg: config.Config, images: int = 23, batch: int = 5):
    view = View(crops=(CROP,), shuffled=False)
    loader = assemble.open_loader(f"synthetic:{images}", view, batch=batch, enlarge=True)
    info = assemble.data_info(cfg, loader, None, CPU, torch.float32)
    return build(cfg, info, LRSchedule(cfg.schedule, epochs=1, batches=4, steps=4)), loader


def test_full_batches_go_through_the_net_of_evaluations_and_a_ragged_one_through_the_bare_net():
    state, loader = state_and_loader(CFG)
    expected, seen, bare = loop.validate(state, loader), [], []

    def spied(views):
        assert not state.method.net.training
        assert not torch.is_grad_enabled()
        seen.append(len(views))
        return state.method.net(views)

    state.eval_net = spied
    state.method.net.register_forward_hook(lambda net, views, out: bare.append(len(out)))
    assert loop.validate(state, loader) == expected
    assert seen == [20] * 4  # four rotations of each of five
    assert bare == [*seen, 12]
    assert state.method.net.training


def of_means(state: TrainState, loader) -> dict[str, float]:
    """What a validation should give, from the net and the method alone."""
    sums: dict[str, list[float]] = {}
    state.method.net.eval()
    for batch in loader.epoch(0):
        with torch.no_grad():
            scores = state.method.score(state.method.net(state.method.views(batch)), batch)
        for name, both in scores.items():
            held = sums.setdefault(name, [0.0, 0.0])
            held[:] = [mine + new.item() for mine, new in zip(held, both, strict=True)]
    state.method.net.train()
    return {name: total / count for name, (total, count) in sums.items()}


QUICK = config.AlexNet(width=0.1, kernel=5, stride=2, space_to_depth=True, fuse=True)
FORMS = {
    "plain": CFG,
    "all-quick-forms": dataclasses.replace(
        CFG, method=config.Decoupling(crop=CROP), backbone=QUICK
    ),
}


@pytest.mark.versions
@pytest.mark.parametrize("cfg", FORMS.values(), ids=FORMS)
def test_a_compiled_validation_is_the_bare_nets(cfg, shapes_unchecked, monkeypatch):
    """One more form of the net, whatever is trained meanwhile; its weights are those of the moment."""
    compile, formed, run = torch.compile, [], []

    def noted(graph, inputs):
        formed.append(inputs)

        def ran(*given):
            run.append(torch.is_grad_enabled())
            return graph.forward(*given)

        return ran

    def through(net, **how):
        assert how == {"fullgraph": True, "dynamic": False, "mode": None}
        return compile(net, backend=noted, fullgraph=True, dynamic=False)

    monkeypatch.setattr(torch, "compile", through)
    state, loader = state_and_loader(dataclasses.replace(cfg, compile=True))
    found = []
    for _ in range(2):
        expected, before = of_means(state, loader), len(run)
        found.append(loop.validate(state, loader))
        assert found[-1] == pytest.approx(expected, rel=1e-5)
        assert run[before:] == [False] * 4
        for batch in list(loader.epoch(0))[:4]:
            loop.train_step(state, batch)
    assert found[0] != found[1]
    assert len(formed) == 2  # of training, and of evaluations
