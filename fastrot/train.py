"""Train: `torchrun fastrot/train.py PRESET --data PATH [any knob]`; plain python, srun and `fastrot train` do the same."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # run as a script: this would be fastrot/ itself
    sys.path[0] = str(HERE.parent)

import argparse
import dataclasses
import os
from typing import Any

from fastrot import cli, config, entry, paths
from fastrot.config import Config, UsageError
from fastrot.presets import PRESETS


def main(argv: list[str] | None = None) -> int:
    cfg = command_line(paths.words(argv))
    config.check(cfg)
    cfg = config.resolved(cfg)
    if cfg.data is None:
        raise UsageError("--data is missing: name a .beton file, an image folder, or synthetic")
    from fastrot.training.session import train  # and torch with it: a wrong knob is told before

    return train(cfg)


def command_line(argv: list[str]) -> Config:
    """A preset's config with the knobs of the command line; `--config FILE` replays a run's config.yaml.

    Raises SystemExit for --help and for what cannot be parsed, told once by rank 0.
    """
    import tyro

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, nargs="?", const=Path())  # which is no file
    with entry.told_once():
        config.refuse_old_knobs(argv)
        known, rest = parser.parse_known_args(argv)
        if (file := known.config) is not None:
            if rest and rest[0] in PRESETS:
                way = f"leave {rest[0]!r} out"
                raise UsageError(f"--config {file} takes the place of the preset: {way}")
            own = {"default": read_config(file), "config": (tyro.conf.AvoidSubcommands,)}
            cfg = cli.parse(Config, rest, "fastrot train --config FILE", **own)
            return reached(cfg, paths.typed_in(file.parent))
        given = argv[0] if argv else "-"
        if given.startswith("-") and given not in ("-h", "--help"):
            known = ", ".join(PRESETS)
            way = f"such as fastrot train demo --data PATH; choose one of {known}"
            raise UsageError(f"fastrot train wants a preset as its first word, {way}")
        if not given.startswith("-") and given not in PRESETS:
            raise UsageError(cli.choose("there is no preset", PRESETS, given))
        presets = {name: ((make.__doc__ or "").strip(), make()) for name, make in PRESETS.items()}
        own = {"prog": "fastrot train", "registry": cli.rules()}
        return tyro.extras.overridable_config_cli(presets, args=argv, **own)


def read_config(path: Path) -> Config:
    """The config.yaml of a run, read back; where it lies in that run's folder, this one is its --out."""
    import yaml

    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--config {path} is no YAML that can be read: name the config.yaml of a run folder"
        ) from error
    cfg = config.from_plain(plain)
    own = (path.parent / "environment.json").exists()
    return dataclasses.replace(cfg, out=str(path.parent)) if own else cfg


def reached(cfg: Config, folder: str | None) -> Config:
    """The config of a run whose command was typed in `folder`, with paths that lead to its files from here.

    Raises UsageError where data leads nowhere; other weights and tables are asked for when they are read.
    """

    def seen(knobs: Any, name: str, knob: str | None = None) -> dict[str, str]:
        path = getattr(knobs, name, None)
        return {name: paths.seen_from_here(path, folder, knob)} if path else {}

    method = dataclasses.replace(cfg.method, **seen(cfg.method, "pu_table"))
    data = seen(cfg, "data", "--data") | seen(cfg, "val", "--val")
    out = cfg.out and os.path.expanduser(cfg.out)
    return dataclasses.replace(cfg, out=out, method=method, **data, **seen(cfg, "start_from"))


if __name__ == "__main__":
    sys.exit(entry.status(main))
