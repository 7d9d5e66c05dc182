"""What ranks send each other in a step, counted in a run of several; and what that would cost 8 and 64 GPUs, modelled.

    python -m benchmarks.scaling [--ranks N] [--out FILE.jsonl or FOLDER] [--quick]

Counted: gloo ranks on this CPU train the preset's own net, and that of the step to model from, for a few steps of a small batch. The gradients pass through a
communication hook, and every collective through torch's dispatcher, where its bytes are read off the tensor that a rank
hands over; what is neither a gradient nor a feature with its picture's number is `other`, and must be none. The
first step sends Z besides, and the second, once, how DDP puts gradients together from then on; the loop sends one byte
every twentieth step and a log line's sums, which are not steps.

Modelled, and never measured here: a ring sends 2 (W - 1) / W times the gradients over each link, a gather W - 1 times a
rank's features. Links are assumptions, named with their source. A step is the newest measured "step" row's; gradients
either wait for all of it (`no overlap`, the row's figure) or hide behind it as far as they fit (`full overlap`).
The real lies between the two; latency of a collective and a slow rank are in neither.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import forms, measure, runs
from benchmarks.measure import IMAGENET
from fastrot import assemble, dist, entry
from fastrot.config import Config, Decoupling, UsageError, resolved
from fastrot.presets import PRESETS
from fastrot.training.loop import train_step

EXTRA = "one collective more"
STEPS = 3  # counted, behind the first two
LINKS = {  # GPUs: bytes/s each way of a GPU's slowest link, its name, and where that is said
    8: (450e9, "NVLink 4, 900 GB/s both ways", "MLPerf Inference v4.1, NVIDIA's H200-SXM-141GBx8"),
    64: (50e9, "InfiniBand, 400 Gb/s a GPU", "the same system's network cards, one for each GPU"),
}
NETS: dict[str, dict[str, Any]] = {  # features grow with the batch, gradients do not
    "full": {"batch": 1},  # the preset's own
    "quarter": forms.SMALL | {"batch": 1},
    "small": forms.QUICK | {"batch": 2},
}
ABOUT = (
    "bytes that a rank hands over in a step, counted in a run of gloo ranks; features of a larger batch are as many times "
    "more, gradients the same"
)


# ---- counting ----


class Sent(TorchDispatchMode):
    """While it is on: bytes that this rank hands to collectives, by kind and by name.

    Gradients are whatever a DDP communication hook sends. Features are float tensors that are gathered, with the int64
    numbers of their pictures; all else is `other`.
    """

    def __init__(self):
        super().__init__()
        self.in_hook = False
        self.bytes: collections.Counter[str] = collections.Counter()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names[name := func.__name__.split(".")[0].rstrip("_")] += 1
            self.bytes[self._kind(name, args)] += sum(_bytes(each) for each in _given(name, args))
        return func(*args, **(kwargs or {}))

    def clear(self) -> None:
        self.bytes.clear()
        self.names.clear()

    def hook(self, inner: Any) -> Any:
        """The same communication hook, with its bytes counted as gradients."""

        @functools.wraps(inner)  # DDP reads its annotations
        def counted(state: Any, bucket: Any) -> Any:
            self.in_hook = True
            try:
                return inner(state, bucket)
            finally:
                self.in_hook = False

        return counted

    def _kind(self, name: str, args: Any) -> str:
        given = _given(name, args)
        features = all(t.ndim == 2 and t.is_floating_point() for t in given)
        numbers = all(t.ndim == 1 and t.dtype == torch.int64 for t in given)
        if self.in_hook:
            return "gradients"
        return "features" if name == "allgather" and (features or numbers) else "other"


def _given(name: str, args: Any) -> list[Tensor]:
    """What a rank hands over; its first argument is where a gather puts what comes back."""
    handed = args[1] if "gather" in name or "scatter" in name or "alltoall" in name else args[0]
    return [each for each in tree_leaves(handed) if isinstance(each, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def hooked(sent: Sent) -> Iterator[list[Any]]:
    """Hooks that are registered in here are counted; gives the nets that have one."""
    kept, nets = DistributedDataParallel.register_comm_hook, []

    def register(net: Any, state: Any, hook: Any) -> None:
        nets.append(net)
        kept(net, state, sent.hook(hook))

    DistributedDataParallel.register_comm_hook = register  # type: ignore[method-assign]
    try:
        yield nets
    finally:
        DistributedDataParallel.register_comm_hook = kept  # type: ignore[method-assign]


def counted(cfg: Config, *, steps: int = STEPS, extra: bool = False) -> dict[str, Any]:
    """Bytes that this rank sends in a step of `cfg`, by kind; the ranks have met before. `extra`: one collective more.

    Raises AssertionError where steps differ.
    """
    device, world = torch.device("cpu"), dist.world()
    pictures, ranks = (
        f"synthetic:{cfg.batch * world * (steps + 2)}",
        {"rank": dist.rank(), "world": world},
    )
    view = assemble.training_view(cfg)
    loader = assemble.open_loader(pictures, view, batch=cfg.batch, workers=0, **ranks)
    sent = Sent()
    with hooked(sent) as nets:
        state = forms.state_of(cfg, loader, device, steps=len(loader))
        if not nets:
            state.net.register_comm_hook(None, allreduce_hook)  # what DDP does without one
    method = state.method
    if extra:
        write = method.after_step
        method.after_step = lambda outputs, batch, losses: (  # type: ignore[method-assign]
            dist.sum_over_ranks(losses.total.detach()),
            write(outputs, batch, losses),
        )[1]
    each = []
    with sent:
        for batch in loader.epoch(0):
            sent.clear()
            train_step(state, batch)
            state.step += 1
            each.append((dict(sent.bytes), dict(sent.names)))
    first, second, *rest = each
    assert all(one == rest[0] for one in rest), f"steps differ in what they send: {each}"
    return {
        "bytes": {kind: rest[0][0].get(kind, 0) for kind in ("gradients", "features", "other")},
        "calls": rest[0][1],
        "first_steps": [first[0], second[0]],
        "parameters": sum(p.numel() for p in method.net.parameters()),
    }


def cases(net: str) -> dict[str, Config]:
    """What is counted, by name."""
    rotnet, decoupling = (
        dataclasses.replace(PRESETS[name](), precision="fp32", **NETS[net])
        for name in ("rotnet-alexnet", "decoupling-alexnet")
    )
    assert isinstance(decoupling.method, Decoupling)
    sharded = dataclasses.replace(decoupling.method, bank="sharded")
    found = {
        "rotnet-alexnet": rotnet,
        "decoupling-alexnet": decoupling,
        "decoupling-alexnet, sharded bank": dataclasses.replace(decoupling, method=sharded),
        "decoupling-alexnet, bf16 gradients": dataclasses.replace(decoupling, gradients="bf16"),
    }
    return {name: resolved(cfg) for name, cfg in found.items()}


def count_here(net: str, out: Path, *, extra: bool = False) -> None:
    """One rank's part under torchrun: all cases, one after the other; rank 0 writes what all ranks agree on.

    `extra`: also RotNet with one collective more, which must be seen.
    """
    dist.start(dist.place(), torch.device("cpu"))
    told = {}
    asked = cases(net)
    if extra:
        asked[EXTRA] = asked["rotnet-alexnet"]
    for name, cfg in asked.items():
        mine = counted(cfg, extra=name == EXTRA)
        every = dist.everyones(mine)
        assert all(other == mine for other in every), f"ranks differ in what they send: {every}"
        told[name] = mine | {"batch": cfg.batch, "size": cfg.method.crop.size}
        told[name] |= {"width": cfg.backbone.width, "dim": getattr(cfg.method, "dim", 0)}
    if dist.rank() == 0:
        out.write_text(json.dumps(told))
    dist.stop(together=True)


def count(ranks: int, net: str, *, extra: bool = False) -> dict[str, dict[str, Any]]:
    """Start so many ranks of `count_here` on one of NETS and read what they counted."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counted.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            "--nproc-per-node",
            str(ranks),
            "-m",
            "benchmarks.scaling",
            "--count-into",
            str(out),
        ]
        command += ["--net", net, *["--extra"] * extra]
        threads = max(1, entry.cores() // ranks)
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=env, cwd=measure.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"{ranks} ranks could not count what they send: {done.stderr[-2000:]}")
        return json.loads(out.read_text())


