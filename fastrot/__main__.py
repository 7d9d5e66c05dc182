"""`fastrot COMMAND ...` and `python -m fastrot COMMAND ...`."""

import importlib
import sys

import fastrot
from fastrot import cli, entry
from fastrot.config import UsageError

COMMANDS = {  # what each does, and an example
    "convert": (
        "pictures into one .beton, the format to begin with",
        "--source imagefolder --root pictures --out pictures.beton",
    ),
    "look": ("what is in prepared data, and crops of it rotated four ways", "pictures.beton"),
    "train": ("train a network", "demo --data pictures.beton --out runs/mine"),
    "evaluate": ("ask a trained network", "runs/mine rotation --data other.beton"),
    "draw": ("figures of runs, for papers", "runs/mine attention --beside runs/other"),
    "export": ("a trained network for others to use", "runs/mine --to onnx"),
    "doctor": ("what a run would wait for, and what to change", "pictures.beton"),
    "pack": (
        "pictures into one pack, which a GPU decodes",
        "--source imagefolder --root pictures --out pictures.pack",
    ),
    "shards": (
        "pictures into tar shards, for DALI and object stores",
        "--source imagefolder --root pictures --out shards",
    ),
}


def main() -> None:
    sys.exit(entry.status(_main))


def _main() -> int:
    name, *rest = sys.argv[1:] or ["--help"]
    if name == "--version":
        print(f"fastrot {fastrot.__version__}")
        return 0
    if name in ("-h", "--help"):
        print("usage: fastrot COMMAND ...    (fastrot COMMAND --help names every option)\n")
        for command, (does, example) in COMMANDS.items():
            print(f"  {command:<8}  {does}\n{'':12}fastrot {command} {example}")
        return 0
    if name not in COMMANDS:
        raise UsageError(cli.choose("there is no command", COMMANDS, name))
    if name in ("pack", "shards"):  # one file writes all formats
        return importlib.import_module("fastrot.convert").main(rest, name)
    return importlib.import_module(f"fastrot.{name}").main(rest)


if __name__ == "__main__":
    main()
