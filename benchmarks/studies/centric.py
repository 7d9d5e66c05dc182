"""Object- and scene-centric pictures: how well nets tell rotations of faces, of cats and dogs, of streets, and what they look at.

    python -m benchmarks.studies.centric [--root FOLDER] [--seeds 3] [--device cpu|cuda] [--tables NAME ...]

--root holds lfw/, coco/ (its folder, of which cats and dogs are taken) and cityscapes/: full-size sets, or the small ones beside the
checkout. On a GPU the study's 128 pixels, on a CPU 64 and a few hundred steps. Two hypotheses of the study are tried on streets: that
mean brightness alone tells the rotation (a linear classifier on the means of rows and columns), and what is left to nets where it is evened out.
"""

import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8
from PIL import Image

from benchmarks import measure, runs
from benchmarks.studies import study
from benchmarks.studies.study import Figure, Job, Order, Study
from fastrot import assemble, config, entry
from fastrot.config import UsageError
from fastrot.core import View

# preset of each net, and its gradients' thresholds for the rotations' scores and the embedding in the study
NETS = {
    "six layers": ("rotnet-six-layer", 8e-4, 8e-4),
    "MobileNetV2": ("rotnet-mobilenet-v2", 8e-3, 1e-2),
    "EfficientNet-B0": ("rotnet-efficientnet-b0", 8e-3, 1e-4),
}
FACES, PETS, STREETS, EVENED = "faces", "cats and dogs", "streets", "streets, evened"
SETS = (FACES, PETS, STREETS)
ROTATION, EMBEDDING = "Q of the rotations' scores", "Q of the embedding"  # tables
ACCURACY, BRIGHTNESS = "rotation accuracy", "brightness and streets"
MEANS = "a linear classifier on means of rows and columns"
PAPER = {  # of the study: accuracy on SETS, Q of both layers
    "six layers": ((0.5759, 0.9804, 0.9935), 0.1281, 0.0659),
    "MobileNetV2": ((0.4341, 0.6036, 0.9985), 0.3184, 0.2101),
    "EfficientNet-B0": ((0.5444, 0.8433, 0.9975), 0.2868, 0.1161),
}
RAW = ("--encoding", "raw")  # what a JPEG loses tells rotations of evened pictures (LOG.md)
HELD = 0.2  # share of the faces that are judged


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a study."""

    side: int  # pixels of a crop
    batch: int
    steps: int | None  # None: the preset's epochs
    pictures: int | None  # whose saliency is asked; None: all
    precision: str | None = None

    def words(self) -> tuple:
        length = () if self.steps is None else ("--schedule.steps", self.steps)
        return ("--image-size", self.side, "--batch", self.batch, *length)


SIZES = {
    "cuda": Size(side=128, batch=64, steps=None, pictures=None),
    # depthwise convolutions are slower in bf16 on a CPU
    "cpu": Size(side=64, batch=32, steps=240, pictures=24, precision="fp32"),
}


def study_of(data: dict[str, tuple], size: Size, about: str) -> Study:
    """All jobs and tables, on pictures that these knobs name."""
    jobs: dict[str, Job] = {}
    figures: list[Figure] = []
    for net, (preset, *thresholds) in NETS.items():
        accuracies, *qualities = PAPER[net]
        by_set = dict(zip((PETS, FACES, STREETS), accuracies, strict=True))
        for pictures in (*SETS, EVENED):
            name = f"{preset}-{pictures}"
            jobs[name] = Job((preset, *data[pictures], *size.words()))
            if pictures in SETS:
                paper = by_set[pictures]
                figures.append(Figure(ACCURACY, net, pictures, name, "accuracy", paper))
            if pictures in (STREETS, EVENED):
                figures.append(Figure(BRIGHTNESS, net, pictures, name, "accuracy"))
        some = () if size.pictures is None else ("--pictures", size.pictures)
        for table, layer, threshold, paper in zip(
            (ROTATION, EMBEDDING), ("rotation", "embedding"), thresholds, qualities, strict=True
        ):
            name = f"{preset}-{layer}"
            words = ("saliency", "--layers", layer, "--threshold", threshold, *some)
            jobs[name] = Job(words, of=f"{preset}-{PETS}", asks=True)
            for line, stage in ((net, layer), (f"{net}, random", f"random {layer}")):
                own = paper if line == net else 0.0
                figures.append(
                    Figure(table, line, "at the study's threshold", name, f"{stage}.q", own)
                )
                figures.append(Figure(table, line, "at the best threshold", name, f"{stage}.best"))
                figures.append(Figure(table, line, "by rank", name, f"{stage}.ranked"))
    for table in (ROTATION, EMBEDDING):  # the same for all nets
        name = f"rotnet-six-layer-{'rotation' if table == ROTATION else 'embedding'}"
        figures.append(Figure(table, "every pixel", "at the best threshold", name, "chance.best"))
        figures.append(Figure(table, "pixels at random", "by rank", name, "chance.ranked"))
    orders = [
        order
        for net in NETS
        for order in (
            Order(f"{net}: streets over cats and dogs", (ACCURACY, net, STREETS), (ACCURACY, net, PETS)),
            Order(f"{net}: streets over evened streets", (BRIGHTNESS, net, STREETS), (BRIGHTNESS, net, EVENED)),
            *(
                # at a threshold the scale of gradients decides, not where they are
                Order(f"{net}, {table}, by rank: trained over random", (table, net, "by rank"), (table, f"{net}, random", "by rank"))
                for table in (ROTATION, EMBEDDING)
            ),
        )
    ]  # fmt: skip
    return Study("centric", about, jobs, tuple(figures), tuple(orders), precision=size.precision)


# ---- pictures ----


def prepared(root: Path, work: Path, side: int) -> dict[str, tuple]:
    """The knobs that name each set's pictures."""
    kind = f"{zlib.crc32(str(root.resolve()).encode()):08x}-{side}"

    def made(name: str, *words: Any) -> Path:
        return runs.convert("to_ffcv.py", work / f"{name}-{kind}.beton", *words)

    shrunk = ("--short-side", 2 * side)
    faces = made("faces", "--source", "lfw", "--root", _folder(root, "lfw"), *shrunk)
    knobs: dict[str, tuple] = {FACES: ("--data", faces, "--hold-out", HELD)}
    coco, streets = (
        _folder(root, "coco", "coco_catdog"),
        _folder(root, "cityscapes", "cityscapes-like"),
    )
    full = (coco / "annotations" / "instances_train2017.json").exists()
    pets, plain, evened = (), (), ()
    for knob, split in (("--data", "train"), ("--val", "val")):
        of = ("--source", "coco", "--root", coco, "--split", f"{split}2017" if full else split)
        pets += (knob, made(f"pets-{split}", *of, "--categories", "cat,dog", *shrunk))
        of = ("--source", "cityscapes", "--root", streets, "--split", split)
        frames = made(f"streets-{split}", *of, *shrunk)
        plain += (knob, frames)
        folder = work / f"evened-{kind}" / split
        if not (out := work / f"evened-{split}-{kind}.beton").exists():
            even_out(frames, folder, side)
        evened += (
            knob,
            runs.convert("to_ffcv.py", out, "--source", "imagefolder", "--root", folder, *RAW),
        )
    return knobs | {PETS: pets, STREETS: plain, EVENED: evened}


