"""Linear SVMs on frozen features, one for each class, by average precision (Goyal 2019, Misra 2020): `evaluate.py RUN svm`.

As facebookresearch/fair_self_supervision_benchmark and vissl learn them for VOC07, with two differences: pictures in which a
class is only difficult are left out of learning too, not taken for negatives; and the primal problem is solved, not the dual.
Both have the same answer, but this one is found without chance and well within max_iter: threads give the bits of one.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int8
from rich.console import Console
from rich.progress import track

from fastrot import dist, entry
from fastrot.config import UsageError
from fastrot.core import Data
from fastrot.data.boxes import read_boxes
from fastrot.data.files import some
from fastrot.evals.asked import begin, given, keep, say, seen
from fastrot.evals.knobs import Svm
from fastrot.evals.trained import load
from fastrot.training.device import choose_device

COSTS = sorted([10.0**n for n in range(-7, 3)] + [0.5**n for n in range(4, 20)])  # Goyal's
FOLDS = 3  # of the pictures to learn from, by which a class takes its cost

Known = Int8[np.ndarray, "_ classes"]  # of pictures, whether they have a class: 1, -1; 0: left out


class Judged(NamedTuple):
    """The SVM of a class."""

    ap: float
    interpolated: float
    cost: float  # C


def presence(data: Data, name: str) -> tuple[tuple[str, ...], Known]:
    """Names of classes, and whether each row has them, by boxes or else by labels; `name`: of the data, for the sentence.

    Left out is a picture that has of a class only boxes that are `ignore`.
    """
    if "boxes.npz" in data.beside:
        boxes = read_boxes(data, name)
        names, category = tuple(boxes.categories.tolist()), boxes.category
        row, counts = np.repeat(np.arange(data.rows), np.diff(boxes.first)), ~boxes.ignore
    elif without := int((data.labels < 0).sum()):
        told = f"{name} has no boxes beside it, and {without:,} of {data.rows:,} pictures no label"
        way = "prepare it with fastrot convert --source voc or coco, or from class folders"
        raise UsageError(f"{told}: {way}")
    else:
        names = data.classes or tuple(map(str, range(int(data.labels.max()) + 1)))
        row, category, counts = np.arange(data.rows), data.labels, np.ones(data.rows, bool)
    found = np.full((data.rows, len(names)), -1, np.int8)
    for value, these in enumerate((~counts, counts)):
        found[row[these], category[these]] = value
    return names, found


def enough(train: Known, test: Known) -> Bool[np.ndarray, " classes"]:
    """Which classes have in each fold of `train`, and in `test`, a picture with them and one without."""
    least = ((train, FOLDS), (test, 1))
    parts = [(each == has).sum(axis=0) >= n for each, n in least for has in (1, -1)]
    return np.all(parts, axis=0)


def precisions(
    truth: Int8[np.ndarray, " n"], scores: Float[np.ndarray, " n"]
) -> tuple[float, float]:
    """Average precision as scikit-learn has it, and as Goyal: by the best precision at that recall or a higher one."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(truth, scores)  # recall falls
    steps, best = -np.diff(recall), np.maximum.accumulate(precision)
    return float(steps @ precision[:-1]), float(steps @ best[:-1])


def judge(
    train: Float[np.ndarray, "n d"],
    known: Int8[np.ndarray, " n"],
    test: Float[np.ndarray, "q d"],
    truth: Int8[np.ndarray, " q"],
    costs: Sequence[float] = COSTS,
) -> Judged:
    """Learn a class from features of unit length, and judge it on others; of costs equally good the first is taken."""
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import LinearSVC

    how: dict[str, Any] = {"class_weight": {1: 2, -1: 1}, "dual": False, "max_iter": 2000}
    rows, has = train[known != 0].astype(np.float64), known[known != 0]
    svms = [LinearSVC(C=cost, tol=1e-4, **how) for cost in costs]
    by = {"cv": FOLDS, "scoring": "average_precision"}
    best = int(np.argmax([cross_val_score(each, rows, has, **by).mean() for each in svms]))
    scores = svms[best].fit(rows, has).decision_function(test[truth != 0].astype(np.float64))
    return Judged(*precisions(truth[truth != 0], scores), costs[best])


