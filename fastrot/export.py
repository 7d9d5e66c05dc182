"""Export: `python fastrot/export.py RUN --to FORM` writes a trained network for others to use; `fastrot export` does the same."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # run as a script: this would be fastrot/ itself
    sys.path[0] = str(HERE.parent)

from dataclasses import dataclass, field
from typing import Literal

from fastrot import cli, entry


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained network for others to use, and check that it says what it said."""

    run: str = field(metadata=cli.first("RUN"))  # a run's folder, or a checkpoint
    # safetensors: its weights by our names; torchvision, timm: by theirs, where the network is
    # theirs; onnx, torch-export: a graph that takes pixels; hub: a folder for a model hub
    to: Literal["safetensors", "torchvision", "timm", "onnx", "torch-export", "hub"]
    out: Path | None = None  # the file or folder; default: in RUN/exported
    stages: tuple[str, ...] = ()  # what a graph gives; none: the last
    probes: tuple[Path, ...] = ()  # runs of probes on it, whose numbers a hub's card tells


def main(argv: list[str] | None = None) -> int:
    options = cli.parse(Export, argv, "fastrot export")
    from fastrot.evals.exported import write  # and torch with it: a wrong knob is told before

    out = write(options.run, options.to, options.out, options.stages, options.probes)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
