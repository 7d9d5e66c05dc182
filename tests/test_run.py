"""Whole runs in this process: what the folder holds, resuming to the bit, wrong use."""

import contextlib
import dataclasses
import gc
import json
import math
import shutil
import weakref

import chaos
import numpy as np
import pytest
import torch
from PIL import Image
from truth import photo

import fastrot
from fastrot import assemble, config, dist, ranges, train
from fastrot.config import RunError, UsageError
from fastrot.core import View
from fastrot.data import crops
from fastrot.data.beton.read import Beton
from fastrot.data.beton.write import BetonOptions
from fastrot.data.loader import Loader
from fastrot.data.prepare.convert import convert
from fastrot.presets import PRESETS
from fastrot.training import budget, checkpoint, loop, resume
from fastrot.training import device as devices
from fastrot.training.device import choose_threads
from fastrot.training.state import Progress

pytestmark = pytest.mark.usefixtures("quick_runs")
TINY = ["demo", "--image-size", "32", "--batch", "4", "--backbone.width", "0.1", "--enlarge"]
TINY += ["--schedule.steps", "20", "--log-every", "3", "--checkpoint-every", "4", "--workers", "1"]
TINY += ["--no-tensorboard", "--device", "cpu", "--validate-every", "1", "--precision", "fp32"]


def go(pictures, out, *more: str) -> int:
    return train.main([*TINY, "--data", str(pictures), "--out", str(out), *more])


def leaves(state) -> dict[str, object]:
    """Everything that a resumed run must have equal: not its clock, nor what changes no number."""
    return dict(chaos.leaves(state))


def assert_same_bits(a, b) -> None:
    mine, others = leaves(checkpoint.load(a)), leaves(checkpoint.load(b))
    assert mine.keys() == others.keys()
    assert [name for name in mine if not chaos.same(mine[name], others[name])] == []


def test_a_run_folder_holds_what_it_promises(straight):
    names = ["config.yaml", "metrics.jsonl", "summary.json", "environment.json", "log.txt"]
    names += ["checkpoints/last.pt", "rows-train.npy", "rows-val.npy"]
    assert not [name for name in names if not (straight / name).exists()]
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [3, 6, 9, 12, 15, 18, 20]
    for line in logged:
        assert {"step", "epoch", "loss", "accuracy", "images_per_s", "wait_share"} <= set(line)
        assert 0 <= line["accuracy"] <= 1
        assert 0 <= line["wait_share"] <= 1
    judged = [line["step"] for line in lines if "val_accuracy" in line]
    assert judged[0] == 0
    assert judged[-1] == 20
    summary = json.loads((straight / "summary.json").read_text())
    assert (
        summary["val_accuracy_first"] == next(li for li in lines if li["step"] == 0)["val_accuracy"]
    )
    assert {"val_accuracy", "images", "seconds", "verdict", "bound", "chance"} <= set(summary)
    bound = summary["bound"]  # others may have the cores meanwhile
    assert bound == "neighbours" or f"bound by {bound} at " in summary["verdict"]
    assert (summary["images"], summary["steps"], summary["chance"]) == (80, 20, 0.25)


def test_the_hold_out_is_never_trained_on(straight, pictures):
    learned, judged = (np.load(straight / f"rows-{name}.npy") for name in ("train", "val"))
    assert not set(learned) & set(judged)
    assert sorted([*learned, *judged]) == list(range(37))
    assert 1 <= len(judged) <= 5  # a twentieth of 37


@pytest.mark.parametrize("stop", [1, 7, 8, 13], ids=lambda n: f"after-{n}")
def test_a_run_broken_off_goes_on_to_the_same_bits(straight, pictures, tmp_path, stop, capsys):
    go(pictures, tmp_path, "--max-steps", str(stop))
    capsys.readouterr()
    go(pictures, tmp_path, "--workers", "0")
    assert f"resumed at step {stop}" in capsys.readouterr().out
    assert told(straight) == told(tmp_path)
    assert_same_bits(straight / "checkpoints" / "last.pt", tmp_path / "checkpoints" / "last.pt")