def evaluate(run: str, knobs: Svm) -> int:
    """Print mean average precision over the classes, of each stage."""
    try:
        import sklearn.svm  # noqa: F401
    except ImportError as error:
        way = 'type  pip install "fastrot[study]"'
        raise UsageError(f"svm wants scikit-learn ({error}): {way}") from None
    if knobs.data is None or knobs.val is None:
        told = "svm wants --data, pictures to learn from, and --val, others to be judged on"
        raise UsageError(f"{told}: such as trainval and test of VOC, prepared with --source voc")
    device = choose_device(knobs.device, dist.place())
    trunk = load(run, device)
    learn, asked = given(knobs.data, knobs), given(knobs.val, knobs, "--val")
    names, known = presence(learn.data, f"--data {knobs.data}")
    others, truth = presence(asked.data, f"--val {knobs.val}")
    if others != names:
        only = some(sorted({*others} ^ {*names}), 3) or "none, but in another order"
        told = f"({len(others)} and {len(names)}; not in both: {only})"
        raise UsageError(f"--val has other classes than --data {told}: prepare both from one set")
    _numbers(known, truth, knobs)
    begin(trunk, knobs)
    with dist.joined(device, "give the same command again"):
        mine, theirs = (seen(trunk, each, knobs, device) for each in (learn, asked))
    if dist.place().rank > 0:
        return 0  # its cores are free for the first
    known, truth = known[mine.rows], truth[theirs.rows]
    numbers = _numbers(known, truth, knobs)  # some may be unread
    costs = sorted({*knobs.costs}) or COSTS

    def one(job: tuple[str, int]) -> Judged:
        stage, n = job
        train, test = mine.features[stage].numpy(), theirs.features[stage].numpy()
        return judge(train, known[:, n], test, truth[:, n], costs)

    jobs = [(stage, n) for stage in mine.features for n in numbers]
    console = Console()
    show: dict[str, Any] = {"console": console, "disable": not console.is_terminal}
    with ThreadPoolExecutor(knobs.workers or entry.cores()) as pool:
        judged = dict(zip(jobs, track(pool.map(one, jobs), "SVMs", len(jobs), **show), strict=True))
    found = {s: _told({names[n]: judged[s, n] for n in numbers}) for s in mine.features}
    few = [name for n, name in enumerate(names) if n not in numbers]
    told = f"{len(mine.rows):,} pictures of {mine.name} to learn from, {len(theirs.rows):,} of {theirs.name} to judge"
    say(f"{run}: {told}, {len(numbers)} of {len(names)} classes", found, _said)
    if few:
        say(f"too few pictures, not judged: {some(few, 20)}")
    keep({"run": run, "stages": found, "too_few": few}, knobs.json)
    return 0


def _numbers(known: Known, truth: Known, knobs: Svm) -> list[int]:
    """Of the classes that can be judged. Raises UsageError where there are none."""
    numbers = np.flatnonzero(enough(known, truth)).tolist()
    if not numbers:
        told = f"no class has {FOLDS} pictures with it and {FOLDS} without in --data {knobs.data}"
        raise UsageError(f"{told}, and one of each in --val {knobs.val}: prepare more pictures")
    return numbers


def _told(judged: dict[str, Judged]) -> dict[str, Any]:
    """What is kept of a stage, whose classes these are."""
    ap, interpolated = np.mean([each[:2] for each in judged.values()], axis=0).tolist()
    found: dict[str, Any] = {"map": ap, "interpolated": interpolated}
    found["ap"] = {name: each.ap for name, each in judged.items()}
    return {**found, "cost": {name: each.cost for name, each in judged.items()}}


def _said(each: dict[str, Any]) -> str:
    costs = each["cost"].values()
    told = f"mAP {each['map']:.2%} (interpolated {each['interpolated']:.2%})"
    return f"{told}, costs {min(costs):.2g} to {max(costs):.2g}"
