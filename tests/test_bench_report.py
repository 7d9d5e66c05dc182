"""Pages and the README's table are made from rows: no figure is typed by hand, none is of an older row, all are of now."""

import copy
import json
import re

import pytest
import torch

from benchmarks import measure, plots, report, versions
from fastrot.config import UsageError

HERE = measure.ROOT / "benchmarks"
ROWS = report.read(HERE / "results")
README = (measure.ROOT / "README.md").read_text()
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
SETTINGS = {"shape", "batch", "size", "width", "cores", "line", "reps", "step", "epoch", "target"}


@pytest.fixture
def words_only(monkeypatch):
    """No plots, which take seconds."""
    for name, topic in report.TOPICS.items():
        monkeypatch.setitem(report.TOPICS, name, topic._replace(draw=None))


def others(value, key=""):
    """The same rows, every figure another: 1.7 times and a little more."""
    if isinstance(value, dict):
        return {k: v if k in SETTINGS else others(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [others(each) for each in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return type(value)(value * 1.7 + 1)


def changed(rows):
    return plots.Rows(others(dict(row)) for row in rows)


def test_the_newest_row_counts_in_the_words_of_today(tmp_path):
    row = {"what": "turned_views", "variant": "x", "shape": {"turns": 4}, "commit": "f" * 40}
    lines = [row | {"when": f"2031-0{month}", "p50": month} for month in (1, 3, 2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (found,) = report.read(tmp_path)
    assert (found["what"], found["shape"], found["line"]) == ("rotated_views", {"rotations": 4}, 2)
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"commit": None}))
    with pytest.raises(UsageError, match=r"line 1 of .*a\.jsonl has no commit"):
        report.read(tmp_path)


def test_the_readme_shows_what_the_results_say():
    table = README.split(report.BEGIN)[1].split(report.END)[0]
    assert table == report.readme_table(ROWS)
    assert len(table.split("\n\n")[0].splitlines()) <= 2 + 12
    for script in re.findall(r"`python (?:-m )?(\S+)`", table):
        assert (measure.ROOT / f"{script.removesuffix('.py').replace('.', '/')}.py").exists()


def test_what_runs_have_by_default_is_what_the_results_say():
    assert json.loads(report.FORMS.read_text()) == report.fastest_forms(ROWS)


def a_step(form, rate, **more):
    row = {"what": "step", "gpu": "Card", "preset": measure.PRESET, "form": form, "loader": "pack"}
    row |= {"images_per_s": rate, "p50": 192e3 / rate, "dtype": "bf16", "commit": "c", "when": "w"}
    return row | {"shape": {"bank": measure.IMAGENET}} | more


def test_the_fastest_form_that_learns_as_well_is_a_gpus_default():
    plain, quick = a_step("eager", 9.0), a_step("compiled + fused", 10.0)
    none = [a_step("compiled", 20.0, **more) for more in (
        {"gpu": None}, {"loader": "held"}, {"shape": {"bank": 100}}, {"preset": "rotnet-alexnet"},
    )]  # fmt: skip
    found = report.fastest_forms(plots.Rows([quick, plain, *none]))
    assert found.keys() == {"Card"}
    assert found["Card"]["form"] == "compiled + fused"
    assert {k for k, v in found["Card"]["knobs"].items() if v is True} == {
        "compile",
        "backbone.fuse",
    }
    assert (found["Card"]["backbone"], found["Card"]["precision"]) == ("AlexNet", "bf16")
    learning = {"what": "learning", "gpu": "Card", "form": "bf16 compiled + fused", "target": 0.4}
    learning |= {"better": "higher"}
    for reached, form in ((0.5, "compiled + fused"), (0.3, "eager")):
        learnt = plots.Rows([quick, plain, learning | {"p50": 0.5}, learning | {"p50": reached}])
        assert report.fastest_forms(learnt)["Card"]["form"] == form


def test_no_figure_of_the_readme_is_typed_by_hand():
    """Where all rows are others, no figure is left."""
    now, then = (
        {
            figure
            for line in report.readme_table(rows).split("\n\n")[0].splitlines()[2:]
            for figure in NUMBER.findall(line.split(" | ")[1])
        }
        for rows in (ROWS, changed(ROWS))
    )
    assert len(now) >= 15
    assert not now & then


@pytest.mark.parametrize("name", report.topics(ROWS))
def test_no_figure_of_a_page_is_typed_by_hand(name):
    """A cell that stands under the same names in both has another figure."""
    machines = report.topics(ROWS)[name]
    for rows in machines.values():
        tables, again = (list(report.TOPICS[name].of(each)[1]) for each in (rows, changed(rows)))
        assert sum(len(table.cells) for table in tables) > 2
        for table, other in zip(tables, again, strict=True):
            for line, beside in zip(table.cells[1:], other.cells[1:], strict=True):
                for cell, there in zip(line[1:], beside[1:], strict=True):
                    if NUMBER.match(cell) and cell not in ("0", "0.0%"):
                        assert cell != there, line


@pytest.mark.parametrize("name", report.topics(ROWS))
def test_the_page_is_of_now_and_its_picture_lies_beside_it(name, words_only):
    reports = HERE / "reports"
    text = (reports / f"{name}.md").read_text()
    machines = report.topics(ROWS)[name]
    assert text == report.page(name, machines, reports, "../results")
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == (
        0
        if name in ("reading", "versions", "neighbours")
        else len(machines)  # those are figures alone
    )
    assert all((reports / each).stat().st_size > 5_000 for each in pictures)
    assert f"]({name}.md)" in (reports / "README.md").read_text()


def test_a_table_names_the_lines_that_it_is_made_from(tmp_path, words_only):
    (one, *_) = report.topics(ROWS)["demo"].values()
    latest = max(one, key=lambda row: row["when"])
    one = [row for row in one if row["commit"] == latest["commit"]]
    table = report.markdown(report.figures(one), "../results")
    lines = sorted(row["line"] for row in one)
    assert f"lines {lines[0]}-{lines[-1]}" in table
    assert report.ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
    assert "†" not in table
    assert "†: measured with changes" in report.markdown(
        report.figures([one[0] | {"dirty": True}]), ""
    )
    assert "at most 6 minutes: met" in table
    assert "MISSED" in report.markdown(report.figures([one[0] | {"p50": 9.0}]), "")


@pytest.mark.parametrize("name", report.topics(ROWS))
def test_a_topic_whose_rows_are_few_has_a_page_all_the_same(name, tmp_path, words_only):
    (rows, *_) = report.topics(ROWS)[name].values()
    for kind in {(row["what"], row["variant"]) for row in rows}:
        for few in (
            [row for row in rows if (row["what"], row["variant"]) != kind],
            [row for row in rows if (row["what"], row["variant"]) == kind],
        ):
            if few:
                assert report.page(name, {"here": plots.Rows(few)}, tmp_path, "results")


def test_pictures_are_drawn_for_each_machine(tmp_path):
    """A second machine, of a GPU, has its own; a topic without rows to draw has none."""
    card = [copy.deepcopy(row) | {"gpu": "Abacus 3"} for row in ROWS if row.get("theme") == "cifar"]
    machines = report.topics(plots.Rows([*ROWS, *card]))["cifar"]
    text = report.page("cifar", machines, tmp_path, "results")
    assert "## Abacus 3" in text
    assert len(list(tmp_path.glob("*.png"))) == 2
    for name, machines in report.topics(ROWS).items():
        for rows in machines.values():
            assert report.TOPICS[name].draw is None or report.TOPICS[name].draw(rows)
            assert report.TOPICS[name].draw is None or not report.TOPICS[name].draw(plots.Rows())


def test_tests_are_counted_from_what_pytest_wrote(tmp_path):
    for name, counts in (("a", (9, 2, 1, 1)), ("b", (100, 0, 0, 0))):
        kinds = zip(("tests", "skipped", "failures", "errors"), counts, strict=True)
        suite = "".join(f' {kind}="{count}"' for kind, count in kinds)
        (tmp_path / name).write_text(f"<testsuites><testsuite{suite}/></testsuites>")
    assert not versions.main(
        ["old", *(str(tmp_path / n) for n in "ab"), "--out", str(tmp_path / "c.jsonl")]
    )
    (row,) = report.read(tmp_path)
    assert (row["p50"], row["ran"], row["skipped"], row["variant"]) == (105, 107, 2, "old")
    (line,) = [
        x
        for x in report.readme_table(plots.Rows([row | {"dirty": False}])).splitlines()
        if "make matrix" in x
    ]
    assert f"torch {torch.__version__.split('+')[0]} " in line
    assert "| 105 of 107 |" in line
