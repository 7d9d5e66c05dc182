"""A run's page: one file, true figures, drawn from whatever the run's folder holds."""

import functools
import json
import re
import time

import numpy as np
import pytest
import test_methods
import torch
from PIL import Image
from test_run import go
from torch import nn
from truth import photo

from fastrot import config
from fastrot.evals import page, picture
from fastrot.evals.page import RunLog
from fastrot.evals.picture import first_filters, rotated_sheet
from fastrot.methods.rotnet import HEADLINE

HOSTILE = "<script>alert('x')</script> & \"quote\" $\\frac$ 漢 {brace}"
draw = functools.partial(page.draw, headline=HEADLINE)
ROTNET = "method:\n  type: RotNet\nbackbone:\n  type: AlexNet\npreset: demo\n"


def training(step, **other):
    line = {"step": step, "epoch": step // 10, "loss": 1.3, "accuracy": 0.5}
    return line | {"images_per_s": 900.0, "wait_share": 0.1, "lr": 0.05} | other


def judged(step, accuracy):
    return {"step": step, "epoch": step // 10, "val_loss": 1.2, "val_accuracy": accuracy}


def folder(tmp_path, *lines, summary=None, config=ROTNET, environment=None, torn=""):
    run = tmp_path / "run"
    run.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines) + torn
    (run / "metrics.jsonl").write_text(text)
    (run / "config.yaml").write_text(config)
    environment = environment or {"device": "Abacus 3", "versions": {"torch": "9.9"}}
    (run / "environment.json").write_text(json.dumps(environment))
    if summary is not None:
        (run / "summary.json").write_text(json.dumps(summary))
    return run


def words(text):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text.split("</style>")[1]))


def photos(n=3, size=48):
    return torch.from_numpy(np.stack([photo(i, size, size) for i in range(n)]))


def sure_of(rotations):
    """Probabilities of a net that says `rotations` [n, 4]."""
    return nn.functional.one_hot(torch.tensor(rotations), 4) * 0.6 + 0.1


SUMMARY = {
    "preset": "demo",
    "steps": 100,
    "images_per_s": 1234.4,
    "wait_share": 0.031,
    "val_accuracy_first": 0.254,
    "val_accuracy": 0.668,
    "chance": 0.25,
    "seconds": 63.0,
    "verdict": "bound by the network's step on the CPU",
}


def test_the_page_shows_the_summarys_figures_and_needs_no_other_file(tmp_path):
    run = folder(tmp_path, judged(0, 0.25), training(100), judged(100, 0.6), summary=SUMMARY)
    net = nn.Sequential(nn.Conv2d(3, 8, 5))
    path = draw(run, net=net, images=photos(), guesses=sure_of([[0, 1, 2, 3]] * 3))
    text = path.read_text()
    assert path == run / "index.html"
    for figure in ("25.4% → 66.8%", "chance 25%", "1,234", "3.1%", "63 s", "network&#x27;s step"):
        assert figure in words(text)
    assert "Abacus 3 · torch 9.9" in text
    assert "fastrot.load(&quot;" in text
    assert "method.type" in text
    sources = re.findall(r"(?:src|href)=\"([^\"]{0,30})", text)
    assert len(sources) == 5
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    assert not re.search(r"<(script|link|iframe)|@import|url\(", text)
    names = {p.name for p in (run / "plots").iterdir()}
    assert names == {f"{n}.png" for n in ("accuracy", "loss", "throughput", "filters", "turned")}
    assert {p.name for p in run.iterdir() if p.suffix == ".tmp"} == set()


@pytest.mark.parametrize(
    ("lines", "torn"),
    [
        ((), ""),
        ((judged(0, 0.25),), ""),
        ((judged(0, 0.25), training(20)), '{"step": 40, "lo'),
        ((training(20, loss=float("nan"), accuracy=None), training(40, loss=float("inf"))), ""),
        (tuple(training(i, loss=float("nan")) for i in range(1, 1000)), ""),
        ((training(20, loss="?", loss_a=1.0, **{f"loss_{HOSTILE}": 0.5}),), ""),
    ],
    ids=["no-line", "before-training", "torn", "not-finite", "never-finite", "odd-names"],
)
def test_a_run_is_drawn_from_its_first_line_on(tmp_path, lines, torn):
    text = draw(folder(tmp_path, *lines, torn=torn)).read_text()
    assert text.count("<img") == 3
    assert "nan" not in words(text)
    if judged(0, 0.25) in lines:
        assert "25% held-out pictures, before training · chance 25%" in words(text)


