"""A GPU that is made up, for what watches one: its clock beside the host's, and a queue of launches. Nothing is computed."""

import math
from collections import deque

from fastrot import machine


class Gpu:
    """Seconds on two clocks: `now`, the host's, and `free`, when the device is done with all that was issued."""

    def __init__(self, queue: float = math.inf):
        self.queue = queue  # kernels that may be under way: with more of them a launch waits
        self.now = self.free = 0.0
        self.ends: deque[float] = deque()  # of the kernels under way
        self.step = 0  # of the host
        self.waits: list[tuple[int, int]] = []  # steps: at which the host waited, and for which

    def launch(self, issue: float, work: float, kernels: int = 100) -> None:
        """A step that takes the host and the device so long."""
        for _ in range(kernels):
            while len(self.ends) >= self.queue:
                self.now = max(self.now, self.ends.popleft())
            self.now += issue / kernels
            self.free = max(self.now, self.free) + work / kernels
            self.ends.append(self.free)
        self.step += 1

    def moment(self, *_) -> "Moment":
        return Moment(self)


class Moment(machine.Moment):
    """What is noted of it."""

    def __init__(self, gpu: Gpu):
        self.gpu, self.at, self.step = gpu, max(gpu.now, gpu.free), gpu.step

    def reached(self) -> bool:
        return self.gpu.now >= self.at

    def wait(self) -> None:
        if not self.reached():
            self.gpu.waits.append((self.gpu.step, self.step))
            self.gpu.now = self.at

    def since(self, other) -> float:
        self.wait()
        return self.at - other.at
