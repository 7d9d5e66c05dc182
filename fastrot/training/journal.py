"""What a run tells: metrics.jsonl, log.txt, TensorBoard, the progress bar. Numbers stay on the device until asked."""

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastrot import dist
from fastrot.core import Losses
from fastrot.disk import named, replace_bytes
from fastrot.machine import Moment


class Meter:
    """Running means of a step's numbers, float32 on the device, between log lines."""

    def __init__(self):
        self.names: tuple[str, ...] = ()  # the same in each step
        self.sums: Tensor | None = None  # [n], over `count` steps; None: none yet
        self.count = 0

    def add(self, losses: Losses) -> None:
        """The numbers of a step that is over, at once. Waits for nothing, and keeps none of its memory."""
        assert losses.vector is not None, "a step hands over losses.detached()"
        if self.sums is None:
            self.names, self.sums = losses.names, losses.vector.float().clone()
        else:
            assert losses.names == self.names, "a step's numbers keep their names"
            self.sums += losses.vector.float()
        self.count += 1

    def take(self, *, keep: bool = False) -> Callable[[], dict[str, float]]:
        """Means over the steps since the last time, and over all ranks; `keep` does not begin anew.

        Waits for nothing: a call of what is returned waits for the device to have come here, and gives them.
        """
        if self.sums is None:
            return dict
        sums, names = dist.sum_over_ranks(self.sums), self.names
        means = (sums / (self.count * dist.world())).to("cpu", non_blocking=True)  # pinned
        copied = Moment(sums.device)
        if not keep:
            self.sums, self.count = None, 0

        def told() -> dict[str, float]:
            copied.wait()
            return dict(zip(names, means.tolist(), strict=True))

        return told

    def state_dict(self) -> dict[str, Any]:
        """The sums of all ranks, a row each. Called on all of them."""
        names, mine = ([], torch.zeros(0)) if self.sums is None else (self.names, self.sums.cpu())
        rows = dist.gather_rows(mine[None]).clone()
        return {"names": list(names), "sums": rows, "count": self.count}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """This rank's own sums; with another number of ranks their mean, which gives the same means."""
        rows = state["sums"]
        mine = rows[dist.rank()] if len(rows) == dist.world() else rows.mean(dim=0)
        self.names, self.count = tuple(state["names"]), state["count"]
        self.sums = mine.to(device, copy=True) if self.count else None


class Journal:
    """Writes a run's lines: on rank 0 to its folder and the screen, elsewhere nowhere."""

    def __init__(
        self, run: Path, *, steps: int, step: int = 0, validated_step: int = 0, tensorboard=False
    ):
        self.console = Console(highlight=False, quiet=dist.rank() > 0, soft_wrap=True)
        self._bar = self._board = None
        if dist.rank():
            self._metrics = self._log = open(os.devnull, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
            return
        self._metrics = _cut_back(run / "metrics.jsonl", step, validated_step)
        self._log = (run / "log.txt").open("a", encoding="utf-8", errors="backslashreplace")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 1 s: only where it is wanted

            self._board = SummaryWriter(str(run / "tb"), purge_step=step + 1)
        if self.console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
            columns += [TextColumn("{task.fields[figures]}"), TimeRemainingColumn()]
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("training", total=steps, completed=step, figures="")
            self._bar.start()

    def say(self, *lines: str) -> None:
        """Sentences for people: on the screen and in log.txt."""
        for line in lines:
            self.console.print(line, markup=False)
        _append(self._log, "".join(line + "\n" for line in lines))

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl, whole at once; its numbers go to TensorBoard too."""
        plain = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()
        }
        _append(self._metrics, json.dumps(plain) + "\n")  # JSON has no NaN
        if self._board is not None:
            for name, value in line.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    kind = "val/" + name[4:] if name.startswith("val_") else "train/" + name
                    self._board.add_scalar(kind, value, line["step"])
        self._show(line)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def close(self) -> None:
        """Ends the bar and writes what is buffered."""
        if self._bar is not None:
            self._bar.stop()
        for file in (self._board, self._metrics, self._log):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk, told before
                    file.close()

    def _show(self, line: dict[str, Any]) -> None:
        if "val_loss" in line:
            text = f"validation {_describe(line, 'val_')}"
            self.say(f"step {line['step']}  epoch {line['epoch']}  {text}")
            return
        speed, waited = f"{line['images_per_s']:.0f} images/s", f"{line['wait_share']:.1%}"
        figures = f"{_describe(line)}  {speed}  waiting for data {waited}"
        if self._bar is not None:
            self._bar.update(self._task, figures=figures)
        else:
            self.console.print(f"step {line['step']}  {figures}", markup=False)
        _append(self._log, f"step {line['step']}  epoch {line['epoch']}  {figures}\n")


def _append(file: TextIO, text: str) -> None:
    with named(file.name):
        file.write(text)
        file.flush()


def _describe(line: dict[str, Any], prefix: str = "") -> str:
    """Loss and accuracy, then the terms and other precisions as the method names them."""
    values = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
    terms = [k for k in values if k.startswith(("loss_", "prec_"))]
    terms = [k for k in values if k.startswith("top1_")] or terms  # a probe's, a stage each
    features = [k for k in values if k.startswith("knn_")]
    shown = ["loss", "accuracy", *(terms if len(terms) > 1 else ()), *features]
    if any(k.startswith("prec_") for k in shown):
        shown.remove("accuracy")  # it is one of these precisions
    forms = {k: ".4f" if k.startswith("loss") else ".1%" for k in shown if k in values}
    return "  ".join(f"{k} {values[k]:{form}}" for k, form in forms.items())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a .jsonl; a last line that a crash tore is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for text in path.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(text))
    return lines


def _cut_back(path: Path, step: int, validated_step: int) -> TextIO:
    """Keep the lines up to `step`, and of validations up to `validated_step`: what a killed run wrote behind its last
    checkpoint comes again, and so does a `partial` line, which --max-steps alone brought about.
    """
    kept = []
    for line in read_lines(path) if step else ():
        last = validated_step if "val_loss" in line else step
        if line["step"] <= last and not line.get("partial"):
            kept.append(json.dumps(line) + "\n")
    replace_bytes(path, "".join(kept).encode())
    return path.open("a", encoding="utf-8")