def test_a_run_draws_its_page_as_it_goes(pictures, tmp_path):
    assert go(pictures, tmp_path, "--max-steps", "9") == 0
    text = words((tmp_path / "index.html").read_text())
    assert "Rotation accuracy" in text
    assert "chance 25%" in text
    names = {p.stem for p in (tmp_path / "plots").iterdir()}
    assert names == {"accuracy", "loss", "throughput", "filters", "turned"}


def test_an_empty_folder_is_drawn(tmp_path):
    assert draw(tmp_path).exists()


def test_nothing_held_out_shows_the_training_accuracy(tmp_path):
    text = words(draw(folder(tmp_path, training(20))).read_text())
    assert "50% pictures that it trains on" in text


def test_odd_strings_stay_text(tmp_path):
    config = ROTNET + f"data: {json.dumps(HOSTILE)}\n"
    environment = {"device": HOSTILE, "versions": {"torch": HOSTILE}, HOSTILE: [HOSTILE]}
    summary = SUMMARY | {"verdict": HOSTILE}
    run = folder(tmp_path, training(20), summary=summary, config=config, environment=environment)
    text = draw(run).read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4
    assert "{brace}" in text


def test_plots_of_an_earlier_call_stay(tmp_path):
    run = folder(tmp_path, training(20))
    draw(run, images=photos(), guesses=None)
    assert 'class="turned"' in draw(run).read_text()


def test_a_summary_older_than_the_lines_is_left_out(tmp_path):
    run = folder(tmp_path, judged(0, 0.2), training(200), judged(200, 0.7), summary=SUMMARY)
    text = words(draw(run).read_text())
    assert "20% → 70% held-out pictures, before training → so far" in text
    assert "still training" in text


def test_long_runs_are_thinned_and_keep_their_shape(tmp_path):
    lines = [training(i, loss=float("nan") if i < 900 else i) for i in range(1, 4001)]
    run = folder(tmp_path, *lines, summary=SUMMARY | {"steps": 4000})
    steps, loss = RunLog(run, HEADLINE).curve("loss")
    assert len(steps) == len(loss) == page.POINTS
    assert steps[-1] == 4000
    assert np.isnan(loss[:89]).all()
    np.testing.assert_allclose(loss[90:], steps[90:] - 4.5)
    draw(run)  # imports matplotlib
    begun = time.process_time()
    draw(run, images=photos(8, 64), guesses=sure_of([[0, 1, 2, 3]] * 8))
    assert time.process_time() - begun < 3  # 0.6 s on a free core


@pytest.mark.parametrize("epoch_s", [10.0, 60.0, 1000.0])
def test_a_live_page_takes_a_hundredth_of_the_time_at_most(tmp_path, monkeypatch, epoch_s):
    clock, drawn = [0.0], []

    def costly(*_, **__):
        drawn.append(clock[0])
        clock[0] += 3.0

    monkeypatch.setattr(page, "draw", costly)
    monkeypatch.setattr(page.time, "perf_counter", lambda: clock[0])
    live = page.LivePage(tmp_path, test_methods.build(config.RotNet), None)
    live.at_epoch()
    for _ in range(100):
        clock[0] += epoch_s
        live.at_epoch()
    assert 3.0 * (len(drawn) - 1) <= clock[0] / 100
    assert len(drawn) == 1 + 100 // -(-301 // epoch_s)  # at the next epoch's end behind 300 s
    live.draw()  # as a run ends, whenever it was drawn last
    assert drawn[-1] == clock[0] - 3.0


@pytest.mark.parametrize("rotation", range(4))
def test_up_is_where_a_turned_pictures_top_is(rotation):
    top = np.zeros((9, 9), np.uint8)
    top[0] = 1
    x, y = picture.UP[rotation]
    assert np.rot90(top, rotation)[4 + 4 * y, 4 + 4 * x] == 1


