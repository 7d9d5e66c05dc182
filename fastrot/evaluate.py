"""Evaluate: `torchrun fastrot/evaluate.py RUN EVALUATION [any knob]`; plain python, srun and `fastrot evaluate` do the same."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # run as a script: this would be fastrot/ itself
    sys.path[0] = str(HERE.parent)

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastrot import entry
from fastrot.config import LoaderName, RunError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from fastrot.core import Data
    from fastrot.evals.rotation import Answers
    from fastrot.evals.trained import Trained

AGAIN = "give the same command again"  # the way out where a process was lost


def main(argv: list[str] | None = None) -> int:
    import tyro

    words = sys.argv[1:] if argv is None else argv
    with entry.told_once():
        if not words or not {"-h", "--help"}.isdisjoint(words[:2]):
            print("usage: evaluate.py RUN EVALUATION [any knob]\n")
            print(
                "RUN is a run's folder, a checkpoint, or a folder of fold0, fold1, ... (--folds).\n"
            )
            for word, (knobs, _) in EVALUATIONS.items():
                print(f"  {word:<9} {(knobs.__doc__ or '').strip()}")
            return 0
        known = ", ".join(EVALUATIONS)
        if words[0].startswith("-") or len(words) < 2:
            raise UsageError(f"evaluate.py wants a run and an evaluation: RUN and one of {known}")
        run, name, *rest = words
        if name not in EVALUATIONS:
            raise UsageError(f"there is no evaluation {name!r}: choose one of {known}")
        knobs, evaluate = EVALUATIONS[name]
        wanted = tyro.cli(knobs, args=rest, prog=f"evaluate.py {run} {name}")
    return evaluate(run, wanted)


# ---- rotation ----


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Ask which way up each picture is, rotated four ways; a folder of folds: the net that never saw it."""

    data: str | None = None  # pictures to ask about; default: all that the run's data holds
    table: Path | None = None  # write the probabilities: FILE.npz, or the original's text FILE.dat
    batch: int | None = None  # pictures at once in each process; default: the run's
    workers: int | None = None  # threads or processes that decode; default: one a core
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    loader: LoaderName = "auto"  # what reads the data; auto: by its format
    on_bad_record: Literal["stop", "skip"] = "stop"  # a picture that cannot be read; skip counts


def rotation(run: str, knobs: Rotation) -> int:
    """Print how often the nets are right, and write the table where one is asked for."""
    from fastrot import assemble, dist
    from fastrot.evals.rotation import exactly
    from fastrot.evals.trained import nets_of
    from fastrot.methods import rotation_table
    from fastrot.training.device import choose_device

    for name, least in {"batch": 1, "workers": 0}.items():
        if (value := getattr(knobs, name)) is not None and value < least:
            raise UsageError(f"--{name} got {value}: it wants at least {least}")
    if knobs.table is not None:
        rotation_table.check_name(knobs.table, "--table")
    nets = nets_of(run)
    for net in nets:
        if not assemble.METHODS[type(net.cfg.method)].predicts_rotation(net.cfg.method):
            raise UsageError(
                f"{net.source} predicts no rotations ({type(net.cfg.method).__name__}): name a run of rotnet or "
                "decoupling"
            )
    here = dist.place()
    device = choose_device(knobs.device, here)
    name = knobs.data or nets[0].cfg.data or ""
    data = assemble.open_data(name, knobs.loader)
    fold = _folds(nets, data, name)
    with dist.joined(device, AGAIN), exactly():
        answers = _asked(nets, knobs, data, fold, here, device)
    if here.rank:
        return 0
    if not answers.asked.any():
        raise RunError(f"no picture of {name} can be read: prepare it anew")
    print(f"{run}: {data.rows:,} pictures of {name}, each rotated four ways")
    print(*_shares_right(answers, fold, nets), sep="\n")
    for line in _cautions(answers, nets, data):
        print(line)
    if knobs.table is not None:
        table = rotation_table.RotationTable(answers.probabilities, fold, data.fingerprint)
        rotation_table.write(knobs.table, table)
        print(f"written to {knobs.table}")
    return 0