def told(folder) -> list[dict]:
    """What metrics.jsonl says, without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in li.items() if k not in ("images_per_s", "wait_share")} for li in lines
    ]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [5, 6, 10, 17], ids=lambda n: f"killed-at-{n}")
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    straight, pictures, tmp_path, at, monkeypatch
):
    """Killed between checkpoints: steps and lines behind the last one come again, the same."""
    step = loop.train_step

    def deadly(state, batch):
        if state.step == at:
            raise Killed
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", deadly)
    with pytest.raises(Killed):
        go(pictures, tmp_path)
    monkeypatch.undo()
    go(pictures, tmp_path)
    assert_same_bits(straight / "checkpoints" / "last.pt", tmp_path / "checkpoints" / "last.pt")
    assert told(straight) == told(tmp_path)


def test_a_finished_run_prints_its_summary_and_changes_nothing(
    straight, pictures, tmp_path, capsys
):
    straight = shutil.copytree(straight, tmp_path / "run")
    before = leaves(checkpoint.load(straight / "checkpoints" / "last.pt"))
    lines = (straight / "metrics.jsonl").read_text()
    summary = json.loads((straight / "summary.json").read_text())
    assert go(pictures, straight) == 0
    again = json.loads((straight / "summary.json").read_text())
    assert [again[k] for k in ("bound", "verdict")] == [summary[k] for k in ("bound", "verdict")]
    assert "is done after 20 steps" in capsys.readouterr().out
    after = leaves(checkpoint.load(straight / "checkpoints" / "last.pt"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else None
        assert value == after[name] if same is None else same, name
    assert lines == (straight / "metrics.jsonl").read_text()


def test_another_seed_is_another_run(straight, pictures):
    with pytest.raises(UsageError, match=r"--seed was 0, now 5.*--out NEW.*--start-from"):
        go(pictures, straight, "--seed", "5")


def test_another_order_is_another_run(straight, pictures):
    with pytest.raises(
        UsageError, match=r"--order was full, now blocks; --order-block was None, now 4"
    ):
        go(pictures, straight, "--order", "blocks", "--order-block", "4")


def test_other_pictures_are_refused(straight, pictures, tmp_path):
    with pytest.raises(UsageError, match="other pictures"):
        go("synthetic:37", straight)


def test_start_from_begins_with_the_weights_of_another_run(straight, pictures, tmp_path):
    go(pictures, tmp_path, "--start-from", str(straight), "--max-steps", "1", "--lr", "1e-9")
    mine = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["net"]
    theirs = checkpoint.load(straight / "checkpoints" / "last.pt")["net"]
    for name in mine:
        if name.endswith("weight"):
            torch.testing.assert_close(mine[name], theirs[name], atol=1e-6, rtol=0)


def test_budget_chooses_the_epochs_and_keeps_them(pictures, tmp_path, capsys, monkeypatch):
    args = ["--schedule.steps", "None", "--budget", "3s"]
    monkeypatch.setattr(budget, "_seconds_each", lambda *_: 0.1)  # a machine of known speed
    go(pictures, tmp_path, *args, "--max-steps", "2")
    said = capsys.readouterr().out
    assert "--budget 3s: an epoch takes" in said
    steps = json.loads((tmp_path / "environment.json").read_text())
    assert steps["ranks"] == 1
    epochs = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["run_identity"]["epochs"]
    batches = len(np.load(tmp_path / "rows-train.npy")) // 4
    assert epochs == int(3 / (0.1 * batches + 0.1))
    monkeypatch.setattr(budget, "_seconds_each", lambda *_: 1e9)
    go(pictures, tmp_path, *args, "--max-steps", "3")
    assert f"{epochs} epochs, as first chosen" in capsys.readouterr().out


def test_measuring_a_budget_leaves_no_trace(pictures, tmp_path):
    """The first steps after it have the bits of a run without."""
    more = ["--max-steps", "4", "--schedule.kind", "constant"]
    go(pictures, tmp_path / "a", *more, "--schedule.steps", "None", "--budget", "1s")
    go(pictures, tmp_path / "b", *more)
    a, b = (checkpoint.load(tmp_path / x / "checkpoints" / "last.pt") for x in "ab")
    assert all(torch.equal(a["net"][k], b["net"][k]) for k in a["net"])
    assert torch.equal(a["rng"][0]["cpu"], b["rng"][0]["cpu"])


def test_not_a_number_stops_the_run_at_the_next_log_line(straight, pictures, tmp_path, monkeypatch):
    step = loop.train_step

    def poisoned(state, batch):
        if state.step == 10:
            with torch.no_grad():
                next(state.method.net.parameters()).fill_(math.nan)
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(RunError, match=r"step 12; the last good checkpoint is .*last\.pt"):
        go(pictures, tmp_path, "--checkpoint-every", "100")
    last = checkpoint.load(tmp_path / "checkpoints" / "last.pt")  # of the end of epoch 0
    assert all(torch.isfinite(v.float()).all() for v in last["net"].values())


def test_load_gives_the_features_of_each_stage(straight):
    """The README's snippet."""
    trunk = fastrot.load(straight)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    features = trunk.features(images, stage="conv5")
    assert features.shape[:2] == (2, trunk.net.channels["conv5"])
    assert torch.isfinite(features).all()
    assert torch.equal(features, trunk.features(images, stage="conv5"))
    alone = trunk.features(images[:1], stage="conv5")  # in eval mode a picture knows no others
    torch.testing.assert_close(alone, features[:1])
    with pytest.raises(UsageError, match=r"conv9.*conv1"):
        trunk.features(images, stage="conv9")


