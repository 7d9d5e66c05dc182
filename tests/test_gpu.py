"""What only a GPU can show: no wait inside a step, half precision, compile, resuming. `make gpu` runs it."""

import contextlib
import copy
import itertools
import json
import re
import typing

import jaxtyping
import pytest
import torch
from test_run import TINY, assert_same_bits

from fastrot import assemble, config, train
from fastrot.data.pack.write import PackOptions
from fastrot.data.prepare.convert import convert
from fastrot.ops.choice import using
from fastrot.speed import bounds
from fastrot.training import checkpoint, loop
from fastrot.training.graph import WARM_UP, Cuda, Graphed
from fastrot.training.loop import train_step, validate
from fastrot.training.optim import LRSchedule, sgd
from fastrot.training.state import TrainState, wrapped
from fastrot.training.writer import Writer

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
CROP = config.RandomResized(size=64)
METHODS = {
    "rotnet": config.RotNet(crop=CROP),
    "decoupling": config.Decoupling(crop=CROP, z="ema", proximal=0.1),
    "pirl": config.Pirl(crop=CROP, negatives=200),
    "decoupling-bf16-infonce": config.Decoupling(crop=CROP, bank_dtype="bf16", contrast="infonce"),
}
ON_GPU = [word if word != "cpu" else "cuda" for word in TINY]


def state_and_loader(data, dtype: torch.dtype, method: str = "rotnet", batch: int = 16, **knobs):
    knobs = {"backbone": config.AlexNet(width=0.25, kernel=5, stride=2), **knobs}
    cfg = config.Config(method=METHODS[method], **knobs)
    view = assemble.training_view(cfg)
    loader = assemble.open_loader(data, view, batch=batch, device=CUDA, enlarge=True)
    info = assemble.data_info(cfg, loader, None, CUDA, dtype)
    torch.manual_seed(0)
    task = assemble.method(cfg, info)
    task.net.to(CUDA).to(memory_format=torch.channels_last)
    state = TrainState(
        method=task,
        net=wrapped(task.net, cfg, CUDA),
        optimizer=sgd(task.net, cfg.optim, 0.05),
        schedule=LRSchedule(
            cfg.schedule, epochs=1, batches=len(loader), steps=len(loader), lr=0.05
        ),
        device=CUDA,
        dtype=dtype,
        graphed=Graphed(Cuda(CUDA)) if cfg.graph else None,
    )
    return state, loader


