"""What a run computes on, and how: the device, torch's threads, the precision, and which faster forms these admit."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from fastrot import config, dist, machine
from fastrot.config import Config, UsageError
from fastrot.entry import share_of_cores

# by a GPU's name: the fastest form of a step there, and the row that says so; written by benchmarks/report.py
FORMS = json.loads((Path(__file__).parents[1] / "speed" / "forms.json").read_text())
PLAIN = {  # the knobs of a form, as they are where nothing is known
    "compile": False,
    "compile_mode": "default",
    "graph": False,
    "backbone.space_to_depth": False,
    "backbone.fuse": False,
}


def choose(cfg: Config) -> tuple[Config, torch.device]:
    """The config with its precision, and the device; torch's threads and determinism are set."""
    here = dist.place()
    device = choose_device(cfg.device, here)
    if (threads := choose_threads(cfg.threads, here, device)) is not None:
        torch.set_num_threads(threads)
    cfg = dataclasses.replace(cfg, precision=choose_precision(cfg.precision, device))
    check_fast_forms(cfg, here, device)
    if cfg.deterministic:
        # filling fresh memory would cost time and decide no bit
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    time_kernels(device, not cfg.deterministic)
    return cfg, device


def time_kernels(device: torch.device, on: bool = True) -> None:
    """Have cuDNN choose its kernels by timing, among all of them: by itself it tries ten."""
    torch.backends.cudnn.benchmark = on
    if device.type == "cuda":
        torch.backends.cudnn.benchmark_limit = 0


def choose_device(wish: str, here: dist.Place) -> torch.device:
    """The GPU of this rank, or the CPU."""
    if wish == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no GPU: use cpu, or torch with CUDA")
    if wish == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ and "SLURM_GPUS_PER_TASK" in os.environ:
        return torch.device("cuda", 0)  # srun lets each task see its own alone
    if here.local >= torch.cuda.device_count():
        raise UsageError(
            f"there are {here.local_world} processes on this machine but {torch.cuda.device_count()} "
            "GPU(s): start one process a GPU, or use --device cpu"
        )
    torch.cuda.set_device(here.local)
    return torch.device("cuda", here.local)


def choose_threads(wish: int | None, here: dist.Place, device: torch.device) -> int | None:
    """Torch's threads of this process; None: as many as torch takes itself, OMP_NUM_THREADS or all cores.

    torchrun sets OMP_NUM_THREADS to 1, which suits GPUs: on a CPU each process has its share of the cores.
    """
    lowered = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if wish is None and device.type == "cpu" and lowered and here.local_world > 1:
        return share_of_cores(here.local_world)
    return wish


def choose_precision(wish: config.Precision, device: torch.device) -> config.Precision:
    """bf16 where the device multiplies in it, else float16 on a GPU and float32 on a CPU."""
    if wish != "auto":
        return wish
    if machine.multiplies_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def check_fast_forms(cfg: Config, here: dist.Place, device: torch.device) -> None:
    """Refuse faster forms of a step that this device, or what else is asked for, does not admit."""
    if _by_apex(cfg) and device.type != "cuda":
        raise UsageError("--optim.kernel apex wants a GPU: use --optim.kernel torch")
    if cfg.graph and (reason := _hindrance(cfg, here, device)):
        raise UsageError(
            f"--graph records the step of one process on a GPU, but {reason}: use --no-graph"
        )


def _by_apex(cfg: Config) -> bool:
    return isinstance(cfg.optim, config.Sgd) and cfg.optim.kernel == "apex"


def _hindrance(cfg: Config, here: dist.Place, device: torch.device) -> str | None:
    """Why a step of this run cannot be recorded."""
    hindrances = {
        "this run is on a CPU": device.type != "cuda",
        f"there are {here.world} processes": here.world > 1,
        "--precision fp16 looks at its gradients in each step, as bf16 does not": cfg.precision
        == "fp16",
        "--optim.kernel apex has no rate that a graph can read": _by_apex(cfg),
        "FASTROT_OPS=reference waits for the GPU": os.environ.get("FASTROT_OPS") == "reference",
        "--deterministic promises bits that nobody has compared with a graph's": cfg.deterministic,
    }
    return next((reason for reason, holds in hindrances.items() if holds), None)


def choose_form(
    cfg: Config, before: dict[str, Any] | None, device: torch.device
) -> tuple[Config, list[str]]:
    """The config with those knobs of a step's form that nobody set, and what is to be said of them.

    `before`: the config of the run that goes on here, which keeps its form. A new run has the fastest that was measured
    on a GPU of this name, with this backbone and precision, as far as it admits it; else the plain one, as --deterministic has.
    """
    known, why, gpu = {}, "", machine.device_name(device)
    if before is not None:
        known = config.flat(config.to_plain(config.from_plain(before)))
    elif device.type == "cuda" and not cfg.deterministic:
        why = f"no other was measured on {gpu} with this backbone and precision"
        row = FORMS.get(gpu, {})
        if (row.get("backbone"), row.get("precision")) == (
            config.net_name(cfg.backbone),
            cfg.precision,
        ):
            known = row["knobs"]
            why = f"{row['form']} is the fastest on {gpu}, with {row['ms']:.3g} ms for a step of "
            why += f"{row['preset']} (commit {row['commit'][:8]}, {row['when'][:10]})"
    given = config.flat(config.to_plain(cfg))
    chosen = {name: known.get(name) or PLAIN[name] for name in PLAIN if given.get(name, "") is None}
    if "graph" in chosen and _hindrance(cfg, dist.place(), device):
        chosen["graph"] = False
    cfg = with_knobs(cfg, chosen)
    if not cfg.compile:
        cfg = dataclasses.replace(cfg, compile_mode="default")
    on = " ".join(config.knob(name) for name, value in chosen.items() if value is True)
    return cfg, [f"by default {on or 'a plain step'}: {why}"] if why and chosen else []


def with_knobs(part: Any, values: dict[str, Any]) -> Any:
    """The same run or part of it, with these values of knobs, named by their paths: `backbone.fuse`."""
    for path, value in values.items():
        name, _, inner = path.partition(".")
        if inner:
            value = with_knobs(getattr(part, name), {inner: value})
        part = dataclasses.replace(part, **{name: value})
    return part