def test_pictures_come_in_every_layout(straight):
    trunk = fastrot.load(straight / "checkpoints")
    image = np.random.default_rng(3).integers(0, 256, (32, 32, 3), np.uint8)
    right = trunk.features(torch.from_numpy(image)[None], "conv5")
    chw = image.transpose(2, 0, 1)
    for form in (image, chw, image[None], chw[None], torch.from_numpy(chw), Image.fromarray(image)):
        assert torch.equal(trunk.features(form, "conv5"), right)
    torch.testing.assert_close(trunk.features([image, image], "conv5")[1:], right)
    holder = torch.nn.Sequential(trunk).train()
    assert torch.equal(trunk.features(image, "conv5"), right)
    larger = np.zeros((40, 40, 3), np.uint8)
    assert trunk.features(larger, "conv2").shape[0] == 1
    for dtype in (torch.float16, torch.bfloat16):
        halved = holder.to(dtype)[0].features(image, "conv5")
        assert halved.dtype == torch.float32
        torch.testing.assert_close(halved, right, rtol=0.1, atol=0.1)


PIXELS = np.zeros((32, 32, 3), np.uint8)
NO_PICTURES = {
    "floats": (PIXELS / 255.0, "got ndarray of float64: it wants square RGB pictures of uint8"),
    "tensor-of-floats": (torch.zeros(3, 32, 32), r"got float32 \[3, 32, 32\]"),
    "grey": (PIXELS[..., 0], r"got uint8 \[32, 32\]"),
    "alpha": (np.zeros((32, 32, 4), np.uint8), r"got uint8 \[32, 32, 4\]"),
    "not-square": (PIXELS[:20], r"got uint8 \[20, 32, 3\].*crop or resize others, to 32 x 32"),
    "of-several-sizes": ([PIXELS, PIXELS[:20, :20]], "pictures of different sizes|object"),
    "a-path": ("cat.jpg", "got str of"),
    "none": (PIXELS[None][:0], r"got uint8 \[0, 32, 32, 3\]"),
    "small": (PIXELS[:5, :5], "5 x 5 pixels do not fit conv5: give 32 x 32"),
}


@pytest.mark.parametrize(("images", "says"), NO_PICTURES.values(), ids=NO_PICTURES)
def test_what_is_no_picture_for_the_net_gets_one_sentence(straight, images, says):
    with pytest.raises(UsageError, match=says):
        fastrot.load(straight).features(images, "conv5")


def test_a_linear_stage_wants_the_size_of_training(straight):
    with pytest.raises(UsageError, match="64 x 64 pixels do not fit fc_block: give 32 x 32"):
        fastrot.load(straight).features(np.zeros((64, 64, 3), np.uint8), "fc_block")


