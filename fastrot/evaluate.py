"""Evaluate: `torchrun fastrot/evaluate.py RUN EVALUATION [any knob]`; plain python, srun and `fastrot evaluate` do the same."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # run as a script: this would be fastrot/ itself
    sys.path[0] = str(HERE.parent)

import importlib

from fastrot import cli, entry, paths, ranges
from fastrot.config import UsageError
from fastrot.evals import knobs

# by the word on the command line, which names a file of evals/: its `evaluate` gets the run and the knobs
EVALUATIONS: dict[str, type] = {
    "rotation": knobs.Rotation,
    "classes": knobs.Classes,
    "knn": knobs.Knn,
    "retrieval": knobs.Retrieval,
    "pairs": knobs.Pairs,
    "svm": knobs.Svm,
    "saliency": knobs.Saliency,
    "invariance": knobs.Invariance,
    "upright": knobs.Upright,
}


def main(argv: list[str] | None = None) -> int:
    with entry.told_once():
        words = paths.words(argv)
        if not words or not {"-h", "--help"}.isdisjoint(words[:2]):
            print("usage: fastrot evaluate RUN EVALUATION [any knob]\n")
            print("RUN is a run's folder, a checkpoint, or the folder of a run with --folds.\n")
            for word, kind in EVALUATIONS.items():
                print(f"  {word:<9} {(kind.__doc__ or '').strip()}")
            return 0
        known = ", ".join(EVALUATIONS)
        if words[0].startswith("-") or len(words) < 2:
            raise UsageError(
                f"fastrot evaluate wants a run and an evaluation: RUN and one of {known}"
            )
        run, name, *rest = words
        if name not in EVALUATIONS:
            raise UsageError(cli.choose("there is no evaluation", EVALUATIONS, name))
        wanted = cli.parse(EVALUATIONS[name], rest, f"fastrot evaluate {run} {name}")
    ranges.check_ranges(wanted)
    return importlib.import_module(f"fastrot.evals.{name}").evaluate(run, wanted)


if __name__ == "__main__":
    sys.exit(entry.status(main))