def _folder(root: Path, *names: str) -> Path:
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise UsageError(
            f"--root {root} holds no {names[0]}/: name a folder with lfw, coco and cityscapes"
        )
    return found


def even_out(frames: Path, folder: Path, side: int) -> None:
    """Write whole pictures of a prepared file, squashed, as PNGs of which `evened` has taken the brightness of rows and columns."""
    for number, picture in enumerate(squashed(frames, side)):
        file = folder / "street" / f"{number:06}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(evened(picture)).save(file)


def squashed(frames: Path, side: int) -> UInt8[np.ndarray, "n s s 3"]:
    """Whole pictures, as nets of the study see them."""
    view = View(crops=(config.Whole(size=side),), shuffled=False)
    loader = assemble.open_loader(frames, view, batch=64, workers=0, enlarge=True)
    return np.concatenate([batch.images.numpy() for batch in loader.epoch(0)])


def evened(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture, each colour of which has the same mean in every row and in every column: the whole's.

    Contrast is halved first, so that few pixels leave 0 to 255.
    """
    half = (picture.astype(np.float64) - 128) / 2
    even = half - half.mean(axis=1, keepdims=True) - half.mean(axis=0, keepdims=True)
    return (even + half.mean(axis=(0, 1)) * 2 + 128).round().clip(0, 255).astype(np.uint8)


# ---- brightness alone ----


def brightness(data: dict[str, tuple], side: int, same: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for streets, and one for evened streets: how many rotations the classifier tells of pictures that it did not learn from."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for name in (STREETS, EVENED):
        _, train, _, val = data[name]
        told = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        told.fit(*means(train, side))
        right = float(told.score(*means(val, side)))
        figure = Figure(BRIGHTNESS, MEANS, name, "", "")
        yield study.cell(figure, [right], 0.0, same)


def means(frames: Path, side: int) -> tuple[Float[np.ndarray, "n f"], Int64[np.ndarray, " n"]]:
    """Mean brightness of each row and column of whole pictures in their four rotations, squashed; and the rotations."""
    grey = squashed(frames, side).mean(axis=3)
    views = [np.rot90(grey, rotation, axes=(1, 2)) for rotation in range(4)]
    features = [np.hstack([each.mean(axis=2), each.mean(axis=1)]) for each in views]
    return np.concatenate(features), np.repeat(np.arange(4), len(grey))


def main(args: list[str] | None = None) -> int:
    """Prepare, train, ask, print, and append to the machine's file of results."""
    asked = study.parser(__doc__, "lfw/, coco/ and cityscapes/").parse_args(args)
    size = SIZES[asked.device]
    root = asked.root or measure.shared_data()
    data = prepared(root, asked.work, size.side)
    pictures = ", ".join(f"{_pictures(data[name][1]):,} of {name}" for name in SETS)
    length = "the presets' epochs" if size.steps is None else f"{size.steps} steps of {size.batch}"
    about = (
        f"crops of {size.side} pixels (the study: 128), {length}, pictures: {pictures} (of faces {HELD:.0%} are judged); "
        f"saliency of {size.pictures or 'all'} pictures of cats and dogs; a Q as high as every pixel's says that every pixel "
        "passes the threshold; evened streets also have half the contrast of the others"
    )
    shape = {"side": size.side, "batch": size.batch, "steps": size.steps or "preset"}
    made = study_of(data, size, about)
    same = study.shared(made, asked, shape)

    def rows() -> Iterator[dict[str, Any]]:
        if asked.tables is None or BRIGHTNESS in asked.tables:
            yield from brightness(data, size.side, same)
        yield from study.rows(made, asked, shape)

    runs.keep(rows(), asked, study.said)
    return 0


def _pictures(prepared: Path) -> int:
    return assemble.open_data(prepared).rows


if __name__ == "__main__":
    sys.exit(entry.status(main))
