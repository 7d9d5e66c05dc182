"""What a run computes on, and how: the device, torch's threads, the precision, and which faster forms these admit."""

import dataclasses
import os

import torch

from fastrot import config, dist, machine
from fastrot.config import Config, UsageError
from fastrot.entry import share_of_cores
from fastrot.training.optim import check_apex


def choose(cfg: Config) -> tuple[Config, torch.device]:
    """The config with its precision, and the device; torch's threads are set."""
    here = dist.place()
    device = choose_device(cfg.device, here)
    if (threads := choose_threads(cfg.threads, here, device)) is not None:
        torch.set_num_threads(threads)
    return dataclasses.replace(cfg, precision=choose_precision(cfg.precision, device)), device


def choose_device(wish: str, here: dist.Place) -> torch.device:
    """The GPU of this rank, or the CPU."""
    if wish == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda, but torch sees no GPU: use --device cpu, or torch with CUDA"
        )
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

    torchrun sets OMP_NUM_THREADS to 1 for several processes where nobody has set it, which suits GPUs. Without one
    that 1 is taken for torchrun's, and the process has its share of the cores; --threads 1 means 1.
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
    if cfg.optim.kernel == "apex":
        if device.type != "cuda":
            raise UsageError(
                "--optim.kernel apex wants a GPU, and this run is on a CPU: use --optim.kernel torch"
            )
        check_apex()
    if not cfg.graph:
        return
    fp16, apex = cfg.precision == "fp16", cfg.optim.kernel == "apex"
    reference = os.environ.get("FASTROT_OPS") == "reference"
    unsure = "nobody has compared the bits that --deterministic promises with a graph's"
    hindrances = (  # whether there is one, why, and the way out beside leaving --graph out
        (device.type != "cuda", "this run is on a CPU", ""),
        (here.world > 1, f"there are {here.world} processes", "start one alone"),
        (fp16, "--precision fp16 looks at its gradients in each step", "use --precision bf16"),
        (apex, "--optim.kernel apex has no rate that a graph can read", "use --optim.kernel torch"),
        (reference, "FASTROT_OPS=reference has forms that wait for the GPU", "unset it"),
        (cfg.deterministic, unsure, "leave out --deterministic"),
    )
    for holds, reason, way in hindrances:
        if holds:
            ways = ", or ".join(each for each in (way, "leave --graph out") if each)
            raise UsageError(
                f"--graph records the step of one process on a GPU, but {reason}: {ways}"
            )


def set_determinism(cfg: Config) -> None:
    """Of cuDNN, cuBLAS and torch in this process, as --deterministic says."""
    if cfg.deterministic:
        # filling fresh memory would cost time and decide no bit
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not cfg.deterministic  # chooses kernels by timing
