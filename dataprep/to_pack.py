"""Pictures into one pack: `python dataprep/to_pack.py --source imagefolder --root DIR --out NAME.pack`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from anywhere

from fastrot import entry


def main(args: list[str] | None = None) -> int:
    return entry.status(lambda: _convert(args))


def _convert(args: list[str] | None) -> int:
    import tyro

    from fastrot.data.pack.write import PackOptions
    from fastrot.data.prepare.convert import run

    return run(tyro.cli(PackOptions, args=args))


if __name__ == "__main__":  # workers import this file too
    sys.exit(main())