def test_a_run_is_loaded_by_any_of_its_names(straight, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(straight.parent))
    monkeypatch.chdir(straight.parent)
    last = straight / "checkpoints" / "last.pt"
    for name in (str(straight), last, str(last), "straight", "~/straight", "straight/checkpoints/"):
        assert fastrot.load(name).stages[0] == "conv1"
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "run" / "fold0").mkdir(parents=True)
    (tmp_path / "run" / "fold0" / "config.yaml").touch()
    wrong = {
        "no/such": "there is no checkpoint no/such: name a run's folder",
        str(tmp_path): rf"there is no checkpoint {tmp_path}/checkpoints/last\.pt: name a run",
        str(tmp_path / "other.pth"): r"other\.pth is no checkpoint of a fastrot run: name a run",
        __file__: "cut short, changed or no checkpoint",
        str(tmp_path / "run"): "holds a run for each of its --folds: name one, as .*fold0",
    }
    for name, says in wrong.items():
        with pytest.raises(UsageError, match=says):
            fastrot.load(name)


def test_best_and_numbered_checkpoints_are_kept_as_asked(pictures, tmp_path):
    go(pictures, tmp_path, "--max-steps", "9", "--keep-best", "--keep-every", "4")
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert {"last.pt", "previous.pt", "best.pt", "step_4.pt", "step_8.pt"} == kept


def test_numbered_checkpoints_need_not_fall_on_others(pictures, tmp_path):
    go(pictures, tmp_path, "--max-steps", "7", "--checkpoint-every", "100", "--keep-every", "3")
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert {"last.pt", "previous.pt", "step_3.pt", "step_6.pt"} == kept


def test_what_is_not_finite_is_never_the_best(pictures, tmp_path, monkeypatch):
    step = loop.train_step

    def poisoned(state, batch):
        losses = step(state, batch)
        if state.step == 7:  # behind the last log line of the epoch
            with torch.no_grad():
                next(state.method.net.parameters()).fill_(math.nan)
        return losses

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(RunError, match="not finite"):
        go(pictures, tmp_path, "--keep-best", "--log-every", "100", "--checkpoint-every", "100")
    assert not (tmp_path / "checkpoints" / "best.pt").exists()
    assert not (tmp_path / "checkpoints" / "last.pt").exists()


def test_a_refused_command_leaves_the_folder_as_it_was(straight, pictures, tmp_path):
    def stamps():
        return {p: p.read_bytes() for p in sorted(straight.rglob("*")) if p.is_file()}

    before = stamps()
    for args in (["--data", "synthetic:300"], ["--seed", "3"], ["--hold-out", "0.3"]):
        with pytest.raises(UsageError):
            go(pictures, straight, *args)
    assert before == stamps()


def test_a_new_run_with_the_weights_is_a_way_out(straight, pictures, tmp_path):
    """As the refusal of another seed says it; and that run can be resumed too."""
    args = ["--seed", "5", "--start-from", str(straight)]
    go(pictures, tmp_path, *args, "--max-steps", "2")
    go(pictures, tmp_path, *args, "--max-steps", "3")
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["step"] == 3


WRONG = {
    "no-such-path": (["--data", "no/such/place"], "does not exist"),
    "no-known-format": (["--data", __file__], "known format|not a"),
    "small-pictures": (["--image-size", "300", "--no-enlarge"], "--image-size"),
    "batch-too-large": (["--batch", "5000"], "--batch"),
    "budget": (["--schedule.steps", "None", "--budget", "soon"], "--budget"),
    "statistics": (["--statistics", "data"], "--statistics"),
    "net-too-small": (["--image-size", "9"], "--image-size"),
    "checkpoint-gone": (["--start-from", "no/such/run"], "--start-from.*no checkpoint"),
    "val-gone": (["--val", "no/such/place"], "--val no/such/place does not exist"),
    "out-is-a-file": (["--out", __file__], "--out .* cannot be made"),
}


@pytest.mark.parametrize(("args", "names"), WRONG.values(), ids=WRONG)
def test_wrong_use_gets_one_sentence(pictures, tmp_path, args, names):
    with pytest.raises(UsageError, match=names) as told:
        go(pictures, tmp_path, *args)
    assert "\n" not in str(told.value)


def test_a_damaged_checkpoint_is_refused_by_name(pictures, tmp_path):
    go(pictures, tmp_path, "--max-steps", "2")
    last = tmp_path / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-500])
    with pytest.raises(UsageError, match=r"last\.pt is cut short"):
        go(pictures, tmp_path)


