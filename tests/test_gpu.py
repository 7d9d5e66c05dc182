"""What only a GPU can show: no wait inside a step, half precision, compile, resuming. `make gpu` runs it."""

import copy
import itertools

import jaxtyping
import pytest
import torch
from test_run import TINY, assert_same_bits

from fastrot import assemble, checkpoint, config, loop, train
from fastrot.loop import TrainState, train_step, validate
from fastrot.ops.choice import using
from fastrot.optim import Rates, sgd

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
CROP = config.RandomResized(size=64)
METHODS = {
    "rotnet": config.RotNet(crop=CROP),
    "decoupling": config.Decoupling(crop=CROP, z="ema", proximal=0.1),
    "decoupling-bf16-infonce": config.Decoupling(crop=CROP, bank_dtype="bf16", contrast="infonce"),
}
ON_GPU = [word if word != "cpu" else "cuda" for word in TINY]


def state_and_loader(data: str, dtype: torch.dtype, method: str = "rotnet", **knobs):
    cfg = config.Config(
        method=METHODS[method],
        backbone=config.AlexNet(width=0.25, kernel=5, stride=2),
        **knobs,
    )
    view = assemble.training_view(cfg)
    loader = assemble.open_loader(data, view, batch=16, device=CUDA, enlarge=True)
    facts = assemble.facts(cfg, loader, None, CUDA, dtype)
    task = assemble.method(cfg, facts)
    task.net.to(CUDA).to(memory_format=torch.channels_last)
    state = TrainState(
        method=task,
        net=assemble.wrapped(task.net, cfg, CUDA),
        optimizer=sgd(task.net, cfg.optim, 0.05),
        rates=Rates(cfg.schedule, epochs=1, batches=len(loader), steps=len(loader), lr=0.05),
        device=CUDA,
        dtype=dtype,
    )
    return state, loader


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_in_a_step_waits_for_the_gpu(dtype, method, pictures):
    """Loader, views, network, losses, descent, the bank's write, running means."""
    state, loader = state_and_loader("synthetic:400", dtype, method)
    batches = loader.epoch(0)
    for _ in range(3):  # allocations and kernels of the first steps may wait
        train_step(state, next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            losses = train_step(state, next(batches))
            state.step += 1
            state.meter.add(losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses.total)


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
    with pytest.raises(config.Stopped, match="finite"):
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
        assert torch.equal(host.clock, device.clock.cpu())


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
