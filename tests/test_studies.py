"""Studies: each job is a command that exists, is done once and gone on with; a figure is its seeds', an order is judged by all."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import measure, plots, report, runs
from benchmarks.studies import centric, cifar10, imagenette, pirl, study
from benchmarks.studies.study import Figure, Job, Limit, Order, Spread, Study
from fastrot import cli, config, evaluate, ranges, train
from fastrot.config import RunError, UsageError

DATA = ("--data", "train.beton", "--val", "test.beton")
STUDIES = {
    "imagenette": imagenette.study_of(DATA),
    **{
        f"centric {d}": centric.study_of(
            dict.fromkeys((*centric.SETS, centric.EVENED), DATA), size, ""
        )
        for d, size in centric.SIZES.items()
    },
    **{f"pirl {d}": pirl.study_of(DATA, DATA, size, "") for d, size in pirl.SIZES.items()},
    **{f"cifar10 {d}": cifar10.study_of(DATA, size, "") for d, size in cifar10.SIZES.items()},
}


@pytest.fixture(autouse=True)
def commit(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    monkeypatch.setenv("DIRTY", "1")


def asked(work, *more: str) -> argparse.Namespace:
    words = ["--work", str(work), "--device", "cpu", "--seeds", "2", *more]
    return study.parser("x", "pictures").parse_args(words)


# ---- the tables ----


@pytest.mark.parametrize("name", STUDIES)
def test_each_job_is_a_command_with_knobs_that_exist(name):
    of = STUDIES[name]
    names = list(of.jobs)
    for at, (job, each) in enumerate(of.jobs.items()):
        assert each.of is None or names.index(each.of) < at, job
        first, *words = map(str, each.words)
        if each.asks:
            ranges.check_ranges(cli.parse(evaluate.EVALUATIONS[first], words, "x"))
            continue
        cfg = train.command_line([first, *words, *(["--start-from", "x"] if each.of else [])])
        ranges.check(config.resolved(cfg))
        if each.step is not None:
            whose = train.command_line(list(map(str, of.jobs[each.of].words)))
            assert each.step % whose.keep_every == 0


@pytest.mark.parametrize("name", STUDIES)
def test_each_figure_has_a_job_that_has_its_score(name):
    of = STUDIES[name]
    cells = [(f.table, f.line, f.column) for f in of.figures]
    assert len(set(cells)) == len(cells)
    assert {f.job for f in of.figures} <= set(of.jobs)
    for order in of.orders:
        assert {order.more, order.less} <= set(cells)
    for f in of.figures:
        words = [*map(str, of.jobs[f.job].words)]
        if "--method.stages" in words and f.score.startswith("top1_"):
            assert f.score.removeprefix("top1_") in words


def test_from_few_labels_both_sides_take_as_many_steps():
    for size in cifar10.SIZES.values():
        jobs, steps = cifar10.study_of(DATA, size, "").jobs, set()
        for count in size.labels:
            for job in (f"rotnet-4-conv-{count}", f"supervised-{count}"):
                begin = ["--start-from", "x"] * (jobs[job].of is not None)
                cfg = config.resolved(train.command_line([*map(str, jobs[job].words), *begin]))
                assert (cfg.rows, cfg.epochs) == (str(count), None)
                steps.add(cfg.schedule.steps)
        assert steps == {size.few_steps}


def test_at_equal_views_one_copy_has_as_many_steps_of_as_many_views():
    for size in cifar10.SIZES.values():
        jobs = cifar10.study_of(DATA, size, "").jobs
        one, every = (
            train.command_line([*map(str, jobs[name].words)])
            for name in ("rotnet-4-one", "rotnet-4")
        )
        epochs = every.epochs or every.schedule.epochs
        assert one.batch == 4 * every.batch
        assert one.schedule.steps == epochs * (size.pictures // every.batch)
        assert one.schedule.table == every.schedule.table


# ---- how they are done ----


@pytest.fixture
def done(monkeypatch) -> list[list[str]]:
    """Commands that were given, each by a stand-in that writes what a run would."""
    calls: list[list[str]] = []
    clock = [0.0]
    monkeypatch.setattr(study.time, "perf_counter", lambda: clock[0])

    def run(script, *words, quiet=False):
        words = [*map(str, words)]
        calls.append([script, *words])
        if "fail" in words:
            clock[0] += 7.0
            raise RunError("it failed")
        if script.endswith("evaluate.py"):
            found = {
                "stages": {"conv1": {"top1": 0.3, "classes": {"cat": 0.1}, "far": [0.25, 0.75]}}
            }
            Path(words[words.index("--json") + 1]).write_text(json.dumps(found))
            clock[0] += 3.0
            return
        out, seed = Path(words[words.index("--out") + 1]), int(words[words.index("--seed") + 1])
        out.mkdir(parents=True)
        clock[0] += 10.0 + seed
        val = {"accuracy": 0.5 + 0.1 * seed, "top1_conv1": 0.6 - 0.1 * seed}
        (out / "summary.json").write_text(json.dumps({"val": val, "steps": 1}))

    monkeypatch.setattr(runs, "run", run)
    return calls


JOBS = {
    "net": Job(("demo", "--data", "x")),
    "probe": Job(("probe-linear",), of="net", step=40),
    "asked": Job(("classes",), of="probe", asks=True),
    "other": Job(("demo",)),
}
FIGURES = (
    Figure("first", "a", "x", "probe", "accuracy", paper=0.5, to_reach=True),
    Figure("first", "b", "x", "probe", "top1_conv1"),
    Figure("second", "a", "cat", "asked", "conv1.classes.cat"),
)
ORDERS = (
    Order("a over cat", ("first", "a", "x"), ("second", "a", "cat")),
    Order("a over b", ("first", "a", "x"), ("first", "b", "x")),
)
SMALL = Study("imagenette", "about", JOBS, FIGURES, ORDERS, (Limit("both", ("net", "probe"), 5.0),))


def test_jobs_are_done_once_each_behind_the_one_that_it_is_of(done, tmp_path):
    found = list(study.rows(SMALL, asked(tmp_path), {}))
    assert [[Path(c[0]).stem, c[1]] for c in done[:2]] == [
        ["train", "demo"],
        ["train", "probe-linear"],
    ]
    (folder,) = (tmp_path / "studies").iterdir()
    assert folder.name.startswith(f"imagenette-cpu-{'f' * 12}-")
    begin = done[1][done[1].index("--start-from") + 1]
    assert begin == str(folder / "net-0" / "checkpoints" / "step_40.pt")
    assert done[2][:3] == ["fastrot/evaluate.py", str(folder / "probe-0"), "classes"]
    assert len(done) == 6  # not `other`, which no figure wants
    assert next(study.rows(SMALL, asked(tmp_path), {}))["values"] == found[0]["values"]
    assert len(done) == 6
    only = asked(tmp_path / "new", "--tables", "second")
    assert [row["what"] for row in study.rows(SMALL, only, {})] == ["second", "seconds"]


def test_a_figure_is_of_all_seeds_and_an_order_holds_in_each(done, tmp_path):
    a, _, cat, over_cat, over_b, spent = study.rows(SMALL, asked(tmp_path), {"width": 1})
    assert a["values"] == [0.5, 0.6]
    assert a["p50"] == pytest.approx(0.55)
    assert (a["what"], a["variant"], a["mode"], a["paper"]) == ("first", "a", "x", 0.5)
    assert "target" not in a  # on a CPU sizes are not the paper's
    assert a["seconds"] == 21.0  # medians of 10 and 11, twice
    assert cat["values"] == [0.1, 0.1]
    assert "a over cat: shown, in 2 of 2 seeds, by +40.0% to +50.0%" in over_cat["judgement"]
    assert "a over b: NOT shown, in 1 of 2 seeds" in over_b["judgement"]
    assert (spent["p50"], spent["unit"]) == (21.0, "s")
    assert "target" not in spent


def test_an_order_may_want_a_margin_and_a_spread_is_the_mean_of_the_seeds(done, tmp_path):
    near, far = (Order("a over cat", ORDERS[0].more, ORDERS[0].less, by=by) for by in (0.39, 0.41))
    spread = Spread("distances", "a", "asked", "conv1.far", 2.0)
    of = Study("pirl", "about", JOBS, FIGURES, (near, far), spreads=(spread,))
    *_, row, close, wide = study.rows(of, asked(tmp_path), {})
    assert (row["what"], row["variant"], row["mode"]) == ("spread", "a", "distances")
    assert row["shares"] == [0.25, 0.75]
    assert row["p50"] == pytest.approx(0.25 * 0.5 + 0.75 * 1.5)
    assert "a over cat by 39.0% at least: shown, in 2 of 2 seeds" in close["judgement"]
    assert "NOT shown, in 1 of 2 seeds" in wide["judgement"]
    file = tmp_path / "results" / "x.jsonl"
    for each in (row, close, wide):
        measure.append(file, each)
    report.write(file.parent, tmp_path / "reports")
    page = (tmp_path / "reports" / "pirl.md").read_text()
    assert "0 of 1 expectations" in page  # of one key the last counts
    assert "| mean | distances |" in page
    beside = {**row, "variant": "a" + measure.OTHERS}
    (panel,) = plots.study(plots.Rows([row, beside])).axes
    assert panel.get_title(loc="left") == "distances"
    assert [each.get_text() for each in panel.get_legend().get_texts()] == ["a", "a, another's"]
    own, other = panel.patches
    assert own.get_edgecolor() == other.get_edgecolor()
    assert (own.get_linestyle(), other.get_linestyle()) == ("-", ":")


def test_what_fails_leaves_what_was_done(done, tmp_path):
    broken = {**JOBS, "probe": Job(("probe-linear", "fail"), of="net")}
    of = Study("x", "", broken, FIGURES)
    with pytest.raises(RunError):
        list(study.rows(of, asked(tmp_path), {}))
    with pytest.raises(RunError):
        list(study.rows(of, asked(tmp_path), {}))
    assert [call[1] for call in done] == ["demo", "probe-linear", "probe-linear"]
    (clock,) = (tmp_path / "studies").glob("*/probe-0.seconds")
    assert float(clock.read_text()) == 14.0  # of both tries


def test_names_that_differ_behind_a_dot_are_jobs_of_their_own(done, tmp_path):
    jobs = {f"net-{n}-{n}": Job(("demo",)) for n in (0.25, 0.5)}
    jobs |= {f"{name}-asked": Job(("classes",), of=name, asks=True) for name in jobs}
    figures = [Figure("first", name, "x", name, "conv1.top1") for name in jobs if "asked" in name]
    first, second = study.rows(Study("x", "", jobs, tuple(figures)), asked(tmp_path), {})
    assert len(done) == 8
    assert first["seconds"] == second["seconds"] == 10.5 + 3


def test_jobs_on_other_pictures_are_others(done, tmp_path):
    list(study.rows(SMALL, asked(tmp_path), {}))
    others = {**JOBS, "net": Job(("demo", "--data", "y"))}
    list(study.rows(Study("imagenette", "", others, FIGURES), asked(tmp_path), {}))
    assert len(done) == 12
    assert len(list((tmp_path / "studies").iterdir())) == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seeds", "0"], "--seeds got 0: it wants at least 1"),
        (["--tables", "third"], "--tables got third: choose of 'first', 'second'"),
        pytest.param(
            ["--device", "cuda"],
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_a_study_cannot_do_is_refused_in_a_sentence(done, tmp_path, more, words):
    with pytest.raises(UsageError, match=words):
        list(study.rows(SMALL, asked(tmp_path, *more), {}))
    assert not done


# ---- how they are told ----


def test_a_page_has_each_cell_beside_the_papers(done, tmp_path):
    file = tmp_path / "results" / "x.jsonl"
    for row in study.rows(SMALL, asked(tmp_path), {}):
        measure.append(file, row)
    report.write(file.parent, tmp_path / "reports")
    page = (tmp_path / "reports" / "imagenette.md").read_text()
    assert "1 of 2 expectations, which the papers give, hold in every seed." in page
    assert "- a over b: NOT shown" in page
    assert "| first | x | seconds |" in page
    assert "| a | 55.0% † (50.0 to 60.0, paper 50.00%) | 21 |" in page
    assert "| b | 55.0% † (50.0 to 60.0) | 21 |" in page


def test_a_picture_has_a_panel_for_each_table_of_columns():
    rows = [
        measure.row(
            *("linear probe, top-1",), variant=line, mode=stage, theme="imagenette", values=[v, v + 0.1]
        )
        for line, v in (("RotNet", 0.4), ("random net", 0.3))
        for stage in ("conv1", "conv2")
    ]  # fmt: skip
    (panel,) = plots.study(plots.Rows(rows)).axes
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["RotNet", "random net"]
    low, high = panel.get_ylim()
    assert low < 0.3
    assert high > 0.5
    assert plots.study(plots.Rows(rows[:1])) is None
    same = [row | {"values": [0.1] * 3} for row in rows]  # whose mean is a little more
    assert plots.study(plots.Rows(same)) is not None


def test_of_several_sizes_the_last_is_told(done, tmp_path):
    file = tmp_path / "results" / "x.jsonl"
    for width, when in ((1, "2031-01-02"), (2, "2031-01-01")):
        for row in study.rows(SMALL, asked(tmp_path), {"width": width}):
            measure.append(file, row | {"when": when, "judgement": f"width {width}"})
    found = report.read(file.parent)
    said, (table, *_) = report.study(found)
    assert len(plots.latest(found)) == len(found) // 2
    assert "width 1" in "".join(said)
    assert "width 2" not in "".join(said)
    assert table.cells[0] == ["first", "x", "seconds"]
    at_once = plots.Rows(row | {"when": "2031-01-01"} for row in found)  # of one second
    assert {row["shape"]["width"] for row in plots.latest(at_once)} == {2}
    none = plots.Rows(row for row in found if row["what"] != "order")
    assert "expectations" not in "".join(report.study(none)[0])


# ---- brightness alone ----


def skies(count: int, seed: int) -> np.ndarray:
    """Pictures whose upper half is bright, with noise: uint8 [count, 32, 32, 3]."""
    draw = np.random.default_rng(seed)
    noise = draw.normal(0, 20, (count, 32, 32, 3))
    return (noise + np.linspace(200, 60, 32)[None, :, None, None]).clip(0, 255).astype(np.uint8)


def test_evened_pictures_have_one_mean_in_every_row_and_column():
    picture = skies(1, 0)[0]
    even = centric.evened(picture)
    whole = even.mean(axis=(0, 1))
    assert np.abs(even.mean(axis=0) - whole).max() < 0.2  # what rounding leaves
    assert np.abs(even.mean(axis=1) - whole).max() < 0.2
    assert np.abs(whole - (picture.mean(axis=(0, 1)) + 128) / 2).max() < 0.2
    assert even.std() > 8  # the noise, at half of its contrast


def test_brightness_tells_skies_and_nothing_where_it_is_evened(monkeypatch, tmp_path):
    pictures = {"train": skies(60, 1), "val": skies(40, 2)}
    pictures |= {f"{k} even": np.stack([*map(centric.evened, v)]) for k, v in pictures.items()}
    monkeypatch.setattr(centric, "squashed", lambda frames, side: pictures[frames])
    data = {
        centric.STREETS: ("--data", "train", "--val", "val"),
        centric.EVENED: ("--data", "train even", "--val", "val even"),
    }
    same = study.shared(STUDIES["centric cpu"], asked(tmp_path), {})
    plain, even = (row["values"][0] for row in centric.brightness(data, 32, same))
    assert plain == 1
    assert 0.1 < even < 0.4  # 160 views: chance is .25, three standard errors .1


# ---- for real ----


@pytest.mark.usefixtures("quick_runs")
def test_a_small_study_of_cifar10_runs_through_the_commands(monkeypatch, tmp_path):
    """Every kind of job, in this process, on made-up pictures: the numbers of the rows are those of the runs."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for name in cifar10.CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")

    def run(script, *words, quiet=False):
        main = {"train": train, "evaluate": evaluate}[Path(script).stem].main
        assert main([*map(str, words)]) == 0

    monkeypatch.setattr(runs, "run", run)
    # ten times as fast at this size
    monkeypatch.setattr(study, "_precision", lambda device: "fp32")
    size = cifar10.Size(
        width=0.02, pictures=20, batch=4, few_steps=2, at=(1,), labels=(1,), epochs=1, probe_epochs=1,
        blocks=(4,), rotations=(cifar10.FOUR, cifar10.EIGHT), words=("--workers", 1),
    )  # fmt: skip
    data = ("--data", tmp_path / "train", "--val", tmp_path / "test")
    of = cifar10.study_of(data, size, "noise")
    how = asked(tmp_path / "work")
    how.seeds = 1
    how.tables = [cifar10.LENGTH, cifar10.ROTATIONS, cifar10.VIEWS]
    rows = {(row["what"], row["variant"]): row for row in study.rows(of, how, {})}
    folder = next((tmp_path / "work" / "studies").iterdir())

    def summary(job: str) -> dict:
        return json.loads((folder / f"{job}-0" / "summary.json").read_text())

    eight = "rotnet-0-45-90-135-180-225-270-315"
    assert summary(eight)["chance"] == 0.125
    found = rows[cifar10.ROTATIONS, cifar10.EIGHT]
    assert found["values"] == [summary(f"{eight}-mlp")["val"]["top1_conv2"]]
    assert (summary("rotnet-4-one")["steps"], summary("rotnet-4-one")["images"]) == (5, 5 * 16)
    jobs = {"net": of.jobs["supervised"], "asked": Job(("classes",), of="net", asks=True)}
    how.tables = None
    of = Study("x", "", jobs, (Figure("by class", "net", "cat", "asked", "net.classes.cat"),))
    (row,) = study.rows(of, how, {})
    assert row["values"][0] in (0, 1)
