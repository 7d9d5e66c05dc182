"""A run that goes on with another length: where its steps so far would have been the same, or where asked to."""

import json

import numpy as np
import pytest
import torch
import yaml
from test_run import go

from fastrot import train
from fastrot.config import Schedule, UsageError
from fastrot.training import budget, checkpoint
from fastrot.training.optim import LRSchedule

pytestmark = pytest.mark.usefixtures("quick_runs")


def saved(run) -> dict:
    return checkpoint.load(run / "checkpoints" / "last.pt")


def test_a_constant_rate_goes_on_to_the_bits_of_a_run_that_was_longer_from_the_start(
    pictures, tmp_path, capsys
):
    rate = ["--schedule.kind", "constant"]
    for run, steps in (("a", "5"), ("a", "11"), ("b", "11")):
        go(pictures, tmp_path / run, *rate, "--schedule.steps", steps)
    said = " ".join(capsys.readouterr().out.split())
    became = "1 epoch(s) (5 steps) became 2 epoch(s) (11 steps): the 5 steps done are the same"
    assert said.count(became) == 1
    a, b = (saved(tmp_path / run) for run in "ab")
    assert (a["step"], a["run_identity"]["steps"]) == (11, 11)
    assert a["run_identity"]["extended"] == []
    assert all(torch.equal(a["net"][name], b["net"][name]) for name in b["net"])
    assert repr(a["optimizer"]) == repr(b["optimizer"])


def test_a_falling_rate_goes_on_where_it_is_asked_to_and_that_stays_known(
    pictures, tmp_path, capsys
):
    longer = ["--schedule.steps", "9"]
    go(pictures, tmp_path, "--schedule.steps", "4")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=r"was to have 1 epoch\(s\) \(4 steps\), and .*--extend"):
        go(pictures, tmp_path, *longer)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    go(pictures, tmp_path, *longer, "--extend", "--log-every", "1")
    assert "extended at step 4: by the schedule of 1 epoch" in capsys.readouterr().out
    lines = [json.loads(li) for li in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert [rates[k] for k in range(5, 10)] == pytest.approx(
        [0.03 * (1 - k / 9) for k in range(4, 9)]
    )
    go(pictures, tmp_path, *longer)  # it has this length now
    (told,) = json.loads((tmp_path / "summary.json").read_text())["extended"]
    assert told.startswith("extended at step 4")
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith(f"# {told}\n")
    assert yaml.safe_load(text)["schedule"]["steps"] == 9
    assert saved(tmp_path)["run_identity"]["extended"] == [told]
    with pytest.raises(UsageError, match="has done 9 steps, and would end at step 7: give it 2"):
        go(pictures, tmp_path, "--schedule.steps", "7", "--extend")


def test_a_budget_and_the_epochs_that_it_came_to_are_the_same_length(
    pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(budget, "_seconds_each", lambda *_: 0.1)
    go(pictures, tmp_path, "--schedule.steps", "None", "--budget", "2s", "--max-steps", "1")
    epochs = saved(tmp_path)["run_identity"]["epochs"]
    batches = len(np.load(tmp_path / "rows-train.npy")) // 4
    assert epochs == int(2 / (0.1 * batches + 0.1))
    monkeypatch.setattr(
        budget, "_seconds_each", lambda *_: 0.05
    )  # measured anew it would be longer
    go(pictures, tmp_path, "--epochs", str(epochs), "--max-steps", "2")
    train.main(["--config", str(tmp_path / "config.yaml"), "--max-steps", "3"])
    for steps in ("4", "5"):
        go(pictures, tmp_path, "--schedule.steps", "None", "--budget", "2s", "--max-steps", steps)
    identity = saved(tmp_path)["run_identity"]
    assert (identity["epochs"], identity["budget"], saved(tmp_path)["step"]) == (epochs, "2s", 5)
    with pytest.raises(UsageError, match=r"in a run of .*--extend"):
        go(pictures, tmp_path, "--schedule.steps", "None", "--budget", "3s", "--max-steps", "6")


def test_a_budget_whose_epochs_were_changed_is_measured_anew(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "_seconds_each", lambda *_: 0.1)
    rate = ["--schedule.kind", "constant", "--schedule.steps", "None"]
    go(pictures, tmp_path, *rate, "--budget", "2s", "--max-steps", "1")
    first = saved(tmp_path)["run_identity"]["epochs"]
    go(pictures, tmp_path, *rate, "--epochs", str(first + 2), "--max-steps", "2")
    go(pictures, tmp_path, *rate, "--budget", "2s", "--max-steps", "3")
    assert saved(tmp_path)["run_identity"]["epochs"] == first


PAPER = {"table": ((10, 0.1), (20, 0.01)), "epochs": 20}
CASES = {  # a schedule, epochs done, epochs the method asked for; whether 20 epochs can become 40
    "constant": ({"kind": "constant"}, 20, set(), True),
    "table": ({}, 11, set(), False),
    "table-in-its-first-rate": ({}, 10, set(), True),
    "table-as-published": ({"as_published": True}, 20, set(), True),
    "cosine": ({"kind": "cosine"}, 1, set(), False),
    "cosine-that-stays": ({"kind": "cosine", "last": 1.0}, 20, set(), True),
    "linear": ({"kind": "linear"}, 1, set(), False),
    "warm-up": ({"kind": "constant", "warmup": 3.0}, 2, set(), True),
    "weights-had-begun": ({"kind": "constant"}, 13, {12}, False),
    "weights-to-come": ({"kind": "constant"}, 12, {12}, True),
    "weights-as-published": ({"kind": "constant", "as_published": True}, 13, {12}, True),
}


@pytest.mark.parametrize(("schedule", "done", "asked", "fine"), CASES.values(), ids=CASES)
def test_which_steps_a_longer_run_would_have_made_otherwise(schedule, done, asked, fine):
    plan = Schedule(**PAPER | schedule)
    was, now = (LRSchedule(plan, epochs=e, batches=3, steps=3 * e) for e in (20, 40))
    assert budget._same_so_far(was, now, asked, 3 * done) == fine
