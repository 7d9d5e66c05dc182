"""Where a run happens: device, processor, versions, commit. They stand beside every figure."""

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastrot
from fastrot import native
from fastrot.entry import cores


def processor() -> str:
    """The processor's model name."""
    found = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    return found[1].strip() if found else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {cores()} cores"


def wait_for(device: torch.device) -> None:
    """Until all that was issued to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Moment:
    """When the device is done with all that was issued to it so far: noted without waiting for it. On a CPU: now."""

    def __init__(self, device: torch.device):
        self._now, self._event = time.perf_counter(), None
        if device.type == "cuda":  # blocking: whoever waits leaves the core to others
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record(torch.cuda.current_stream(device))

    def reached(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def since(self, other: "Moment") -> float:
        """Seconds from another to this one, by the device's clock. Waits for both."""
        self.wait()
        if self._event is None or other._event is None:
            return self._now - other._now
        return other._event.elapsed_time(self._event) / 1e3


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; without them it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(re.search(r"\b(amx_bf16|avx512_bf16)\b", _cpuinfo()))


def _cpuinfo() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def versions() -> dict[str, str]:
    return {
        "fastrot": fastrot.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def commit() -> str | None:
    """The checkout's commit; None where fastrot is installed without one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None  # git would tell of a repository around it
    try:
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device, ranks: int) -> dict[str, Any]:
    """What environment.json says: machine, versions, commit, command."""
    return {
        "machine": platform.platform(),
        "device": device_name(device),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "versions": versions() | {"cuda": torch.version.cuda},
        "native": native.why(),
        "commit": commit(),
        "command": sys.argv,
        "folder": os.getcwd(),  # to which a command's paths are relative
        "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
