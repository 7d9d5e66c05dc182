"""Pictures into one .beton: `python dataprep/to_ffcv.py --source imagefolder --root DIR --out FILE.beton`, or `fastrot convert`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from anywhere

from fastrot import convert, entry


def main(args: list[str] | None = None) -> int:
    return entry.status(lambda: convert.main(args, "convert"))


if __name__ == "__main__":  # workers import this file too
    sys.exit(main())
