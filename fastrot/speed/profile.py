"""--profile: some steps in torch's profiler, as a trace to look at and as a table.

The parts of a step are told by labels put round the functions that it calls, while it is traced and no longer. Kernels
are counted to the part in which the host launched them: a backward pass launches its own from another thread, while the
one with the labels waits.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile, record_function

from fastrot.machine import wait_for
from fastrot.training.graph import WARM_UP
from fastrot.training.state import TrainState

WARM, STEPS = 10, 5
PARTS = ("views", "forward", "losses", "backward", "optimiser", "bank")
ROWS = 30  # of the table: the costliest operations
MARK = "fastrot: "  # before a part's name, which might be an operation's


class Profile:
    """Traces steps `first` to `last` of a start, of which `steps` are to come; writes into `folder`, and says so to `done`.

    first  WARM, or behind the recording of a graph; less where there are fewer steps
    """

    def __init__(self, state: TrainState, folder: Path, steps: int, done: Callable[[str], None]):
        self.state, self.folder, self.done = state, folder, done
        warm = WARM if state.graphed is None else WARM_UP + 1
        self.first = max(0, min(warm, steps - STEPS))
        self.last = min(steps, self.first + STEPS) - 1
        self._tracing = contextlib.ExitStack()  # ends what a traced step began

    @contextlib.contextmanager
    def __call__(self, number: int) -> Iterator[None]:
        """Around a start's step of this number, from 0."""
        if number == self.first:
            self._begin()
        try:
            yield
        except BaseException:
            self._tracing.close()
            raise
        if number == self.last:
            self._tracing.close()
            self._write()

    def _begin(self) -> None:
        wait_for(self.state.device)
        kinds = [ProfilerActivity.CPU]
        if self.state.device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of itself on stderr
        self._seen = self._tracing.enter_context(profile(activities=kinds))
        self._tracing.callback(wait_for, self.state.device)
        self._tracing.enter_context(labelled(self.state))

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        words = f"steps {self.first + 1} to {self.last + 1} of this start"
        table, trace = self.folder / "table.txt", self.folder / "trace.json"
        table.write_text(f"{words}\n\n{self._table()}", encoding="utf-8")
        self._seen.export_chrome_trace(str(trace))
        self.done(f"profile of {words}: {table}, and {trace} for ui.perfetto.dev")
        del self._seen

    def _table(self) -> str:
        gpu = self.state.device.type == "cuda"
        steps = self.last + 1 - self.first
        lines = ["a graph's step is launched as a whole: leave --graph out to see its parts"]
        if self.state.graphed is None:
            lines = [f"{'part of a step':<16}{'host, ms':>12}" + f"{'GPU, ms':>12}" * gpu]
            for part, (host, device) in parts(list(self._seen.events() or [])).items():
                device_ms = f"{device / steps / 1e3:>12.3f}" * gpu
                lines.append(f"{part:<16}{host / steps / 1e3:>12.3f}{device_ms}")
        order = "self_device_time_total" if gpu else "self_cpu_time_total"
        shown = {"sort_by": order, "row_limit": ROWS, "max_name_column_width": 60}
        return "\n".join([*lines, "", self._seen.key_averages().table(**shown)])


def parts(events: list[Any]) -> dict[str, tuple[float, float]]:
    """Microseconds of each part in all traced steps: of the host, and of kernels that it launched meanwhile.

    events  torch's FunctionEvents
    """
    labels = [e for e in events if e.name.startswith(MARK) and e.device_type.name == "CPU"]
    labels.sort(key=lambda label: label.time_range.start)
    host, device = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    for label in labels:
        host[label.name.removeprefix(MARK)] += label.time_range.end - label.time_range.start
    host["backward"] -= host["optimiser"]  # which lies within it: no other labels overlap
    for event in events:
        if event.kernels and not event.name.startswith(MARK):
            at = event.time_range.start
            around = [e.name for e in labels if e.time_range.start <= at <= e.time_range.end]
            if around:
                device[around[-1].removeprefix(MARK)] += sum(k.duration for k in event.kernels)
    return {part: (host[part], device[part]) for part in PARTS if host[part] or device[part]}


@contextlib.contextmanager
def labelled(state: TrainState) -> Iterator[None]:
    """The parts of a step with their names, until the end: the functions stay the same."""
    functions = [
        (state.method, "views", "views"),
        (state, "net", "forward"),
        (state.method, "losses", "losses"),
        (state, "descend", "backward"),
        (state.optimizer, "step", "optimiser"),
        (state.method, "after_step", "bank"),
    ]
    with contextlib.ExitStack() as held:
        for owner, name, part in functions:
            with_name = record_function(MARK + part)(getattr(owner, name))
            held.enter_context(patch.object(owner, name, with_name))
        yield
