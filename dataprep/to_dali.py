"""Pictures into tar shards for DALI and WebDataset: `python dataprep/to_dali.py --source imagefolder --root DIR --out NAME`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from anywhere

from fastrot import entry


def main(args: list[str] | None = None) -> int:
    return entry.status(lambda: _convert(args))


def _convert(args: list[str] | None) -> int:
    import tyro

    from fastrot.data.prepare.convert import run
    from fastrot.data.tars.write import TarsOptions

    return run(tyro.cli(TarsOptions, args=args))


if __name__ == "__main__":  # workers import this file too
    sys.exit(main())
