"""Train: `torchrun fastrot/train.py PRESET --data PATH [any knob]`; plain python, srun and `fastrot train` do the same."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # run as a script: this would be fastrot/ itself
    sys.path[0] = str(HERE.parent)

import argparse

from fastrot import cli, config, entry
from fastrot.config import Config, UsageError
from fastrot.presets import PRESETS


def main(argv: list[str] | None = None) -> int:
    cfg = command_line(sys.argv[1:] if argv is None else argv)
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
            return cli.parse(Config, rest, "fastrot train --config FILE", **own)
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
    """The config.yaml of a run, read back."""
    import yaml

    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--config {path} is no YAML that can be read: name the config.yaml of a run folder"
        ) from error
    return config.from_plain(plain)


if __name__ == "__main__":
    sys.exit(entry.status(main))