def communication_rows(ranks: int, net: str) -> Iterator[dict[str, Any]]:
    for name, found in count(ranks, net).items():
        shape = {key: found[key] for key in ("batch", "size", "width", "dim", "parameters")}
        of = "" if net == "full" else f", width {shape['width']:g}, {shape['size']} pixels"
        each = found["bytes"]
        yield measure.row(
            "communication",
            theme="train",
            variant=f"{ranks} ranks, {name}{of}",
            kind=name,
            preset=name.split(",")[0],
            mode="counted by a DDP communication hook and torch's dispatcher, of a step and rank",
            shape=shape,
            **measure.middle([sum(each.values())] * STEPS, "bytes"),
            counted=each,
            calls=found["calls"],
            first_steps=found["first_steps"],
            ranks=ranks,
            warmup=1,
            about=ABOUT,
        )


# ---- the model ----


def modelled(
    step_s: float, batch: int, gradients: float, features: float, gpus: int
) -> dict[str, Any]:
    """Images/s of `gpus` GPUs, by the two bounds: a ring of all-reduces, and a gather, over the slowest link.

    gradients   bytes that a rank reduces in a step
    features    bytes that a rank gives to the gather, of its whole batch
    """
    speed, _, _ = LINKS[gpus]
    reduced = 2 * (gpus - 1) / gpus * gradients / speed
    gathered = (gpus - 1) * features / speed
    told: dict[str, Any] = {"reduce_ms": 1e3 * reduced, "gather_ms": 1e3 * gathered}
    for name, seconds in {
        "no_overlap": step_s + reduced + gathered,
        "full_overlap": max(step_s, reduced) + gathered,
    }.items():
        rate = gpus * batch / seconds
        told[name] = {"images_per_s": rate, "seconds_per_epoch": IMAGENET / rate}
        told[name]["efficiency"] = step_s / seconds
    return told


