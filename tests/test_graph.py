"""A step that is recorded and played again is the step: losses, weights, bank. On a GPU: test_gpu.py."""

import copy
from collections.abc import Callable

import pytest
import test_methods
import torch
from tape import TapeRecorder
from test_run import TINY, assert_same_bits, told

from fastrot import assemble, config, dist, train
from fastrot.config import RunError, UsageError
from fastrot.core import Batch, Losses
from fastrot.methods.contrast import EMA
from fastrot.methods.decoupling import Decoupling
from fastrot.training import device as devices
from fastrot.training import loop
from fastrot.training.graph import WARM_UP, Graphed
from fastrot.training.loop import train_step
from fastrot.training.optim import LRSchedule, sgd
from fastrot.training.state import TrainState

STEPS, EPOCH = 30, 8  # steps in all, and of an epoch
MOVING = dict(dim=16, negatives=5, z="ema", proximal=0.1)


def batch(step: int, pictures: int = 4, kind: type = config.RotNet) -> Batch:
    """A batch of its own for each step, as a loader gives them to a method of this kind."""
    draw = torch.Generator().manual_seed(step)
    whole = test_methods.batch(step, kind)
    some = torch.randperm(test_methods.IMAGES, generator=draw)[:pictures]
    clock = torch.tensor([step // EPOCH, step])
    return Batch(
        tuple(crop[some] for crop in whole.crops), whole.index[some], whole.label[some], clock
    )


def build(kind: type, dtype: torch.dtype = torch.float32, more: dict | None = None):
    if more is not None:
        test_methods.FITTING[kind], before = more, test_methods.FITTING[kind]
        try:
            return build(kind, dtype)
        finally:
            test_methods.FITTING[kind] = before
    return test_methods.build(kind, dtype)


def moving() -> Decoupling:
    """Everything that changes from step to step: Z, and weights of the rotations that hold from an epoch on."""
    method = build(config.Decoupling, more=MOVING)
    method.weights = torch.rand(test_methods.IMAGES, 4, generator=torch.Generator().manual_seed(5))
    method.pu_epoch = 2
    return method


def halves() -> Decoupling:
    return build(config.Decoupling, torch.bfloat16, dict(MOVING, bank_dtype="bf16"))


METHODS: dict[str, Callable] = {
    **{kind.__name__: lambda kind=kind: build(kind) for kind in assemble.METHODS},
    "moving": moving,
    "bfloat16": halves,
    "tilted": lambda: test_methods.rotnet(angles=(0, 45), copies="one"),
}


def state_of(method, *, graphed: bool, fused: bool = True) -> TrainState:
    schedule = config.Schedule(kind="linear", table=((1, 0.02),), warmup=0.5)
    return TrainState(
        method=method,
        net=method.net,
        optimizer=sgd(method.net, config.Sgd(), 0.0, fused=fused),
        schedule=LRSchedule(schedule, epochs=4, batches=EPOCH, steps=STEPS),
        device=torch.device("cpu"),
        dtype=getattr(method.info, "dtype", torch.float32),
        graphed=Graphed(TapeRecorder()) if graphed else None,
    )


def steps(state: TrainState, until: int = STEPS) -> list[list[float]]:
    """The numbers of each step from here on, as the log would have them."""
    numbers = []
    kind = next(k for k, part in assemble.METHODS.items() if isinstance(state.method, part))
    while state.step < until:
        losses = train_step(state, batch(state.step, kind=kind))
        assert losses.vector is not None
        numbers.append(losses.vector.tolist())
        state.step += 1
    return numbers


def assert_same(mine: TrainState, other: TrainState) -> None:
    for name, value in test_methods.everything(mine.method).items():
        assert torch.equal(value, test_methods.everything(other.method)[name]), name
    momenta = [state.optimizer.state_dict()["state"] for state in (mine, other)]
    for key, value in momenta[0].items():
        assert torch.equal(value["momentum_buffer"], momenta[1][key]["momentum_buffer"])


def done(state: TrainState) -> list[str]:
    assert state.graphed is not None
    assert isinstance(state.graphed.recorder, TapeRecorder)
    return state.graphed.recorder.done


@pytest.mark.parametrize("name", METHODS)
def test_a_played_run_is_the_run(name):
    """Other pictures, another rate and another clock in each step; to the bit."""
    plain = state_of(METHODS[name](), graphed=False)
    played = state_of(METHODS[name](), graphed=True)
    assert steps(plain) == steps(played)
    assert_same(plain, played)
    assert done(played) == ["aside"] * WARM_UP + ["record"] + ["play"] * (STEPS - WARM_UP)


@pytest.mark.parametrize("stop", [5, WARM_UP, 20])
def test_a_run_goes_on_in_the_middle(stop):
    """In a new process, which warms up and records anew; and in this one, where all lies elsewhere then."""
    straight = state_of(moving(), graphed=False)
    numbers = steps(straight)
    first = state_of(moving(), graphed=True)
    steps(first, stop)
    saved = copy.deepcopy(first.state_dict())
    again = state_of(moving(), graphed=True)
    again.load_state_dict(copy.deepcopy(saved))
    assert steps(again) == numbers[stop:]
    assert_same(straight, again)
    steps(first, min(stop + 5, STEPS))
    first.load_state_dict(saved)
    assert steps(first) == numbers[stop:]
    assert_same(straight, first)


def test_a_batch_of_other_shapes_takes_an_ordinary_step():
    plain, played = state_of(moving(), graphed=False), state_of(moving(), graphed=True)
    for state in (plain, played):
        steps(state, 20)
        train_step(state, batch(20, pictures=3))
        state.step += 1
    assert done(played).count("play") == 20 - WARM_UP
    assert steps(plain) == steps(played)
    assert done(played).count("record") == 1


def test_a_recorded_step_keeps_nothing_of_the_callers_batch():
    state = state_of(moving(), graphed=True)
    steps(state, 20)
    given = batch(20)
    train_step(state, given)
    assert state.graphed is not None
    assert state.graphed.batch is not None
    mine = [*state.graphed.batch.crops, state.graphed.batch.index, state.graphed.batch.epoch_step]
    others = [*given.crops, given.index, given.epoch_step]
    for held, new in zip(mine, others, strict=True):
        assert torch.equal(held, new)
        assert held.data_ptr() != new.data_ptr()


# ---- what would not be the run, shown by the same comparison ----


class OfHost(Decoupling):
    """A loss that reads a number which Python holds and changes."""

    count = 0

    def losses(self, outputs, batch) -> Losses:
        self.count += 1
        losses = super().losses(outputs, batch)
        return Losses(
            {k: v * (1 + 0.1 * self.count) for k, v in losses.terms.items()}, losses.metrics
        )


class Rebound(Decoupling):
    """Z put into a new tensor each step."""

    def after_step(self, outputs, batch, losses) -> None:
        assert self.contrast is not None
        self.contrast.bank.update(batch.index, outputs.embedding.detach())
        now = losses.metrics["z"].detach() / self.contrast.bank.population
        self.contrast.mean_exp = EMA * self.contrast.mean_exp + (1 - EMA) * now


class Asking(Decoupling):
    def losses(self, outputs, batch) -> Losses:
        losses = super().losses(outputs, batch)
        return losses if losses.total.item() > 0 else Losses({}, {})


class Making(Decoupling):
    def losses(self, outputs, batch) -> Losses:
        losses = super().losses(outputs, batch)
        return Losses({k: v * torch.tensor(2.0) for k, v in losses.terms.items()}, losses.metrics)


def as_(kind: type, method: Decoupling) -> Decoupling:
    method.__class__ = kind
    return method


@pytest.mark.parametrize("kind", [OfHost, Rebound])
def test_a_number_that_is_not_on_the_device_would_be_seen(kind):
    plain = state_of(as_(kind, moving()), graphed=False)
    played = state_of(as_(kind, moving()), graphed=True)
    mine, others = steps(plain), steps(played)
    # the first step that is played has the recording's numbers, which are its own
    assert mine[: WARM_UP + 1] == others[: WARM_UP + 1]
    assert mine[WARM_UP + 2 :] != others[WARM_UP + 2 :]


def test_a_rate_that_is_not_on_the_device_would_be_seen():
    plain = state_of(moving(), graphed=False, fused=False)
    played = state_of(moving(), graphed=True, fused=False)
    assert steps(plain) != steps(played)


@pytest.mark.parametrize(("kind", "words"), [(Asking, "value"), (Making, "host's memory")])
def test_what_a_graph_cannot_hold_is_refused(kind, words):
    state = state_of(as_(kind, moving()), graphed=True)
    with pytest.raises(AssertionError, match=words):
        steps(state)
    assert state.step == WARM_UP


# ---- whole runs ----


@pytest.fixture
def on_tape(monkeypatch):
    """--graph on a CPU, through the stand-in."""
    monkeypatch.setattr("fastrot.training.state.Cuda", TapeRecorder)
    monkeypatch.setattr(devices, "check_fast_forms", lambda *_: None)


DECOUPLING = ["decoupling-alexnet", *TINY[1:], "--backbone.kernel", "5", "--backbone.stride", "2"]
DECOUPLING += ["--method.z", "ema", "--method.negatives", "20", "--method.dim", "16"]


PIRL = ["pirl-alexnet", *TINY[1:], "--backbone.kernel", "5", "--backbone.stride", "2"]
PIRL += ["--method.negatives", "20", "--method.dim", "16", "--lr", "0.003"]


@pytest.mark.parametrize(
    "task", [DECOUPLING, pytest.param(PIRL, marks=pytest.mark.soak)], ids=["decoupling", "pirl"]
)
def test_a_whole_run_is_the_same_with_a_graph(task, pictures, tmp_path, on_tape, capsys):
    """Validations, log lines, checkpoints and a resumption between and in the middle of recorded steps."""

    def go(name: str, *more: str) -> None:
        args = ["--data", str(pictures), "--out", str(tmp_path / name), "--schedule.steps", "30"]
        assert train.main([*task, *args, "--schedule.kind", "cosine", *more]) == 0

    go("plain")
    assert "CUDA graph" not in capsys.readouterr().out
    go("graph", "--graph", "--max-steps", "17")
    assert "one CUDA graph, recorded after 11 steps" in capsys.readouterr().out
    go("graph", "--graph")
    assert told(tmp_path / "plain") == told(tmp_path / "graph")
    last = [tmp_path / name / "checkpoints" / "last.pt" for name in ("plain", "graph")]
    states = [torch.load(path, weights_only=True) for path in last]
    for state, path in zip(states, last, strict=True):
        state["config"]["graph"] = False  # what else there is must be the same
        torch.save(state, path)
    assert_same_bits(*last)


def test_not_a_number_stops_a_recorded_run_too(pictures, tmp_path, on_tape, monkeypatch):
    step = loop.train_step

    def poisoned(state, batch):
        if state.step == 16:
            with torch.no_grad():
                next(state.method.net.parameters()).fill_(torch.nan)
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", poisoned)
    args = ["--data", str(pictures), "--out", str(tmp_path), "--graph"]
    with pytest.raises(RunError, match="not finite at step 18"):
        train.main([*TINY, *args])


def test_a_budget_is_measured_and_undone_with_a_graph(pictures, tmp_path, on_tape):
    more = ["--data", str(pictures), "--max-steps", "13", "--schedule.kind", "constant", "--graph"]
    budget = ["--schedule.steps", "None", "--budget", "2h"]
    assert train.main([*DECOUPLING, *more, *budget, "--out", str(tmp_path / "a")]) == 0
    assert train.main([*DECOUPLING, *more, "--out", str(tmp_path / "b")]) == 0
    a, b = (torch.load(tmp_path / x / "checkpoints" / "last.pt", weights_only=True) for x in "ab")
    assert all(torch.equal(a["net"][k], b["net"][k]) for k in a["net"])
    assert torch.equal(a["method"]["bank.rows"], b["method"]["bank.rows"])


# ---- what is refused ----

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
WRONG = {
    "on-a-cpu": (dict(graph=True), dist.Place(), CPU, "on a CPU"),
    "two-processes": (dict(graph=True), dist.Place(world=2), GPU, "there are 2 processes"),
    "fp16": (dict(graph=True, precision="fp16"), dist.Place(), GPU, "--precision fp16"),
    "deterministic": (dict(graph=True, deterministic=True), dist.Place(), GPU, "--deterministic"),
    "apex-on-a-cpu": (dict(optim=config.Sgd(kernel="apex")), dist.Place(), CPU, "apex wants a GPU"),
}


@pytest.mark.parametrize(("knobs", "here", "device", "names"), WRONG.values(), ids=WRONG)
def test_forms_that_do_not_fit_are_refused(knobs, here, device, names):
    with pytest.raises(UsageError, match=names) as refused:
        devices.check_fast_forms(config.Config(**{"precision": "bf16", **knobs}), here, device)
    assert "\n" not in str(refused.value)


def test_a_graph_wants_the_kernels_and_torchs_optimiser(monkeypatch):
    apex = config.Config(graph=True, precision="bf16", optim=config.Sgd(kernel="apex"))
    with pytest.raises(UsageError, match="no rate that a graph can read"):
        devices.check_fast_forms(apex, dist.Place(), GPU)
    cfg = config.Config(graph=True, precision="bf16")
    devices.check_fast_forms(cfg, dist.Place(), GPU)
    devices.check_fast_forms(config.Config(), dist.Place(world=2), CPU)
    monkeypatch.setenv("FASTROT_OPS", "reference")
    with pytest.raises(UsageError, match="FASTROT_OPS=reference"):
        devices.check_fast_forms(cfg, dist.Place(), GPU)


def test_a_mode_of_compile_wants_compile(pictures, tmp_path):
    mode = ["--compile-mode", "max-autotune-no-cudagraphs"]
    args = ["--data", str(pictures), "--out", str(tmp_path)]
    with pytest.raises(UsageError, match=r"--compile-mode .* wants --compile"):
        train.main([*TINY, *args, *mode])
    with pytest.raises(UsageError, match=r"--graph .* on a CPU"):
        train.main([*TINY, *args, "--graph"])
