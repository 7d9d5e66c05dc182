"""A whole step as one CUDA graph: recorded once, then played with each batch copied into the same memory.

Idea.    The host launches a graph at once instead of its hundreds of kernels one by one, so that it cannot fall behind
         the GPU. What is recorded is kernels and addresses, nothing of Python: whatever changes from step to step must
         lie in tensors that are written in place. So the batch and its clock are copied into buffers, the rate is
         written into its tensor before the graph is played (`optim.set_lr`), and a method's state is updated in place.
         Gradients and all that a step makes on its way lie in the graph's own memory.
Bytes.   The batch once more, read and written: B S S 3 and 16 B + 16.
Order.   Before it is recorded some steps run one by one, on a stream beside the main one, as capture wants it: kernels are
         compiled and chosen there, and momenta made. They are ordinary steps of the run.
"""

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
        # other threads, which decode into pinned memory, may go on meanwhile
        mode = "thread_local"
        with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode=mode):
            return step()

    def play(self) -> None:
        """Run what was recorded last, in the same memory. Waits for nothing."""
        assert self.graph is not None
        self.graph.replay()


class Graphed:
    """Steps of a run: WARM_UP ordinary ones, then the recorded one again and again.

    A batch of other shapes than the recorded one's takes an ordinary step.
    """

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
            self.batch = _room_for(batch)
        elif not _alike(batch, self.batch):
            return step(batch)
        held = self.batch
        for mine, new in zip(_tensors(held), _tensors(batch), strict=True):
            mine.copy_(new, non_blocking=True)
        if self.losses is None:
            self.losses = self.recorder.record(lambda: step(held))
        self.recorder.play()
        return self.losses


def _tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    return (*batch.crops, batch.index, batch.label, batch.epoch_step)


def _room_for(batch: Batch) -> Batch:
    *crops, index, label, epoch_step = map(torch.empty_like, _tensors(batch))
    return Batch(tuple(crops), index, label, epoch_step)


def _alike(batch: Batch, other: Batch) -> bool:
    return [t.shape for t in _tensors(batch)] == [t.shape for t in _tensors(other)]