def _folds(nets: "list[Trained]", data: "Data", name: str) -> "np.ndarray":
    """The fold of each row, whose net never saw it; -1 where there is one net for all."""
    import numpy as np

    from fastrot.data.keys import fold_of

    if len(nets) == 1:
        return np.full(data.rows, -1, np.int8)
    for net in nets:
        if net.identity["data_fingerprint"] != data.fingerprint:
            raise UsageError(
                f"--data {name} holds other pictures than {net.source} was trained on, so that no fold says "
                f"which net never saw them: give the same --data, or name {net.source} alone"
            )
    return fold_of(data.keys, len(nets))


def _asked(nets, knobs: Rotation, data: "Data", fold: "np.ndarray", here, device) -> "Answers":
    """What the nets say of all rows; on every rank."""
    from fastrot import assemble
    from fastrot.evals.rotation import Answers, ask
    from fastrot.evals.trained import trained_method

    workers = entry.share_of_cores(here.local_world) if knobs.workers is None else knobs.workers
    how: dict[str, Any] = {"rank": here.rank, "world": here.world, "device": device}
    how |= {"workers": workers, "on_bad_record": knobs.on_bad_record}
    answers = Answers.none_yet(data.rows)
    with _counted(data.rows, here.rank) as count:
        for number, net in enumerate(nets):
            with _rows_file(fold, number) as rows:
                view = assemble.evaluation_view(net.cfg, rows)
                how["batch"] = knobs.batch or net.cfg.batch
                loader = assemble.open_loader(data, view, enlarge=net.cfg.enlarge, **how)
            method = trained_method(net.source, device)
            ask(method, loader, answers, lambda pictures: count(pictures * here.world))
    return answers.of_all_ranks()


@contextlib.contextmanager
def _rows_file(fold: "np.ndarray", number: int) -> Iterator[Path | None]:
    """The rows of a fold as a view wants them; None where all are asked about."""
    import numpy as np

    if (fold < 0).all():
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "rows.npy", np.flatnonzero(fold == number))
        yield Path(folder) / "rows.npy"


@contextlib.contextmanager
def _counted(pictures: int, rank: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, on a terminal and rank 0 alone; what it yields hears of pictures done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(quiet=rank > 0)
    with Progress(console=console, disable=rank > 0 or not console.is_terminal) as bar:
        task = bar.add_task("pictures", total=pictures)
        yield lambda done: bar.update(task, advance=done)


def _shares_right(answers: "Answers", fold: "np.ndarray", nets: "list[Trained]") -> list[str]:
    from fastrot.training.journal import table

    asked = answers.asked > 0
    right = answers.right[asked]
    rows = [("all rotations", f"{right.mean():.2%}")]
    for rotation, share in enumerate(right.mean(axis=0)):
        rows.append((f"rotated {90 * rotation} degrees" if rotation else "upright", f"{share:.2%}"))
    for number, net in enumerate(nets if len(nets) > 1 else ()):
        mine = answers.right[asked & (fold == number)]
        share = f"{mine.mean():.2%}" if len(mine) else "nothing"
        rows.append((f"fold {number}", f"{share} of {len(mine):,} pictures, by {net.source}"))
    return table(rows)


def _cautions(answers: "Answers", nets: "list[Trained]", data: "Data") -> list[str]:
    lines = []
    if unread := int((answers.asked == 0).sum()):
        lines.append(
            f"{unread:,} of {data.rows:,} pictures cannot be read: their probabilities are 0, so that PU weights "
            "leave them as they are"
        )
    seen = nets[0].identity.get("data_fingerprint") in (None, data.fingerprint)
    if len(nets) == 1 and seen:
        lines.append(
            "of pictures that it was trained on the net is too sure: for PU weights train with --folds 2"
        )
    begun = next((net.cfg.start_from for net in nets if net.cfg.start_from), None)
    if len(nets) > 1 and begun:
        lines.append(
            f"these nets began with the weights of {begun}: if it was trained on these pictures, no net is one that "
            "never saw them\n"
        )
    return lines


# the word on the command line: its knobs, and what is done with them
EVALUATIONS: dict[str, tuple[type, Callable[[str, Any], int]]] = {"rotation": (Rotation, rotation)}


if __name__ == "__main__":
    sys.exit(entry.status(main))