def test_a_run_by_rmsprop_goes_on_to_the_same_bits(pictures, tmp_path):
    words = ["rotnet-six-layer", "--image-size", "32", "--data", str(pictures), *TINY[3:]]
    own = {"--backbone.width", "0.1"}
    words = [word for word in words if word not in own]
    for folder, more in (("straight", ()), ("broken", ("--max-steps", "7")), ("broken", ())):
        assert train.main([*words, "--out", str(tmp_path / folder), *more]) == 0
    last = "checkpoints/last.pt"
    assert_same_bits(tmp_path / "straight" / last, tmp_path / "broken" / last)


def test_a_run_on_one_copy_goes_on_to_the_same_bits(pictures, tmp_path):
    more = ["--method.copies", "one", "--method.angles", "0", "180"]
    go(pictures, tmp_path / "straight", *more)
    go(pictures, tmp_path / "broken", *more, "--max-steps", "7")
    go(pictures, tmp_path / "broken", *more)
    last = "checkpoints/last.pt"
    assert_same_bits(tmp_path / "straight" / last, tmp_path / "broken" / last)
    assert json.loads((tmp_path / "straight" / "summary.json").read_text())["chance"] == 0.5


def test_supervised_refuses_data_without_labels(pictures, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(pictures.rglob("*.jpg"))):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    args = ["supervised-alexnet", "--image-size", "64", "--enlarge", "--batch", "4"]
    with pytest.raises(UsageError, match="labels"):
        train.main([*args, "--data", str(flat), "--out", str(tmp_path / "run"), "--device", "cpu"])


@pytest.mark.parametrize("out", ["runs/x", "."])
def test_a_run_inside_of_its_data_is_no_data(straight, pictures, tmp_path, out):
    for i, path in enumerate(sorted(pictures.rglob("*.jpg"))[:9]):
        shutil.copy(path, tmp_path / f"{i}.jpg")
    before = assemble.open_data(tmp_path).fingerprint
    shutil.copytree(straight, tmp_path / out, dirs_exist_ok=True)
    (tmp_path / out / "plots").mkdir(exist_ok=True)
    shutil.copy(tmp_path / "0.jpg", tmp_path / out / "plots" / "turned.jpg")
    assert assemble.open_data(tmp_path).fingerprint == before


def test_supervised_takes_what_has_a_label(pictures, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(pictures, root)
    shutil.copy(root / "class0" / "000.jpg", root / "loose.jpg")
    args = [
        "supervised-alexnet",
        "--image-size",
        "64",
        "--enlarge",
        "--batch",
        "4",
        "--max-steps",
        "1",
    ]
    args += ["--backbone.width", "0.1", "--data", str(root), "--out", str(tmp_path / "run")]
    assert train.main([*args, "--val", str(root), "--device", "cpu", "--workers", "0"]) == 0
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert saved["run_identity"]["images"] == 37


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        (("kind0", "kind1"), r"\(2 and 3; not in both: class0, class1, class2, ...\): both need"),
        (("class0", "class1"), r"\(2 and 3; not in both: class2\): both need"),
    ],
)
def test_supervised_refuses_labels_of_another_kind_in_val(pictures, tmp_path, kinds, says):
    other = tmp_path / "other"
    for i, path in enumerate(sorted(pictures.rglob("*.jpg"))):
        (other / kinds[i % 2]).mkdir(parents=True, exist_ok=True)
        (other / kinds[i % 2] / f"{i}.jpg").write_bytes(path.read_bytes())
    args = ["supervised-alexnet", "--image-size", "64", "--enlarge", "--batch", "4"]
    args += ["--data", str(pictures), "--val", str(other), "--out", str(tmp_path / "run")]
    with pytest.raises(UsageError, match=f"--val has other classes than --data {says}"):
        train.main([*args, "--device", "cpu"])


