"""Prepare pictures: `fastrot convert --source imagefolder --root DIR --out FILE.beton`; pack and shards write packs and tars."""

import importlib

from fastrot import cli

OPTIONS = {  # of each command that writes a format: a module of data/, a class in it
    "convert": ("beton.write", "BetonOptions"),
    "pack": ("pack.write", "PackOptions"),
    "shards": ("tars.write", "TarsOptions"),
}


def main(argv: list[str] | None = None, command: str = "convert") -> int:
    from fastrot.data.prepare.convert import run

    module, name = OPTIONS[command]
    kind = getattr(importlib.import_module(f"fastrot.data.{module}"), name)
    return run(cli.parse(kind, argv, f"fastrot {command}"))
