"""What is in prepared data: `python dataprep/look.py FILE.beton`, or `fastrot look`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from anywhere

from fastrot import entry


def main(args: list[str] | None = None) -> int:
    def run() -> int:
        from fastrot import look  # and numpy with it

        return look.main(args)

    return entry.status(run)


if __name__ == "__main__":
    sys.exit(main())
