"""Pictures into one pack: `python dataprep/to_pack.py --source imagefolder --root DIR --out NAME.pack`, or `fastrot pack`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from anywhere

from fastrot import convert, entry


def main(args: list[str] | None = None) -> int:
    return entry.status(lambda: convert.main(args, "pack"))


if __name__ == "__main__":  # workers import this file too
    sys.exit(main())