def test_classes_in_another_order_are_other_classes(pictures):
    cfg = PRESETS["supervised-alexnet"]()
    data, val = (assemble.open_data(pictures) for _ in "ab")
    val.classes = data.classes[::-1]
    view = assemble.evaluation_view(cfg)
    pair = [Loader(x, view, batch=4, workers=0, enlarge=True) for x in (data, val)]
    says = r"\(3 and 3; the same names in another order\): prepare both from the same list"
    with pytest.raises(UsageError, match=says):
        assemble.data_info(cfg, *pair, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30min", 1800), ("1.5h", 5400)])
def test_budgets_are_times(text, seconds):
    assert ranges.seconds_of(text) == seconds


def test_story_is_plain(straight):
    """A checkpoint holds tensors and plain values only."""
    state = checkpoint.load(straight / "checkpoints" / "last.pt")
    assert set(state["progress"]) == {f.name for f in dataclasses.fields(Progress)}
    validated = [line["val_accuracy"] for line in told(straight) if "val_accuracy" in line]
    assert state["progress"]["best"] == max(validated[1:])  # the first is before training


def test_each_step_runs_at_its_own_rate_and_logs_it(pictures, tmp_path, monkeypatch):
    step, used = loop.train_step, []

    def spied(state, batch):
        losses = step(state, batch)
        used.append(float(state.optimizer.param_groups[0]["lr"]))
        return losses

    monkeypatch.setattr(loop, "train_step", spied)
    more = ["--schedule.kind", "linear", "--lr", "0.02", "--log-every", "1", "--max-steps", "5"]
    go(pictures, tmp_path, *more)
    assert used == pytest.approx([0.02 * (1 - k / 20) for k in range(5)])
    assert [line["lr"] for line in told(tmp_path) if "lr" in line] == pytest.approx(used)


@pytest.mark.parametrize("broken", [False, True])
def test_python_collects_garbage_when_it_is_called(pictures, tmp_path, monkeypatch, broken):
    """Not in the midst of steps; behind the run, however it ends, all is as it was."""
    step, seen, lost = loop.train_step, [], []

    class Cycle:
        def __init__(self):
            self.own = self

    def spied(state, batch):
        seen.append((gc.isenabled(), gc.get_freeze_count() > 1000, [r() is None for r in lost]))
        lost.append(weakref.ref(Cycle()))
        if broken and state.step == 4:
            raise Killed
        return step(state, batch)

    monkeypatch.setattr(loop, "train_step", spied)
    with pytest.raises(Killed) if broken else contextlib.nullcontext():
        go(pictures, tmp_path, "--max-steps", "5")
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)
    assert {each[:2] for each in seen[1:]} == {(False, True)}
    # a line is written behind step 3: what steps have lost is gone then, and only then
    assert [each[2] for each in seen[2:4]] == [[True, False], [True] * 3]


def test_pictures_are_judged_plain_and_in_order():
    cfg = config.resolved(train.command_line(TINY))
    view = assemble.evaluation_view(cfg)
    assert view == View(crops=(crops.plain(cfg.method.crop),), shuffled=False)
    assert not view.crops[0].flip


def test_pictures_are_learnt_from_in_the_order_that_is_asked_for():
    args = ["--order", "blocks", "--order-block", "4"]
    cfg = config.resolved(train.command_line([*TINY, *args]))
    assert assemble.training_view(cfg).blocks == (4, config.BLOCKS[1])
    assert assemble.training_view(config.resolved(train.command_line(TINY))).blocks is None


def test_statistics_of_the_data_are_used_and_kept(pictures, tmp_path):
    out = tmp_path / "x.beton"
    convert(BetonOptions(source="imagefolder", root=pictures, out=out, workers=0))
    for steps in ("1", "2"):  # begun, resumed
        go(out, tmp_path / "run", "--statistics", "data", "--max-steps", steps)
        saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["config"]
        assert (tuple(saved["mean"]), tuple(saved["std"])) == (Beton(out).mean, Beton(out).std)
        log = (tmp_path / "run" / "log.txt").read_text()
        assert log.count("crops are decoded by") == int(
            steps
        )  # which form of the reader, once a start
    assert "native" in json.loads((tmp_path / "run" / "environment.json").read_text())


def test_another_global_batch_is_another_run(straight, pictures):
    with pytest.raises(UsageError, match="batch x processes was 4, now 8"):
        go(pictures, straight, "--batch", "8")


