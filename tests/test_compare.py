"""`draw.py compare RUN RUN ...`: curves and probes of several runs, over each other."""

import json
import shutil

import pytest
from matplotlib.axes import Axes
from PIL import Image

from fastrot import draw
from fastrot.config import UsageError


@pytest.fixture
def runs(tmp_path):
    """Two with probes, in folders of one name, and one without."""
    for k, name in enumerate(("a/run", "b/run", "c")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        # an epoch has 10 steps, and its validation comes at its end
        lines = [
            {
                "step": 10 * n,
                "epoch": n - 1,
                "loss": 2 / (n + 1),
                "val_loss": 1.0,
                "val_accuracy": 0.1 * n + 0.1 * k,
            }
            for n in range(1, 5)
        ]
        if name != "c":
            lines[-1] |= {"val_top1_conv1": 0.25 + 0.1 * k, "val_top1_conv5": 0.5}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(tmp_path / name) for name in ("a/run", "b/run", "c")]


@pytest.mark.parametrize("against", ["epoch", "step"])
def test_a_page_of_several_runs(runs, tmp_path, against, capsys):
    out = tmp_path / "out"
    assert draw.main(["compare", *runs, "--out", str(out), "--against", against]) == 0
    assert f"written to {out}/index.html" in capsys.readouterr().out
    with Image.open(out / "compare.png") as picture:
        assert picture.width > 3 * 700  # two curves, and stages
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
    assert {(0, 114, 178), (213, 94, 0), (0, 158, 115)} <= colours  # a colour each
    page = (out / "index.html").read_text()
    for row in (["a/run", "40", "1", "0.4", "25.0%", "50.0%"], ["c", "40", "1", "0.6", "-", "-"]):
        name = row[0] if row[0] != "c" else f"{tmp_path.name}/c"
        cells = [name, *row[1:]]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page


def test_epochs_are_those_of_the_run(runs, monkeypatch, tmp_path):
    """By a validation at an epoch's end, by the summary; a run that has ended none is refused."""
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **k: drawn.append(list(x)) or plot(self, x, y, **k)
    )
    (tmp_path / "c" / "summary.json").write_text(json.dumps({"steps": 40, "epochs": 8}))
    draw.main(["compare", runs[0], runs[2], "--out", str(tmp_path / "o"), "--scores", "val_loss"])
    assert drawn[0] == pytest.approx([1, 2, 3, 4])
    assert drawn[1] == pytest.approx([2, 4, 6, 8])
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "metrics.jsonl").write_text('{"step": 20, "epoch": 0, "loss": 1.0}\n')
    words = ["compare", runs[0], str(begun), "--out", str(tmp_path / "o"), "--scores", "loss"]
    with pytest.raises(UsageError, match="begun has ended no epoch yet: give --against step"):
        draw.main(words)


def test_odd_names_are_shown_as_they_are(runs, tmp_path):
    odd = tmp_path / "_$x$ <b>"
    shutil.copytree(runs[2], odd)
    draw.main(["compare", runs[0], str(odd), "--out", str(tmp_path / "o")])
    assert "_$x$ &lt;b&gt;" in (tmp_path / "o" / "index.html").read_text()


def test_runs_without_probes_have_curves_alone(runs, tmp_path):
    draw.main(["compare", runs[2], runs[0], "--out", str(tmp_path / "o"), "--scores", "loss"])
    with Image.open(tmp_path / "o" / "compare.png") as picture:
        assert picture.width < 2 * 800


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "{0}"], r"compare got 1 run\(s\): name two or more"),
        (["compare", "{0}", "{0}"], "a run is named twice: name each once"),
        (["compare", "{0}", "nowhere"], "nowhere holds no metrics.jsonl of a run"),
        (["compare", "{0}", "{1}", "--scores", "mAP"], "--scores got mAP, which no run has: choose of epoch"),
        (["compete", "{0}"], "there is no figure .*choose one of compare, filters"),
    ],
)  # fmt: skip
def test_wrong_use_gets_one_sentence(runs, tmp_path, words, says):
    with pytest.raises(UsageError, match=says) as told:
        draw.main([word.format(*runs) for word in words])
    assert "\n" not in str(told.value)