def step_without_waiting(state: TrainState, loader, warm: int) -> None:
    """Some steps that may wait, for allocations and kernels, then five that must not."""
    batches = loader.epoch(0)
    for k in range(warm + 5):
        if k == warm:
            torch.cuda.set_sync_debug_mode("error")
        try:
            losses = train_step(state, next(batches))
            state.step += 1
            state.meter.add(losses)
        except BaseException:
            torch.cuda.set_sync_debug_mode("default")
            raise
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses.total)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_in_a_step_waits_for_the_gpu(dtype, method, pictures):
    """Loader, views, network, losses, descent, the bank's write, running means."""
    step_without_waiting(*state_and_loader("synthetic:400", dtype, method), warm=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_played_step_does_not_wait_either(dtype, method, pictures):
    state, loader = state_and_loader("synthetic:400", dtype, method, graph=True)
    step_without_waiting(state, loader, warm=WARM_UP + 2)


def test_a_played_step_of_all_quick_forms_does_not_wait(pictures, shapes_unchecked):
    """Compiled, conv1 in cells, batch norm fused, recorded: what an epoch is timed in."""
    quick = config.AlexNet(width=0.25, kernel=5, stride=2, space_to_depth=True, fuse=True)
    forms = {"backbone": quick, "compile": True}
    state, loader = state_and_loader(
        "synthetic:400", torch.bfloat16, "decoupling", graph=True, **forms
    )
    step_without_waiting(state, loader, warm=WARM_UP + 2)


@pytest.mark.parametrize("placement", ["resident", "pinned"])
@pytest.mark.parametrize("graph", [False, True])
def test_nothing_waits_where_pictures_come_from_a_pack(placement, graph, pictures, tmp_path):
    """Its crops are cut out on the GPU itself, beside the step that uses the batch before."""
    out = tmp_path / "a.pack"
    convert(PackOptions(source="imagefolder", root=pictures, out=out, workers=0))
    data = assemble.open_data(out, placement=placement)
    state, loader = state_and_loader(data, torch.bfloat16, "decoupling", graph=graph, batch=2)
    step_without_waiting(state, loader, warm=WARM_UP + 2)


def test_a_bank_on_the_gpu_is_the_cpus(pictures):
    """Steps with the kernels and with the references, from the same weights: losses, Z, rows written."""
    with using("triton"):
        kernel, loader = state_and_loader("synthetic:400", torch.float32, "decoupling")
    plain, _ = state_and_loader("synthetic:400", torch.float32, "decoupling")
    plain.method.net.load_state_dict(kernel.method.net.state_dict())
    for batch in itertools.islice(loader.epoch(0), 3):
        found = []
        for state, form in ((kernel, "triton"), (plain, "reference")):
            with using(form):
                found.append(train_step(state, batch))
            state.step += 1
        plain.method.net.load_state_dict(kernel.method.net.state_dict())
        for name, value in found[0].terms.items():
            torch.testing.assert_close(value, found[1].terms[name], rtol=1e-3, atol=1e-5, msg=name)
    mine, others = kernel.method.state_dict(), plain.method.state_dict()
    torch.testing.assert_close(mine["mean_exp"], others["mean_exp"], rtol=1e-3, atol=0)
    torch.testing.assert_close(mine["bank.rows"], others["bank.rows"], rtol=1e-2, atol=1e-3)


def test_a_damaged_feature_stops_the_run_at_the_next_log_line(pictures, tmp_path):
    args = ["decoupling-alexnet", *ON_GPU[1:], "--backbone.kernel", "5", "--backbone.stride", "2"]
    with pytest.raises(config.RunError, match="finite"):
        train.main([*args, "--data", str(pictures), "--out", str(tmp_path), "--lr", "1e30"])


def test_numbers_of_both_devices_are_looked_at():
    """A sharded bank is gathered in host memory, the weights lie on the GPU."""
    good = [torch.ones(2), torch.ones(2, device=CUDA)]
    assert checkpoint.all_finite(good)
    assert not checkpoint.all_finite([*good, torch.tensor([torch.nan])])
    assert not checkpoint.all_finite([*good, torch.tensor([torch.nan], device=CUDA)])


def test_crops_on_the_gpu_are_those_of_the_cpu(pictures):
    cfg = config.Config()
    view = assemble.training_view(cfg)
    both = [
        list(
            assemble.open_loader(
                str(pictures), view, batch=5, device=device, workers=2, enlarge=True
            ).epoch(1)
        )
        for device in ("cpu", CUDA)
    ]
    for host, device in zip(*both, strict=True):
        assert torch.equal(host.images, device.images.cpu())
        assert torch.equal(host.index, device.index.cpu())
        assert torch.equal(host.epoch_step, device.epoch_step.cpu())


TASKS = {
    "rotnet": ON_GPU,
    "decoupling": [
        *("decoupling-alexnet", *ON_GPU[1:], "--backbone.kernel", "5", "--backbone.stride", "2"),
        *("--method.z", "ema"),
    ],
}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("task", TASKS)
def test_a_deterministic_run_resumes_to_the_same_bits(task, precision, pictures, tmp_path):
    args = [*TASKS[task], "--precision", precision, "--deterministic", "--data", str(pictures)]
    try:
        train.main([*args, "--out", str(tmp_path / "straight")])
        train.main([*args, "--out", str(tmp_path / "broken"), "--max-steps", "7"])
        train.main([*args, "--out", str(tmp_path / "broken")])
    finally:
        torch.use_deterministic_algorithms(False)
    last = [tmp_path / name / "checkpoints" / "last.pt" for name in ("straight", "broken")]
    assert_same_bits(*last)


def test_a_run_that_is_not_deterministic_resumes_to_rounding(pictures, tmp_path):
    args = [*ON_GPU, "--data", str(pictures)]
    train.main([*args, "--out", str(tmp_path / "straight")])
    train.main([*args, "--out", str(tmp_path / "broken"), "--max-steps", "7"])
    train.main([*args, "--out", str(tmp_path / "broken")])
    a, b = (
        checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")
        for name in ("straight", "broken")
    )
    assert a["step"] == b["step"]
    for name, value in a["net"].items():
        torch.testing.assert_close(value, b["net"][name], rtol=1e-2, atol=1e-3)


@pytest.fixture
def shapes_unchecked():
    """As users run it: torch.compile cannot look into the shape checks that only tests switch on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_compiled_step_is_the_eager_one(pictures, shapes_unchecked, monkeypatch):
    """Each step from the same weights, since rounding grows from step to step; in whole float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    eager, loader = state_and_loader("synthetic:400", torch.float32)
    compiled, _ = state_and_loader("synthetic:400", torch.float32, compile=True)
    for batch in itertools.islice(loader.epoch(0), 4):
        compiled.method.net.load_state_dict(eager.method.net.state_dict())
        compiled.optimizer.load_state_dict(copy.deepcopy(eager.optimizer.state_dict()))
        mine, other = train_step(eager, batch).total, train_step(compiled, batch).total
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
        learnt = compiled.method.net.state_dict()
        for name, weight in eager.method.net.state_dict().items():
            torch.testing.assert_close(learnt[name], weight, rtol=1e-2, atol=1e-3, msg=name)
        eager.step, compiled.step = eager.step + 1, compiled.step + 1


def test_validation_and_learning_in_half_precision(pictures):
    state, loader = state_and_loader(str(pictures), torch.bfloat16)
    batch = next(iter(loader.epoch(0)))
    losses = []
    for _ in range(40):
        losses.append(train_step(state, batch).total.item())
    assert losses[-1] < losses[0]
    assert 0 <= validate(state, loader)["accuracy"] <= 1
    assert loop.checkpoint.all_finite(list(state.method.net.state_dict().values()))


def test_a_profile_tells_the_gpus_time_by_parts(pictures, tmp_path):
    train.main([*ON_GPU, "--data", str(pictures), "--out", str(tmp_path), "--profile"])
    head, table, _ = (tmp_path / "profile" / "table.txt").read_text().split("\n\n", 2)
    assert head == "steps 11 to 15 of this start"
    assert table.splitlines()[0].split() == ["part", "of", "a", "step", "host,", "ms", "GPU,", "ms"]
    found = {line.split()[0]: float(line.split()[2]) for line in table.splitlines()[1:]}
    assert min(found[part] for part in ("views", "forward", "backward", "optimiser")) > 0
    trace = (tmp_path / "profile" / "trace.json").read_text()
    assert '"cat": "kernel"' in trace


def test_a_runs_verdict_knows_the_hosts_and_the_gpus_time(pictures, tmp_path, monkeypatch):
    found = []
    measured = bounds.with_floors

    def kept(*args):
        found.append(measured(*args))
        return found[-1]

    monkeypatch.setattr(bounds, "with_floors", kept)
    train.main([*ON_GPU, "--data", "synthetic:400", "--out", str(tmp_path), "--hold-out", "0"])
    (m,) = found
    assert None not in (m.issue, m.busy, m.copy, m.arithmetic, m.memory)
    assert 0 < m.arithmetic + m.memory < m.busy
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["bound"] in typing.get_args(bounds.Bound)


def test_ceilings_of_a_gpu():
    found = bounds.ceilings(CUDA, torch.bfloat16)
    assert found.tflops > 10
    assert found.gb_per_s > 100


def test_a_batch_that_does_not_fit_is_told_with_one_that_does(pictures, tmp_path):
    """A share of the memory, so that a real allocation fails; the told batch then runs in it."""
    total = torch.cuda.get_device_properties(CUDA).total_memory
    room = torch.cuda.memory_allocated(CUDA) + 4 * 2**30
    args = ["demo", "--image-size", "224", "--backbone.kernel", "11", "--backbone.stride", "4"]
    args += ["--backbone.width", "1", "--enlarge", "--device", "cuda", "--no-tensorboard"]
    args += ["--data", "synthetic:2000", "--hold-out", "0", "--workers", "1", "--max-steps", "2"]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room / total, CUDA)
    try:
        with pytest.raises(
            config.UsageError, match=r"--batch 1024 does not fit .*: --batch \d+ does"
        ):
            train.main([*args, "--batch", "1024", "--out", str(tmp_path / "a")])
        with pytest.raises(config.UsageError) as told:
            train.main([*args, "--batch", "1024", "--out", str(tmp_path / "a")])
        fits = re.findall(r"--batch (\d+) does", str(told.value))[-1]
        assert train.main([*args, "--batch", fits, "--out", str(tmp_path / "b")]) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
        torch.cuda.empty_cache()


