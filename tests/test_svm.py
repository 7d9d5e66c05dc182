"""`evaluate.py RUN svm`: which pictures have a class, average precision, costs by cross-validation, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.nn import functional as F
from truth import DATA, photo

from fastrot import assemble, evaluate
from fastrot.config import UsageError
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert
from fastrot.evals import svm
from fastrot.evals.features import features
from fastrot.evals.svm import COSTS, Judged, enough, judge, precisions, presence
from fastrot.evals.trained import load

pytest.importorskip("sklearn")
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("quick_runs")
QUICK = ["--device", "cpu", "--workers", "1", "--stages", "conv2", "--costs", "1", "0.01"]


def ask(run, data, val, *more: str) -> int:
    knobs = [word for pair in (("--data", data), ("--val", val)) if pair[1] for word in pair]
    return evaluate.main([str(run), "svm", *map(str, knobs), *QUICK, *more])


def rows_of(count: int, seed: int, apart: float, width: int = 12):
    """Features of unit length and 1 or -1; positives, a fifth, lie `apart` from the others."""
    draw = np.random.default_rng(seed)
    known = np.where(np.arange(count) % 5 == 0, 1, -1).astype(np.int8)
    found = draw.normal(size=(count, width))
    found[:, 0] += apart * known
    return found / np.linalg.norm(found, axis=1, keepdims=True), known


# ---- a made set in VOC's layout ----

# a picture's objects: name, and whether it is difficult; a cow is met twice
TOLD = [
    [("cat", False)],
    [("dog", False), ("cat", True)],
    [("cat", True), ("cat", False), ("dog", False)],
    [],
    [("dog", True)],
    [("cat", False), ("dog", True)],
]


def xml(objects, name: str) -> str:
    box = "<bndbox><xmin>5</xmin><ymin>4</ymin><xmax>30</xmax><ymax>25</ymax></bndbox>"
    each = [
        f"<object><name>{what}</name><difficult>{int(hard)}</difficult>{box}</object>"
        for what, hard in objects
    ]
    size = "<size><width>48</width><height>40</height></size>"
    return f"<annotation><filename>{name}</filename>{size}{''.join(each)}</annotation>"


def prepared(root: Path, told, out: Path, category: str = "cow") -> Path:
    """Pictures of 40 x 48 with these objects; where there is a cat, that counts or not, it is dark."""
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True)
    for i, objects in enumerate(told):
        shade = 0.4 if any(what == "cat" for what, _ in objects) else 1
        name = f"{i:06}.jpg"
        Image.fromarray((photo(i, 40, 48) * shade).astype(np.uint8)).save(
            root / "JPEGImages" / name
        )
        named = [(category if what == "cow" else what, hard) for what, hard in objects]
        (root / "Annotations" / f"{i:06}.xml").write_text(xml(named, name))
    return convert(BetonOptions(source="voc", root=root, out=out, encoding="raw", workers=0)).out


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("voc")
    cow, none = [("cow", False)], [[]] * 4
    return {
        "data": prepared(root / "a", [*TOLD, *TOLD, *none, cow, cow], root / "a.beton"),
        "val": prepared(root / "b", [*TOLD[::-1], *none, cow], root / "b.beton"),
        "others": prepared(root / "c", [*TOLD, cow], root / "c.beton", "unicorn"),
        "few": prepared(root / "d", TOLD[:2], root / "d.beton"),
    }


@pytest.fixture(scope="module")
def flat(pictures, tmp_path_factory) -> Path:
    """Pictures without labels."""
    root = tmp_path_factory.mktemp("flat")
    for i, path in enumerate(sorted(pictures.rglob("*.jpg"))[:8]):
        (root / f"{i}.jpg").write_bytes(path.read_bytes())
    return root


# ---- which pictures have a class ----


def test_boxes_tell_which_pictures_have_a_class_and_which_are_left_out(made):
    names, found = presence(assemble.open_data(made["data"]), "x")
    assert len(names) == 20
    assert names.index("cat") == 7
    cat, dog, cow, sofa = (names.index(name) for name in ("cat", "dog", "cow", "sofa"))
    assert found[:, cat].tolist() == 2 * [1, 0, 1, -1, -1, 1] + 6 * [-1]
    assert found[:, dog].tolist() == 2 * [-1, 1, 1, -1, 0, 0] + 6 * [-1]
    assert found[:, cow].tolist() == 16 * [-1] + [1, 1]
    assert (found[:, sofa] == -1).all()


def test_labels_tell_it_where_there_are_no_boxes(pictures, flat):
    data = assemble.open_data(pictures, labelled=True)
    names, found = presence(data, "x")
    assert names == ("class0", "class1", "class2")
    assert ((found == 1) == (data.labels[:, None] == np.arange(3))).all()
    assert ((found == 1) ^ (found == -1)).all()
    with pytest.raises(UsageError, match="x has no boxes beside it, and 8 of 8 pictures no label"):
        presence(assemble.open_data(flat, labelled=True), "x")


def test_which_classes_have_enough_pictures():
    """Three of each kind to learn from, one of each to be judged; those left out are of no kind."""
    known = {
        "fine": ([1, 1, 1, -1, -1, -1], [1, -1]),
        "two": ([1, 1, 0, -1, -1, -1], [1, -1]),
        "two others": ([1, 1, 1, 0, -1, -1], [1, -1]),
        "none to judge": ([1, 1, 1, -1, -1, -1], [0, -1]),
        "no other to judge": ([1, 1, 1, -1, -1, -1], [1, 0]),
    }
    train, test = (np.array([each[part] for each in known.values()], np.int8).T for part in (0, 1))
    assert enough(train, test).tolist() == [True, False, False, False, False]


# ---- what is computed ----


def test_average_precision_is_that_computed_by_hand():
    truth = np.array([-1, 1, 1, -1, 1, -1], np.int8)
    scores = np.array([0.1, 0.9, 0.6, 0.8, 0.5, 0.2])  # ranked: 1 -1 1 1 -1 -1
    plain, interpolated = precisions(truth, scores)
    assert plain == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert interpolated == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)


def test_average_precision_is_scikit_learns_where_scores_are_equal_too():
    draw = np.random.default_rng(0)
    for _ in range(20):
        truth = np.where(draw.random(50) < 0.3, 1, -1).astype(np.int8)
        scores = draw.normal(size=50).round(1)
        plain, interpolated = precisions(truth, scores)
        assert plain == pytest.approx(average_precision_score(truth, scores))
        assert plain <= interpolated <= 1


def test_what_is_apart_is_told_apart_and_what_is_not_gets_the_base_rate():
    found = judge(*rows_of(100, 0, 9.0), *rows_of(100, 1, 9.0), COSTS[::5])
    assert (found.ap, found.interpolated) == pytest.approx((1, 1))
    chance = [judge(*rows_of(100, n, 0.0), *rows_of(300, n + 9, 0.0), [0.1]).ap for n in range(5)]
    assert np.mean(chance) == pytest.approx(0.2, abs=0.04)


def test_the_cost_is_that_of_a_plain_grid_search():
    chosen = set()
    for seed in range(4):
        (rows, known), (others, truth) = rows_of(90, seed, 0.3), rows_of(90, seed + 9, 0.3)
        plain = LinearSVC(class_weight={1: 2, -1: 1}, dual=False, tol=1e-4, max_iter=2000)
        search = GridSearchCV(plain, {"C": COSTS}, scoring="average_precision", cv=3)
        found = judge(rows, known, others, truth)
        assert found.cost == search.fit(rows, known).best_params_["C"]
        wanted = average_precision_score(truth, search.decision_function(others))
        assert found.ap == pytest.approx(wanted)
        chosen.add(found.cost)
    assert len(chosen) > 1


def test_the_svm_is_vissls_which_solves_the_dual():
    """Its scores rank pictures as theirs do, at a low and a high cost."""
    (rows, known), (others, truth) = rows_of(200, 0, 0.5), rows_of(2000, 1, 0.5)
    how = {"class_weight": {1: 2, -1: 1}, "intercept_scaling": 1.0, "penalty": "l2"}
    how |= {"loss": "squared_hinge", "tol": 1e-6, "dual": True, "max_iter": 200_000}
    for cost in (0.01, 10.0):
        theirs = LinearSVC(C=cost, **how).fit(rows, known).decision_function(others)
        mine = judge(rows, known, others, truth, [cost])
        assert mine.ap == pytest.approx(average_precision_score(truth, theirs), abs=2e-4)
        assert 0.25 < mine.ap < 0.9


def test_the_costs_are_goyals():
    assert len(COSTS) == 26
    assert sorted(COSTS) == COSTS
    assert {1e-7, 1e-3, 100, 2**-4, 2**-19} <= {*COSTS}


def test_pictures_left_out_teach_and_judge_nothing():
    (rows, known), (others, truth) = rows_of(80, 0, 0.5), rows_of(80, 1, 0.5)
    odd, at = np.full((3, 12), 5.0), [0, 9, 40]
    more = [np.insert(each, at, odd, axis=0) for each in (rows, others)]
    with_odd = judge(more[0], np.insert(known, at, 0), more[1], np.insert(truth, at, 0))
    assert with_odd == judge(rows, known, others, truth)


# ---- the command ----


def told(file: Path) -> dict:
    return json.loads(file.read_text())


def test_the_command_gives_what_plain_code_gives(straight, made, tmp_path, capsys):
    file = tmp_path / "a.json"
    assert ask(straight, made["data"], made["val"], "--pool", "2", "--json", str(file)) == 0
    said, found = capsys.readouterr().out, told(file)
    assert "18 pictures of" in said
    assert "11 of" in said
    assert "2 of 20 classes" in said
    assert "too few pictures, not judged: aeroplane, bicycle, bird" in said
    assert len(found["too_few"]) == 18
    assert {"cow", "sofa"} <= {*found["too_few"]}
    trunk, unit = load(straight), []
    for name in ("data", "val"):
        data = assemble.open_data(made[name])
        view = assemble.evaluation_view(trunk.config)
        loader = assemble.open_loader(data, view, batch=4, workers=0, enlarge=True)
        unit.append(F.normalize(features(trunk, loader, ["conv2"], 2)["conv2"]).numpy())
    has = 2 * [1, 0, 1, -1, -1, 1] + 6 * [-1], [1, -1, -1, 1, 0, 1] + 5 * [-1]
    (x, y), (others, truth) = (
        (u[np.array(h) != 0], [v for v in h if v]) for u, h in zip(unit, has, strict=True)
    )
    plain = LinearSVC(class_weight={1: 2, -1: 1}, dual=False, max_iter=2000)
    search = GridSearchCV(plain, {"C": [0.01, 1]}, scoring="average_precision", cv=3).fit(x, y)
    stage = found["stages"]["conv2"]
    assert stage["cost"]["cat"] == search.best_params_["C"]
    wanted = average_precision_score(truth, search.decision_function(others))
    assert stage["ap"]["cat"] == pytest.approx(wanted)
    assert wanted > 0.9  # what is dark has a cat
    assert stage["map"] == pytest.approx((stage["ap"]["cat"] + stage["ap"]["dog"]) / 2)
    assert f"mAP {stage['map']:.2%} (interpolated {stage['interpolated']:.2%})" in said


def test_class_folders_will_do_and_may_judge_themselves(straight, pictures, tmp_path, capsys):
    """The same by more threads, to the bit."""
    file, found = tmp_path / "a.json", []
    for workers in ("1", "2"):
        more = ["--stages", "conv1", "conv2", "--workers", workers, "--json", str(file)]
        assert ask(straight, pictures, pictures, *more) == 0
        found.append(told(file))
    assert found[0] == found[1]
    assert found[0]["too_few"] == []
    assert "too few" not in capsys.readouterr().out
    stages = found[0]["stages"]
    assert stages["conv1"] != stages["conv2"]
    for each in stages.values():
        assert each["map"] < each["interpolated"]
        assert each["ap"].keys() == {"class0", "class1", "class2"}
        assert {*each["cost"].values()} <= {0.01, 1.0}


def test_the_costs_that_were_asked_for_are_tried(straight, pictures, monkeypatch):
    tried = []
    monkeypatch.setattr(svm, "judge", lambda *given: tried.append(given[-1]) or Judged(1, 1, 1))
    here = [str(straight), "svm", "--data", str(pictures), "--val", str(pictures), *QUICK[:6]]
    for words, costs in (([], COSTS), (["--costs", "1", "0.01", "1"], [0.01, 1.0])):
        assert evaluate.main([*here, *words]) == 0
        assert tried[-3:] == [costs] * 3


@pytest.mark.soak
@pytest.mark.ddp
def test_two_ranks_give_the_table_of_one(straight, made, tmp_path):
    more = ["svm", "--data", str(made["data"]), "--val", str(made["val"]), *QUICK, "--batch", "4"]
    assert evaluate.main([str(straight), *more, "--json", str(tmp_path / "one.json")]) == 0
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two += ["fastrot/evaluate.py", str(straight), *more, "--json", str(tmp_path / "two.json")]
    done = subprocess.run(two, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("conv2") == 1
    assert told(tmp_path / "two.json") == told(tmp_path / "one.json")


def test_real_voc(straight, tmp_path, capsys):
    root = DATA / "voc" / "VOCdevkit" / "VOC2007"
    if not root.exists():
        pytest.skip(f"there is no {root}")
    for split in ("trainval", "test"):
        out = tmp_path / f"{split}.beton"
        convert(BetonOptions(source="voc", root=root, split=split, out=out, workers=0))
    file, (data, val) = tmp_path / "a.json", (tmp_path / f"{s}.beton" for s in ("trainval", "test"))
    assert ask(straight, data, val, "--json", str(file)) == 0
    found, said = told(file), capsys.readouterr().out
    assert "108 pictures" in said
    judged = found["stages"]["conv2"]["ap"]
    assert len(judged) + len(found["too_few"]) == 20
    assert judged["person"] > 0.4  # every second picture has one


# ---- what is refused ----


@pytest.mark.parametrize(
    ("data", "val", "words", "says"),
    [
        (None, "val", [], "svm wants --data, pictures to learn from, and --val, others to be jud"),
        ("data", None, [], "svm wants --data, pictures to learn from, and --val, others to be jud"),
        ("flat", "val", [], "--data .*flat.* no boxes beside it, and 8 of 8 pictures no label"),
        ("data", "flat", [], "--val .*flat.* no boxes beside it, and 8 of 8 pictures no label"),
        (
            "data",
            "others",
            [],
            r"--val has other classes than --data \(3 and 20; not in both: aero",
        ),
        (
            "few",
            "val",
            [],
            "no class has 3 pictures with it and 3 without in --data .*d.beton, and",
        ),
        ("data", "val", ["--costs", "0"], r"--costs got \(0.0,\): it wants numbers above 0"),
        ("data", "val", ["--json", "/dev/null/x/a.json"], "--json: /dev/null/x cannot be made"),
        ("data", "val", ["--stages", "conv9"], "there is no stage 'conv9': choose from conv1"),
    ],
)
def test_wrong_use_gets_one_sentence(straight, made, flat, data, val, words, says):
    where = made | {"flat": flat, None: None}
    with pytest.raises(UsageError, match=says) as said:
        ask(straight, where[data], where[val], *words)
    assert "\n" not in str(said.value)


def test_a_missing_scikit_learn_gets_a_sentence(straight, made, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    says = r'svm wants scikit-learn .*: type  pip install "fastrot\[study\]"'
    with pytest.raises(UsageError, match=says):
        ask(straight, made["data"], made["val"])
