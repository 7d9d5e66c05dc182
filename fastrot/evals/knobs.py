"""The knobs of each evaluation; the first lines are its help. Standard library only: a wrong one is told before torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastrot.config import LoaderName


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How pictures are looked at, in every evaluation."""

    data: str | None = None  # pictures to ask about; default: those that the run learnt from
    batch: int | None = None  # pictures at once in each process; default: the run's
    workers: int | None = None  # threads or processes that decode; default: one a core
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    loader: LoaderName = "auto"  # what reads the data; auto: by its format
    on_bad_record: Literal["stop", "skip"] = "stop"  # a picture that cannot be read; skip counts


@dataclass(frozen=True, kw_only=True)
class Rotation(Asked):
    """Ask which way up each picture is, rotated four ways; a folder of folds: the net that never saw it."""

    data: str | None = None  # pictures to ask about; default: all that the run's data holds
    table: Path | None = None  # write the probabilities: FILE.npz, or the original's text FILE.dat


@dataclass(frozen=True, kw_only=True)
class Classes(Asked):
    """Tell how many pictures of each class a supervised run, or each head of a probe, classifies right."""

    data: str | None = None  # pictures to ask about; default: those that the run was judged on
    json: Path | None = None  # write the numbers: FILE.json


@dataclass(frozen=True, kw_only=True)
class OfStages(Asked):
    """What evaluations over features have in common."""

    stages: tuple[str, ...] = ("all",)  # those asked; f1 and f2 are the last one's halves
    pool: int = 1  # pixels a side to which maps are averaged
    json: Path | None = None  # write the numbers: FILE.json


@dataclass(frozen=True, kw_only=True)
class Knn(OfStages):
    """Tell the class of pictures by those of their nearest neighbours, from each stage."""

    val: str | None = None  # pictures to tell; default: the run's, or if --data is given all of it
    k: int = 200  # neighbours that vote
    sigma: float = 0.07  # a vote weighs exp(cosine / sigma)


@dataclass(frozen=True, kw_only=True)
class Retrieval(OfStages):
    """Find pictures of the same class: precision among the first, mean average precision, from each stage."""

    val: str | None = None  # pictures that ask; default: the run's, or if --data is given all of it
    at: tuple[int, ...] = (1, 5, 10)  # how many of the first
    gallery: Path | None = None  # write pictures of some: FOLDER/gallery.png and index.html


@dataclass(frozen=True, kw_only=True)
class Pairs(OfStages):
    """Tell pairs of the same person from others, as Labelled Faces in the Wild asks, from each stage."""

    pairs: Path | None = None  # a file in the form of LFW's pairs.txt; default: that beside --data


@dataclass(frozen=True, kw_only=True)
class Svm(OfStages):
    """Learn a linear SVM for each class, several a picture as in VOC: mean average precision, from each stage."""

    data: str | None = None  # pictures to learn from, with boxes beside them or with labels
    val: str | None = None  # pictures to be judged on, of the same classes
    workers: int | None = None  # that decode, then threads that learn SVMs; default: one a core
    costs: tuple[float, ...] = ()  # C, of which each class takes its best; default: Goyal's 26


@dataclass(frozen=True, kw_only=True)
class Invariance(OfStages):
    """Tell how far features of a picture are from those of its transform, and from those of other pictures."""

    data: str | None = None  # pictures to ask about; default: those that the run was judged on
    stages: tuple[str, ...] = ("last",)  # those asked, beside the heads of a PIRL run
    # of each picture; default: the run's own, else rotations
    transform: Literal["rotation", "jigsaw"] | None = None


@dataclass(frozen=True, kw_only=True)
class Saliency(Asked):
    """Tell how well the pixels that a net's answers hang on agree with boxes of objects, beside a random net."""

    data: str | None = None  # pictures with boxes beside them; default: those the run was judged on
    # the rotations' scores, and the last stage's features; default: those that the run has
    layers: tuple[Literal["rotation", "embedding"], ...] = ()
    threshold: float = 8e-3  # a pixel is salient from this gradient on
    reduce: Literal["max", "mean"] = "max"  # over a layer's neurons
    categories: str | None = None  # boxes of these alone, as cat,dog
    pictures: int | None = None  # ask so many, spread evenly; default: all with a box
    json: Path | None = None  # write the numbers: FILE.json


@dataclass(frozen=True, kw_only=True)
class Upright:
    """Find the photographs of a folder that lie on their side or head, and copy them so that they open upright."""

    folder: Path = field(metadata={"first": "FOLDER"})  # of photographs, with all folders in it
    out: Path = Path("upright")  # gets upright.csv and turned.png; where it has them, it goes on
    sure: float = 0.95  # confidence from which a photograph is taken for turned
    copy_to: Path | None = None  # write copies of those turned that open upright; originals stay
    data: str | None = None  # upright pictures to tell how sure it is; default: the run held out
    batch: int | None = None  # pictures at once; default: the run's
    workers: int | None = None  # processes that decode; default: one a core
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
