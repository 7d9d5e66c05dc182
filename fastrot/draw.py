"""Draw: `python fastrot/draw.py compare RUN RUN ...` lays runs over each other; `fastrot draw` does the same."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # run as a script: this would be fastrot/ itself
    sys.path[0] = str(HERE.parent)

from dataclasses import dataclass, field
from typing import Literal

from fastrot import cli, entry, paths
from fastrot.config import UsageError


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Curves of several runs, and what probes say of each stage: FOLDER/compare.png and index.html."""

    runs: tuple[Path, ...] = field(metadata=cli.first("RUN"))  # runs' folders, two or more
    out: Path = Path("compare")  # the folder
    # what the curves show, of metrics.jsonl; loss and accuracy on held-out pictures
    scores: tuple[str, ...] = ("val_loss", "val_accuracy")
    against: Literal["epoch", "step"] = "epoch"  # what they are drawn against


KINDS = {"compare": Compare}


def main(argv: list[str] | None = None) -> int:
    with entry.told_once():
        words = paths.words(argv)
        if not words or words[0] in ("-h", "--help"):
            print("usage: fastrot draw KIND ...\n")
            for name, kind in KINDS.items():
                print(f"  {name:<8}  {(kind.__doc__ or '').strip()}")
            return 0
        if words[0] not in KINDS:
            raise UsageError(cli.choose("there is no picture", KINDS, words[0]))
    options = cli.parse(Compare, words[1:], "fastrot draw compare")
    from fastrot.evals.compare import compare  # and matplotlib with it

    print(f"written to {compare(options.runs, options.out, options.scores, options.against)}")
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