def step_row(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The step to model from: a GPU's where there is one; of the newest commit's, the fastest without a graph.

    A whole-step graph is for one process.
    """
    preset = "decoupling-alexnet"
    found = [r for r in rows if r["what"] == "step" and r["variant"].startswith(preset)]
    found = [r for r in found if "graph" not in str(r.get("form", ""))]
    found = [r for r in found if r["gpu"]] or found
    if not found:
        return None
    last = max(found, key=lambda r: r["when"])
    same = [r for r in found if (r["commit"], r["gpu"]) == (last["commit"], last["gpu"])]
    same = [r for r in same if (r["shape"]["batch"]) == last["shape"]["batch"]]
    return min(same, key=lambda r: r["p50"])


def net_of(step: dict[str, Any]) -> str:
    """Which of NETS a measured step is of; the preset's own where it is of none."""
    for net in NETS:
        cfg = cases(net)["decoupling-alexnet"]
        same = {"size": cfg.method.crop.size, "width": cfg.backbone.width}
        if all(step["shape"][name] == value for name, value in same.items()):
            return net
    return "full"


def scaling_rows(
    step: dict[str, Any], communication: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Rows for 8 and 64 GPUs, of each kind of run whose bytes were counted for the step's own net."""
    shape = step["shape"]
    batch = shape["batch"]
    on = step["gpu"] or f"a CPU ({step['cpu']}, {step['cores']} cores), for want of a GPU's row"
    for counts in communication:
        same = all(counts["shape"][name] == shape[name] for name in ("size", "width"))
        kind = counts["kind"]
        if not (kind.startswith("decoupling-alexnet") and same):
            continue
        more = kind.removeprefix("decoupling-alexnet")
        gradients = counts["counted"]["gradients"]
        features = counts["counted"]["features"] / counts["shape"]["batch"] * batch
        for gpus, (speed, link, source) in LINKS.items():
            found = modelled(step["p50"] / 1e3, batch, gradients, features, gpus)
            low, high = found["no_overlap"], found["full_overlap"]
            yield measure.row(
                "scaling",
                theme="train",
                variant=f"{gpus} GPUs{more}",
                mode="modelled, not measured: no overlap; full overlap beside it",
                modelled=True,
                **measure.middle([low["images_per_s"]], "images/s"),
                seconds_per_epoch=low["seconds_per_epoch"],
                full_overlap=high,
                efficiency=low["efficiency"],
                reduce_ms=found["reduce_ms"],
                gather_ms=found["gather_ms"],
                bytes=gradients + features,
                link_gb_per_s=speed / 1e9,
                link=f"an assumption: {link}, each way half of both ({source})"
                if gpus == 8
                else f"an assumption: {link} ({source})",
                step_ms=step["p50"],
                step_variant=step["variant"],
                step_commit=step["commit"],
                step_on=on,
                step_gpu=step["gpu"],
                shape={**shape, "gpus": gpus},
                warmup=0,
                about="images/s of several GPUs are arithmetic: a measured step, counted bytes, assumed links; an epoch is "
                "1,281,167 pictures without validation; each GPU has a batch of its own",
            )


# ---- the command ----


def main(args: list[str] | None = None) -> int:
    """Count, model, print, and append to the machine's file of results."""
    parser = runs.parser(__doc__, "quick")
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks on this machine")
    parser.add_argument("--count-into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--net", choices=list(NETS), default="full", help=argparse.SUPPRESS)
    parser.add_argument("--extra", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(args)
    if asked.count_into:
        count_here(asked.net, asked.count_into, extra=asked.extra)
        return 0
    if asked.ranks < 2:
        raise UsageError(f"--ranks got {asked.ranks}: it wants 2 or more, since one sends nothing")
    asked.device = "cuda" if torch.cuda.is_available() else "cpu"
    file = measure.results(asked.device, asked.out)
    files = {file, *(measure.ROOT / "benchmarks" / "results").glob("*.jsonl")}
    lines = [line for each in files if each.exists() for line in each.read_text().splitlines()]
    known = map(json.loads, lines)
    step = step_row(known)
    nets = {net_of(step)} if step else set()
    made = [
        row
        for net in sorted({"small"} if asked.quick else {"full", *nets})
        for row in communication_rows(asked.ranks, net)
    ]
    modelled_rows = list(scaling_rows(step, made)) if step else []
    if not modelled_rows:
        print(
            "no scaling is modelled: no step of decoupling-alexnet with such a net is measured yet"
        )
    runs.keep([*made, *modelled_rows], asked)
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
