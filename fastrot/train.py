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

from fastrot import cli, config, entry, paths, ranges
from fastrot.config import Config, UsageError
from fastrot.presets import PRESETS

PATHS = ("data", "val", "start_from", "pu_table")  # knobs of a run or its method that name files


def main(argv: list[str] | None = None) -> int:
    cfg = command_line(paths.words(argv))
    ranges.check(cfg)
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
            before = read_config(file)
            own = {"default": before, "config": (tyro.conf.AvoidSubcommands,)}
            cfg = cli.parse(Config, rest, "fastrot train --config FILE", **own)
            return reached(cfg, before, paths.typed_in(file.parent))
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


def reached(cfg: Config, before: Config, folder: str | None) -> Config:
    """The config with the paths that it has from a run `before`, typed in `folder`, leading to its files from here.

    What is typed now is meant as it is. Raises UsageError where data leads nowhere, or a path to two files.
    """

    def seen(part: Any, old: Any, at: str = "") -> dict[str, str]:
        found = {name: getattr(part, name, None) for name in PATHS}
        found = {n: path for n, path in found.items() if path and path == getattr(old, n, None)}
        return {n: paths.seen_from_here(p, folder, config.knob(at + n)) for n, p in found.items()}

    method = dataclasses.replace(cfg.method, **seen(cfg.method, before.method, "method."))
    out = cfg.out and os.path.expanduser(cfg.out)
    return dataclasses.replace(cfg, out=out, method=method, **seen(cfg, before))


if __name__ == "__main__":
    sys.exit(entry.status(main))
