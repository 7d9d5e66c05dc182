"""Searches among features: neighbours, retrieval, pairs, by each stage; in blocks, by ranks, in a sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_run import go
from torch.nn import functional as F
from truth import golden

from fastrot import assemble, dist, evaluate
from fastrot.config import UsageError
from fastrot.data.beton.write import BetonOptions
from fastrot.data.pairs import read_pairs
from fastrot.data.prepare.convert import convert
from fastrot.evals import nearest
from fastrot.evals.knn import knn_top1
from fastrot.evals.pairs import accuracy, area
from fastrot.evals.retrieval import retrieval_scores

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick_runs")
ROOT = Path(__file__).parents[1]


def ask(run, what: str, *more: str) -> int:
    return evaluate.main([str(run), what, "--device", "cpu", "--workers", "1", *more])


def numbers(run, what: str, file: Path, *more: str) -> dict:
    assert ask(run, what, "--json", str(file), *more) == 0
    return json.loads(file.read_text())["stages"]


def made(rows: int, width: int, classes: int, seed: int = 0):
    """Features of unit length, nearer to those of their class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=draw)
    middles = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    return F.normalize(middles[labels] + 2 * torch.randn(rows, width, generator=draw)), labels


# ---- what is computed ----


@pytest.mark.parametrize("sigma", ["0.07", "0.1"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_is_lemniscates(k, sigma, monkeypatch):
    file = golden("knn")
    monkeypatch.setattr(nearest, "BLOCK", 500)  # four queries at once
    train, test = (torch.from_numpy(file[name]) for name in ("train", "test"))
    labels, truth = (torch.from_numpy(file[name]) for name in ("ytrain", "ytest"))
    mine = knn_top1(train, labels, test, truth, int(file["C"]), k, float(sigma))
    assert mine == pytest.approx(float(file[f"knn_K{k}_s{sigma}_top1"]), abs=1e-6)
    if k == 1:
        assert mine == pytest.approx(float(file["nn_top1"]), abs=1e-6)


@pytest.mark.parametrize("same", [False, True])
def test_retrieval_is_its_definition(same, monkeypatch):
    """Each query alone, in plain loops; one class has no other picture."""
    gallery, known = made(60, 8, 5)
    queries, labels = (gallery, known) if same else made(20, 8, 5, seed=1)
    labels = labels.clone()
    labels[3] = 7
    known = labels if same else known
    monkeypatch.setattr(nearest, "BLOCK", 200)
    found = retrieval_scores(gallery, known, queries, labels, (1, 5), CPU, same=same)
    first, averages = [], []
    for q in range(len(queries)):
        others = [j for j in range(60) if not (same and j == q)]
        order = sorted(others, key=lambda j: -float(queries[q] @ gallery[j]))
        right = [bool(known[j] == labels[q]) for j in order]
        if any(right):
            first.append((right[0], sum(right[:5]) / 5))
            places = [n for n, yes in enumerate(right, 1) if yes]
            averages.append(np.mean([m / n for m, n in enumerate(places, 1)]))
    assert found.queries == len(averages) == len(queries) - 1
    assert found.precision == pytest.approx(dict(zip((1, 5), np.mean(first, axis=0), strict=True)))
    assert found.mean_average_precision == pytest.approx(np.mean(averages), rel=1e-5)


def test_ranks_share_the_queries_and_give_the_same_sums(monkeypatch):
    gallery, known = made(60, 8, 5)
    queries, labels = made(21, 8, 5, seed=1)
    summed = []

    def share(rank, world):
        monkeypatch.setattr(dist, "rank", lambda: rank)
        monkeypatch.setattr(dist, "world", lambda: world)
        monkeypatch.setattr(dist, "sum_over_ranks", lambda each: summed.append(each) or each)
        summed.clear()
        retrieval_scores(gallery, known, queries, labels, (1, 5), CPU)
        knn_top1(gallery, known, queries, labels, 5, 3, 0.1)
        return list(summed)

    whole, first, second = share(0, 1), share(0, 2), share(1, 2)
    for all_of, one, other in zip(whole, first, second, strict=True):
        assert one.any()
        assert other.any()
        assert torch.equal(one + other, all_of)


MANY = """
import resource, torch
from fastrot.evals.knn import knn_top1
from fastrot.evals.retrieval import retrieval_scores

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.manual_seed(0)
queries, asked = torch.nn.functional.normalize(torch.randn(200, 32)), torch.randint(10, (200,))
took = []
for n in (50_000, 200_000):  # blocks of the same size
    rows, labels = torch.nn.functional.normalize(torch.randn(n, 32)), torch.randint(10, (n,))
    before = peak()
    knn_top1(rows, labels, queries, asked, 10, 200, 0.07)
    retrieval_scores(rows, labels, queries, asked, (1, 10), torch.device("cpu"))
    took.append(peak() - before)
print(took)
assert took[1] < took[0] + 100, took  # MB: all pairs of 200,000 would be 160,000
"""


@pytest.mark.soak
def test_memory_does_not_grow_with_the_gallery():
    """Of 50,000 and of 200,000 made-up rows, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_verification_is_its_definition():
    draw = np.random.default_rng(0)
    same = np.arange(200) < 100
    cosine = draw.normal(0, 1, 200) + 1.5 * same
    pairs = [(a, b) for a in cosine[same] for b in cosine[~same]]
    assert area(cosine, same) == pytest.approx(np.mean([a > b for a, b in pairs]))
    assert area(np.ones(200), same) == 0.5
    right = 0
    for fold in range(10):
        held = np.arange(200) % 10 == fold
        cuts = [(np.mean((cosine[~held] >= cut) == same[~held]), -cut) for cut in cosine[~held]]
        cut = -max(cuts)[1]
        right += np.sum((cosine[held] >= cut) == same[held])
    fold = np.arange(200) % 10
    assert accuracy(cosine, same, fold) == right / 200
    assert accuracy(np.where(same, 0.9, 0.1), same, fold) == 1


# ---- runs ----


def test_a_table_over_the_stages(straight, pictures, tmp_path, capsys):
    """The run's own pictures: those held out asked of those that it learnt from."""
    found = numbers(straight, "knn", tmp_path / "knn.json", "--k", "3")
    said = capsys.readouterr().out
    stages = ["conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc_block"]
    assert list(found) == stages
    held, learnt = (len(np.load(straight / f"rows-{name}.npy")) for name in ("val", "train"))
    assert f"{held} pictures of {pictures} among {learnt} of {pictures}, by 3, sigma 0.07" in said
    for stage in stages:
        assert f"top-1 {found[stage]['top1']:.2%}, top-5 100.00%" in said  # of three classes
        assert found[stage]["top1"] * held == pytest.approx(round(found[stage]["top1"] * held))


def test_each_of_the_data_is_asked_of_the_others(straight, pictures, tmp_path):
    """And never of itself: with one neighbour all would be right."""
    more = ["--data", str(pictures), "--stages", "conv2", "f2"]
    one = numbers(straight, "knn", tmp_path / "a.json", *more, "--k", "1")
    assert list(one) == ["conv2", "f2"]
    assert all(0 < each["top1"] < 1 for each in one.values())
    found = numbers(straight, "retrieval", tmp_path / "b.json", *more, "--at", "1", "4")
    for stage, each in one.items():
        assert found[stage]["precision"]["1"] == pytest.approx(each["top1"])
        assert found[stage]["queries"] == 37
    both = numbers(straight, "knn", tmp_path / "c.json", *more, "--val", str(pictures), "--k", "1")
    assert all(each["top1"] == 1 for each in both.values())


def test_a_gallery_shows_what_was_found(straight, pictures, tmp_path, capsys):
    more = ["--data", str(pictures), "--gallery", str(tmp_path / "g"), "--stages", "conv5"]
    assert ask(straight, "retrieval", *more) == 0
    assert f"gallery: {tmp_path}/g/index.html" in capsys.readouterr().out
    with Image.open(tmp_path / "g" / "gallery.png") as sheet:
        assert sheet.size > (1000, 1000)
        colours = {sheet.getpixel((x, 130)) for x in range(sheet.width)}
    assert {(0, 114, 178), (213, 94, 0)} & colours  # frames: of its class, of another
    page = (tmp_path / "g" / "index.html").read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page
    assert "https://" not in page


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Folders of people with LFW's names, and pairs of them."""
    from truth import photo

    root = tmp_path_factory.mktemp("people")
    for person, name in enumerate(("Ann_A", "Bob_B", "Cy")):
        (root / "faces" / name).mkdir(parents=True)
        for number in range(1, 5):
            shade = np.clip(photo(number).astype(int) + 60 * person - 60, 0, 255).astype(np.uint8)
            Image.fromarray(shade).save(root / "faces" / name / f"{name}_{number:04}.jpg")
    same = [f"{n}\t{a}\t{b}" for n in ("Ann_A", "Bob_B", "Cy") for a, b in ((1, 2), (3, 4), (1, 4))]
    other = [f"Ann_A\t{k}\tBob_B\t{k}" for k in (1, 2, 3, 4)] + [f"Cy {k} Ann_A 2" for k in (1, 3)]
    (root / "pairs.txt").write_text("\n".join(["1\t9", *same, *other]) + "\n")
    return root


def test_pairs_of_people(straight, people, tmp_path, capsys):
    more = ["--data", str(people / "faces"), "--pairs", str(people / "pairs.txt")]
    found = numbers(straight, "pairs", tmp_path / "a.json", *more, "--pool", "2")
    assert "9 pairs of one person and 6 of two" in capsys.readouterr().out
    assert 0.5 < found["conv1"]["auc"] <= 1  # shades tell these people
    names, same, fold = read_pairs(people / "pairs.txt")
    assert fold.tolist() == [n % 10 for n in range(15)]
    assert names[0] == ("Ann_A/Ann_A_0001.jpg", "Ann_A/Ann_A_0002.jpg")
    assert names[9] == ("Ann_A/Ann_A_0001.jpg", "Bob_B/Bob_B_0001.jpg")
    assert same.sum() == 9


def test_pairs_that_lie_beside_the_data(straight, people, tmp_path):
    """As those of the file; where all of one person are left, they are refused."""
    out = {"out": tmp_path / "a.beton", "encoding": "raw", "workers": 0}
    convert(BetonOptions(source="lfw", root=people, **out))
    more = ["--pool", "2", "--data"]
    found = numbers(straight, "pairs", tmp_path / "a.json", *more, str(out["out"]))
    data = [str(people / "faces"), "--pairs", str(people / "pairs.txt")]
    assert found == numbers(straight, "pairs", tmp_path / "b.json", *more, *data)
    convert(BetonOptions(source="lfw", root=people, **out, limit=4, overwrite=True))
    with pytest.raises(
        UsageError, match="are not of one person and of two, in two folds or more: prepare all"
    ):
        ask(straight, "pairs", "--data", str(out["out"]))


def test_folds_of_pairs_are_those_of_the_file(tmp_path):
    """Two folds of one pair of one person and one of two, as `2 1` says."""
    (tmp_path / "a.txt").write_text("2 1\nA 1 2\nA 1 B 1\nB 1 2\nB 1 C 2\n")
    assert read_pairs(tmp_path / "a.txt").fold.tolist() == [0, 0, 1, 1]
    (tmp_path / "b.txt").write_text("A 1 2\nA 1 B 1\n")  # without a head
    assert len(read_pairs(tmp_path / "b.txt").names) == 2


def test_a_small_sigma_is_the_nearest_neighbour():
    """Votes of float32 would overflow where cosine / sigma is above 88."""
    rows, labels = made(100, 8, 5)
    assert knn_top1(rows, labels, rows, labels, 5, 50, 0.001) == 1


def test_what_cannot_be_read_neither_asks_nor_votes(
    straight, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(tmp_path / "cache"))
    shutil.copytree(pictures, root := tmp_path / "pictures")
    data = assemble.open_data(root)  # its sizes are known from here on
    file = root / data.name(7)
    stamp = file.stat()
    file.write_bytes(file.read_bytes()[:300] + bytes(stamp.st_size - 300))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    more = ["--stages", "conv5", "--data", str(root), "--on-bad-record", "skip"]
    found = numbers(straight, "retrieval", tmp_path / "a.json", *more)
    said = capsys.readouterr().out
    assert f"1 pictures of {root} cannot be read, and are left out" in said
    assert f"36 pictures of {root} among 36" in said
    assert found["conv5"]["queries"] == 36


@pytest.mark.soak
@pytest.mark.ddp
@pytest.mark.parametrize("what", ["knn", "retrieval"])
def test_two_ranks_give_the_table_of_one(straight, pictures, tmp_path, what):
    more = [
        "--data",
        str(pictures),
        "--stages",
        "conv3",
        "conv5",
        "--device",
        "cpu",
        "--batch",
        "4",
    ]
    more += ["--workers", "0"] + (["--k", "5"] if what == "knn" else [])
    alone = numbers(straight, what, tmp_path / "one.json", *more)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two += ["fastrot/evaluate.py", str(straight), what, *more, "--json", str(tmp_path / "two.json")]
    done = subprocess.run(two, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("conv3") == 1
    together = json.loads((tmp_path / "two.json").read_text())["stages"]
    assert together == alone


# ---- what is refused ----


@pytest.mark.parametrize(
    ("what", "words", "says"),
    [
        ("knn", ["--k", "37"], "--k got 37: there are 36 pictures of --data to vote"),
        ("knn", ["--k", "0"], "--k got 0: it wants at least 1"),
        ("knn", ["--sigma", "0"], "--sigma got 0.0: it wants a number above 0"),
        ("knn", ["--stages", "conv9"], "there is no stage 'conv9': choose from conv1"),
        ("retrieval", ["--at", "99"], "--at got 99: there are 36 pictures of --data"),
        ("retrieval", ["--at", "0"], r"--at got \(0,\): it wants numbers of at least 1"),
        ("knn", ["--val", "synthetic:4"], "--val has other classes than --data"),
        ("knn", ["--val", "nowhere"], "--val nowhere does not exist"),
        ("pairs", [], "pairs wants --data of people's folders, and --pairs FILE"),
        ("pairs", ["--pairs", "nowhere"], "--pairs nowhere cannot be read"),
    ],
)
def test_wrong_use_gets_one_sentence(straight, pictures, what, words, says):
    with pytest.raises(UsageError, match=says) as told:
        ask(straight, what, "--data", str(pictures), *words)
    assert "\n" not in str(told.value)


def test_pairs_that_lead_nowhere_are_refused(straight, people, tmp_path):
    file = tmp_path / "pairs.txt"
    more = ["--data", str(people / "faces"), "--pairs", str(file)]
    for text, says in {
        "1 1\nAnn_A 1 9\nCy 1 Ann_A 1\n": "Ann_A/Ann_A_0009.jpg of --pairs is not in --data",
        "1 1\nAnn_A 1\n": "has 'Ann_A 1' in line 2: it wants Name 1 4, or Name 1 Other 3",
        "1 1\nAnn_A 1 2\n": "wants pairs of one person, and of two",
    }.items():
        file.write_text(text)
        with pytest.raises(UsageError, match=says):
            ask(straight, "pairs", *more)


def test_pictures_that_the_run_did_not_see_have_other_rows(straight, pictures, tmp_path):
    """Files were added since: the run's rows would name others."""
    shutil.copytree(pictures, root := tmp_path / "pictures")
    go(root, tmp_path / "run", "--schedule.steps", "1")
    shutil.copy(root / "class0" / "000.jpg", root / "class0" / "zzz.jpg")
    with pytest.raises(UsageError, match=r"holds other pictures than .*run was trained on"):
        ask(tmp_path / "run", "knn", "--k", "1")


def test_where_nothing_can_be_written_is_said_first(straight, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    more = ["--data", str(pictures), "--stages", "conv1"]
    for knob, path in (("--json", "file/a.json"), ("--gallery", "file")):
        with pytest.raises(UsageError, match=f"{knob}: .*file cannot be made"):
            ask(straight, "retrieval", *more, knob, str(tmp_path / path))


def test_pictures_without_labels_and_runs_without_held_out_ones_are_refused(
    straight, pictures, tmp_path
):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(pictures.rglob("*.jpg"))[:8]):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="knn learns from labels, but 8 of 8 pictures of --data"):
        ask(straight, "knn", "--data", str(flat))
    go(pictures, tmp_path / "run", "--hold-out", "0", "--schedule.steps", "1")
    with pytest.raises(UsageError, match="held no pictures out: name some, by --val"):
        ask(tmp_path / "run", "knn")
