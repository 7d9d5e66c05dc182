"""Draw: `python fastrot/draw.py RUN attention` and other figures of a run, or `compare RUN RUN ...`; `fastrot draw` does the same."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if sys.path[0] == str(HERE):  # run as a script: this would be fastrot/ itself
    sys.path[0] = str(HERE.parent)

import importlib
from dataclasses import dataclass, field
from typing import Literal

from fastrot import cli, entry, paths, ranges
from fastrot.config import UsageError
from fastrot.evals.knobs import Asked


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Curves of several runs, and what probes say of each stage: FOLDER/compare.png and index.html."""

    runs: tuple[Path, ...] = field(metadata=cli.first("RUN"))  # runs' folders, two or more
    out: Path = Path("compare")  # the folder
    # what the curves show, of metrics.jsonl; loss and accuracy on held-out pictures
    scores: tuple[str, ...] = ("val_loss", "val_accuracy")
    against: Literal["epoch", "step"] = "epoch"  # what they are drawn against


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The filters of a net's first convolution: FOLDER/filters.png, .svg and index.html."""

    run: str = field(metadata=cli.first("RUN"))  # a run's folder, a checkpoint or what was exported
    out: Path = Path("filters")  # the folder


@dataclass(frozen=True, kw_only=True)
class Attention(Asked):
    """Where the stages of nets answer, upright and rotated: FOLDER/attention.png, rotations.png, .svg and index.html."""

    run: str = field(metadata=cli.first("RUN"))  # a run's folder, a checkpoint or what was exported
    out: Path = Path("attention")  # the folder
    data: str | None = None  # pictures to draw; default: those that the run was judged on
    pictures: int = 4  # so many, spread evenly; up to 12
    beside: tuple[str, ...] = ()  # other runs, with the same stages for pictures of the same size
    random: bool = True  # and RUN's network with random weights
    stages: tuple[str, ...] = ()  # that give maps; default: all of these but pools
    # of |activation|, summed over channels: a stage each, the last one for all that follow
    powers: tuple[float, ...] = (1.0, 2.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Saliency(Asked):
    """Which pixels a net's answers hang on, beside a random net: FOLDER/saliency.png, .svg and index.html."""

    run: str = field(metadata=cli.first("RUN"))  # a run's folder or a checkpoint
    out: Path = Path("saliency")  # the folder
    data: str | None = None  # pictures to draw; default: those that the run was judged on
    pictures: int = 4  # so many, spread evenly over those with boxes, where some have; up to 12
    # the rotations' scores, and the last stage's features; default: those that the run has
    layers: tuple[Literal["rotation", "embedding"], ...] = ()
    reduce: Literal["max", "mean"] = "max"  # over a layer's neurons


@dataclass(frozen=True, kw_only=True)
class Embedding(Asked):
    """Pictures in a plane by the features of a stage, by PCA and t-SNE: FOLDER/embedding.png, thumbnails.png, .svg and index.html."""

    run: str = field(metadata=cli.first("RUN"))  # a run's folder, a checkpoint or what was exported
    out: Path = Path("embedding")  # the folder
    data: str | None = None  # pictures to draw; default: those that the run was judged on
    pictures: int = 500  # so many, spread evenly; up to 5,000
    stage: str | None = None  # whose features; default: the one that says most of content
    perplexity: float = 30.0  # of t-SNE, about how many neighbours count; less for few pictures
    seed: int = 0  # of t-SNE


KINDS = {  # by the word on the command line, with the file of evals/ whose function of that name draws it
    "compare": (Compare, "compare"),
    "filters": (Filters, "drawn"),
    "attention": (Attention, "drawn"),
    "saliency": (Saliency, "drawn"),
    "embedding": (Embedding, "embedding"),
}


def main(argv: list[str] | None = None) -> int:
    with entry.told_once():
        words = paths.words(argv)
        if not words or words[0] in ("-h", "--help"):
            print(
                "usage: fastrot draw RUN FIGURE [any knob], or fastrot draw compare RUN RUN ...\n"
            )
            for name, (kind, _) in KINDS.items():
                print(f"  {name:<9}  {(kind.__doc__ or '').strip()}")
            return 0
        if words[0] != "compare" and (words[0].startswith("-") or len(words) < 2):
            figures = ", ".join(name for name in KINDS if name != "compare")
            told = f"fastrot draw wants a run and a figure: RUN and one of {figures}"
            raise UsageError(f"{told}; or compare RUN RUN ...")
        at = 0 if words[0] == "compare" else 1  # behind the run
        usage, name = " ".join(words[: at + 1]), words.pop(at)
        if name not in KINDS:
            raise UsageError(cli.choose("there is no figure", KINDS, name))
    if entry.place().world > 1:
        raise UsageError("draw runs in one process: start it without torchrun")
    kind, module = KINDS[name]
    options = cli.parse(kind, words, f"fastrot draw {usage}")
    ranges.check_ranges(options)
    draw = getattr(importlib.import_module(f"fastrot.evals.{module}"), name)  # and torch with it
    print(f"written to {draw(options)}")
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
