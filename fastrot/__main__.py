"""`fastrot COMMAND ...` and `python -m fastrot COMMAND ...`."""

import importlib
import sys

from fastrot import entry
from fastrot.config import UsageError

COMMANDS = {
    "train": "train a network: fastrot train PRESET --data PATH",
    "evaluate": "ask a trained one: fastrot evaluate RUN rotation",
    "doctor": "tell what a run would wait for: fastrot doctor DATA",
}


def main() -> None:
    sys.exit(entry.status(_main))


def _main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: fastrot COMMAND ...\n")
        for command, does in COMMANDS.items():
            print(f"  {command:<8} {does}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}: choose one of {', '.join(COMMANDS)}")
    return importlib.import_module(f"fastrot.{name}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