def test_another_decoder_is_told_and_an_older_run_is_not_asked():
    facts = {"ranks": 1, "threads": 1, "device": "cpu", "torch": "2", "data": "beton x"}
    now = {**facts, "decoder": "fastrot's own"}
    assert resume.other_machine(facts, now) == []
    (told,) = resume.other_machine({**facts, "decoder": "FFCV 1"}, now)
    assert "decoder were FFCV 1, now fastrot's own" in told


def test_val_of_another_format_is_opened_by_its_own_loader(pictures, tmp_path, monkeypatch):
    """Folders of shards and of pictures have no suffix to tell them apart."""
    asked = []

    def opened(path, loader="auto", *, knob="--data", placement="auto", **_):
        asked.append((knob, loader, placement))
        return data

    for name in ("shards", "pictures", "more"):
        (tmp_path / name).mkdir()
    for name in ("shards", "more"):
        (tmp_path / name / "shards.json").touch()
    data = assemble.open_data("synthetic:8")
    monkeypatch.setattr(assemble, "open_data", opened)
    for val in ("pictures", "more"):
        named = {"data": str(tmp_path / "shards"), "val": str(tmp_path / val), "loader": "tars"}
        assemble.data_of(dataclasses.replace(PRESETS["demo"](), placement="pinned", **named))
    first = ("--data", "tars", "pinned")
    assert asked == [first, ("--val", "auto", "pinned"), first, ("--val", "tars", "pinned")]


@pytest.mark.parametrize("val", ["same", "other"])
def test_judges_that_are_trained_on_are_told(pictures, tmp_path, capsys, val):
    judges = pictures
    if val == "other":
        judges = tmp_path / "others"
        for i in range(9):
            (judges / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo(i, 40, 48)).save(judges / f"class{i % 3}" / f"other{i}.png")
    assert go(pictures, tmp_path / "run", "--val", str(judges), "--max-steps", "1") == 0
    told = "37 of the 37 pictures of --val are named as pictures that are trained on"
    assert (told in capsys.readouterr().out) == (val == "same")


ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}  # as torchrun sets them
THREADS = {  # environment, --threads, processes, device -> threads; None: torch's own
    "plain": ({}, None, 1, "cpu", None),
    "plain-with-omp": ({"OMP_NUM_THREADS": "1"}, None, 1, "cpu", None),
    "asked-for": ({}, 3, 1, "cpu", 3),
    "torchrun-alone": (ELASTIC, None, 1, "cpu", None),
    "torchrun": (ELASTIC, None, 2, "cpu", 4),
    "torchrun-on-gpus": (ELASTIC, None, 2, "cuda", None),
    "torchrun-asked-for-one": (ELASTIC, 1, 2, "cpu", 1),
    "torchrun-with-omp": ({**ELASTIC, "OMP_NUM_THREADS": "3"}, None, 2, "cpu", None),
}


@pytest.mark.parametrize(
    ("env", "wish", "processes", "device", "threads"), THREADS.values(), ids=THREADS
)
def test_processes_on_a_cpu_share_its_cores(env, wish, processes, device, threads, monkeypatch):
    for name in ELASTIC:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("fastrot.training.device.share_of_cores", lambda processes: 8 // processes)
    here = dist.Place(world=processes, local_world=processes)
    assert choose_threads(wish, here, torch.device(device)) == threads


@pytest.mark.parametrize(("device", "limit"), [("cuda:0", 0), ("cpu", 10)])
def test_a_gpu_tries_all_of_cudnns_plans(device, limit, monkeypatch):
    """By itself it tries ten, and the fastest of a convolution may not be among them."""
    monkeypatch.setattr(devices, "choose_device", lambda *_: torch.device(device))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark_limit", 10)
    devices.choose(config.Config(precision="fp32"))
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark_limit == limit


def test_a_run_says_how_it_shares_the_cores(pictures, tmp_path, capsys, monkeypatch):
    before = torch.get_num_threads()
    try:
        go(pictures, tmp_path, "--threads", "2", "--max-steps", "1")
        assert "1 worker(s) for pictures, 2 thread(s) for the network" in capsys.readouterr().out
        assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["run_identity"]["threads"] == 2
    finally:
        torch.set_num_threads(before)