@pytest.mark.parametrize("rotation", range(4))
def test_the_arrow_points_up_as_guessed(rotation):
    pixels = np.asarray(picture._badge(rotation, "#000000").convert("RGB")).astype(float)[
        6:34, 6:34
    ]
    white = pixels.mean(-1)
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    right, down = picture.UP[rotation]
    # head broader than shaft: white far to the sides lies on the head's half
    sides = np.abs(x * down - y * right) > 0.35
    along = (x * right + y * down)[sides]
    assert (along * white[sides]).sum() > 0


def test_frames_say_right_or_wrong_and_badges_sit_at_the_guessed_top(tmp_path):
    guesses = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 0, 0]]
    rotated_sheet(photos(), sure_of(guesses), tmp_path / "a.png", overall=0.5, footer="Abacus")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    blue, red = (0, 0x72, 0xB2), (0xD5, 0x5E, 0)
    side, frame = picture.SIDE, picture.FRAME
    for i, row in enumerate(guesses):
        for rotation, guess in enumerate(row):
            x = picture.MARGIN + rotation * (side + picture.GAP)
            y = 112 + 30 + i * (side + 36)
            colour = blue if guess == rotation else red
            assert tuple(pixels[y + 2, x + 2]) == colour
            inner = pixels[y + frame : y + side - frame, x + frame : x + side - frame]
            small = np.asarray(Image.fromarray(inner).resize((48, 48))).astype(float)
            apart = [np.abs(small - np.rot90(photo(i, 48, 48), t)).mean() for t in range(4)]
            assert np.argmin(apart) == rotation
            down, right = np.argwhere((inner == colour).all(-1)).mean(axis=0) / len(inner) * 2 - 1
            np.testing.assert_allclose((right, down), 0.8 * np.array(picture.UP[guess]), atol=0.1)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_a_sheet_without_guesses_is_the_pictures_alone(tmp_path, n):
    rotated_sheet(photos(n), None, tmp_path / "a.png")
    width, height = Image.open(tmp_path / "a.png").size
    assert width > 4 * picture.SIDE
    assert height > -(-n // 4) * picture.SIDE


def test_filters_are_scaled_each_by_its_own_peak():
    net = nn.Sequential(nn.Conv2d(3, 16, 5), nn.Conv2d(16, 4, 3))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[0, 0] = 1e-3  # red alone
        net[0].weight[1, 2] = -50.0  # blue alone, negative
    sheet = first_filters(net)
    assert sheet is not None
    side, gap = 50, 4  # 5 pixels, ten times
    assert sheet.shape == (3 * (side + gap) + gap, 6 * (side + gap) + gap, 3)
    assert sheet[29, 29].tolist() == [255, 128, 128]
    assert sheet[29, 29 + side + gap].tolist() == [128, 128, 0]
    assert (sheet[:, gap + side : gap + side + gap] == 255).all()


@pytest.mark.parametrize(
    "net", [nn.Linear(3, 4), nn.Conv2d(1, 4, 3), nn.Conv2d(3, 6, 3, groups=3)], ids=str
)
def test_a_net_without_a_convolution_of_colours_has_no_montage(net):
    assert first_filters(net) is None


@pytest.mark.parametrize("kernel", [3, 11])
@pytest.mark.parametrize("filters", [1, 64, 192])
def test_a_montage_fits_a_page(kernel, filters):
    sheet = first_filters(nn.Conv2d(3, filters, kernel).bfloat16())
    assert sheet is not None
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] <= 16 * 54 + 4


def test_decoupling_is_drawn_with_its_other_half_and_the_chance_of_turns(tmp_path):
    other = dict(val_prec_inv=0.26, val_loss_inv=1.4)
    run = folder(
        tmp_path,
        judged(0, 0.2) | other,
        training(10, loss_cls=1.0, loss_nce=9.0),
        judged(10, 0.5) | other,
        config=ROTNET.replace("RotNet", "Decoupling"),
    )
    log = page.RunLog(run, HEADLINE)
    assert log.headline.chance == 0.25
    (axes,) = page._accuracy(log).axes
    assert "held-out, other half" in axes.get_legend_handles_labels()[1]
    (axes,) = page._loss(log).axes
    assert "held-out, rotation alone" in axes.get_legend_handles_labels()[1]