# ---- a step as one graph ----


def fifty(state: TrainState, loader, between=lambda state: None) -> torch.Tensor:
    """The losses of 50 steps, [50] on the CPU; the rate falls by half at step 25."""
    found = []
    for batch in itertools.islice(itertools.chain(*(loader.epoch(e) for e in (0, 1, 2))), 50):
        found.append(train_step(state, batch).total.clone())
        state.step += 1
        between(state)
    return torch.stack(found).cpu()


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten().float() for p in state.method.net.parameters()]).cpu()


def of_fifty(
    method: str, dtype: torch.dtype, **knobs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, how far the weights went, and where they began."""
    table = ((1, 0.01), (3, 0.005))
    schedule = config.Schedule(table=table, epochs=3)
    state, loader = state_and_loader("synthetic:400", dtype, method, schedule=schedule, **knobs)
    state.schedule = LRSchedule(schedule, epochs=3, batches=len(loader), steps=50)
    begun = weights(state)
    losses = fifty(state, loader)
    return losses, weights(state) - begun, begun


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("method", METHODS)
def test_fifty_played_steps_are_the_ordinary_ones(method, compiled, pictures, shapes_unchecked):
    """The same kernels, some of which add in another order each time: two ordinary runs tell how far that leads.

    Bounds not yet tried on a GPU: 5 times the two ordinary runs' own difference, and never below bfloat16's step.
    """
    plain, again, played = (
        of_fifty(method, torch.bfloat16, compile=compiled, graph=graph)
        for graph in (False, False, True)
    )
    assert torch.equal(plain[2], played[2])
    for mine, other, same in zip(plain[:2], played[:2], again[:2], strict=True):
        apart, own = (mine - other).norm(), (mine - same).norm()
        assert apart <= max(5 * own, 2**-8 * mine.norm())


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_as_steps_are_played(method, pictures):
    held = []

    def note(state: TrainState) -> None:
        if state.step in (WARM_UP + 5, 50):
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    state, loader = state_and_loader("synthetic:400", torch.bfloat16, method, graph=True)
    fifty(state, loader, note)
    assert held[1][0] <= held[0][0] + 2**20  # a batch more or less is on its way
    assert held[1][1] <= held[0][1] + 2**22


def test_a_played_step_has_an_ordinary_ones_bits_where_all_is_deterministic(pictures):
    """Which --graph --deterministic would promise; it is refused until a GPU has passed this."""
    torch.use_deterministic_algorithms(True)
    try:
        plain, played = (of_fifty("decoupling", torch.bfloat16, graph=g) for g in (False, True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(plain[0], played[0])
    assert torch.equal(plain[1], played[1])


@pytest.mark.parametrize("task", TASKS)
def test_a_run_with_a_graph_goes_on_in_the_middle(task, pictures, tmp_path):
    args = [*TASKS[task], "--precision", "bf16", "--data", str(pictures), "--schedule.steps", "40"]
    train.main([*args, "--out", str(tmp_path / "plain")])
    train.main([*args, "--out", str(tmp_path / "graph"), "--graph", "--max-steps", "17"])
    train.main([*args, "--out", str(tmp_path / "graph"), "--graph"])
    a, b = (
        checkpoint.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("plain", "graph")
    )
    assert a["step"] == b["step"] == 40
    assert torch.equal(a["rng"][0]["cpu"], b["rng"][0]["cpu"])
    for name, value in a["net"].items():
        torch.testing.assert_close(value, b["net"][name], rtol=5e-2, atol=5e-3)


def test_a_checkpoint_is_of_its_step_though_the_device_goes_on(tmp_path):
    """Copied into pinned memory behind what was launched before, and written once the device has come to it."""
    writer, before = Writer(CUDA, contextlib.nullcontext), torch.ones(2, 8, 4, 4, device=CUDA)
    state = {"net": {"w": before.to(memory_format=torch.channels_last)}, "bank": torch.zeros(3)}
    for k in range(3):
        torch.cuda._sleep(10**8)
        state["net"]["w"].fill_(k)
        writer.begin(state, [tmp_path / f"{k}.pt"])
        state["net"]["w"].fill_(-1.0)
        assert writer._held[0].is_pinned()
        assert list(writer._held) == [0]  # host memory was given away
    writer.wait()
    for k in range(3):
        found = checkpoint.load(tmp_path / f"{k}.pt")["net"]["w"]
        assert torch.equal(found, torch.full((2, 8, 4, 4), float(k)))
        assert found.is_contiguous(memory_format=torch.channels_last)
