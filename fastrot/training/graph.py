"""A whole step as one CUDA graph: recorded once, then played with each batch copied into the same memory (see README.md)."""

from collections.abc import Callable

import torch

from fastrot.core import Batch, Losses

WARM_UP = 11  # ordinary steps; torch's documentation asks for 11 where DDP is recorded, and for 3 elsewhere


class Cuda:
    """Records and plays: torch.cuda's graphs, one at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def aside(self, step: Callable[[], Losses]) -> Losses:
        """An ordinary step, run where it will be recorded."""
        main = torch.cuda.current_stream(self.device)
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            losses = step()
        main.wait_stream(self.side)
        return losses

    def record(self, step: Callable[[], Losses]) -> Losses:
        """What the step launches, noted and not run; what it returns is written each time it is played."""
        self.graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads, which decode into pinned memory, may go on meanwhile
        with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode=mode):
            return step()

    def play(self) -> None:
        """Run what was recorded last, in the same memory. Waits for nothing."""
        assert self.graph is not None
        self.graph.replay()


class Graphed:
    """Steps of a run: WARM_UP ordinary ones, then the recorded one for each batch of the same shapes."""

    def __init__(self, recorder: Cuda):
        self.recorder = recorder
        self.forget()

    def forget(self) -> None:
        """Warm up and record anew: to be called when what a step reads or writes was put into other memory."""
        self.warm = 0
        self.batch: Batch | None = None  # what the recorded step reads
        self.losses: Losses | None = None  # what it writes

    def __call__(self, step: Callable[[Batch], Losses], batch: Batch) -> Losses:
        """The step's numbers, which hold until the next one. Waits for nothing, but where it records."""
        if self.batch is None:
            if self.warm < WARM_UP:
                self.warm += 1
                return self.recorder.aside(lambda: step(batch))
            *crops, index, label, epoch_step = map(torch.empty_like, _tensors(batch))
            self.batch = Batch(tuple(crops), index, label, epoch_step)
        held = self.batch
        pairs = list(zip(_tensors(held), _tensors(batch), strict=True))
        if any(mine.shape != new.shape for mine, new in pairs):
            return step(batch)
        for mine, new in pairs:
            mine.copy_(new, non_blocking=True)
        if self.losses is None:
            self.losses = self.recorder.record(lambda: step(held))
        self.recorder.play()
        return self.losses


def _tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    return (*batch.crops, batch.index, batch.label, batch.epoch_step)
