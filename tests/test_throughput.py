"""The page of throughput: every figure is a row's and leads to it, and what a CPU lacks is told."""

import json
import re
from pathlib import Path

import pytest
import throughput_rows as made
from throughput_rows import CARD, CPU

from benchmarks import aims, figures, measure, report, throughput
from benchmarks.measure import number

RESULTS = measure.ROOT / "benchmarks" / "results"
PAGE = measure.ROOT / "benchmarks" / "reports" / "throughput.md"
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)#L(\d+)\)")
FIGURE = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
QUOTIENT = re.compile(r"\[([^\]]+)\]\(\S+\)(?: †)? / \[([^\]]+)\]\(\S+\)(?: †)? = (\S+)")
CONSTANTS = (
    aims.REFERENCE,
    aims.AIMS,
    f"(target {aims.EPOCH_S} s)",
    f"(target under {aims.WAITED:.0%})",
)


def written(tmp_path, rows):
    """The page of these rows, as Markdown; theirs is the folder `results` beside its own."""
    for row in rows:
        name = "abacus_3.jsonl" if row["gpu"] else "cpu_quill.jsonl"
        measure.append(tmp_path / "results" / name, row)
    files = sorted((tmp_path / "results").glob("*.jsonl"))
    throughput.write({file: report.newest(file) for file in files}, tmp_path / "reports", [])
    return (tmp_path / "reports" / "throughput.md").read_text()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A page of a processor and a card: its folder."""
    at = tmp_path_factory.mktemp("both")
    written(at, [*made.cpu_rows(), *made.gpu_rows()])
    return at


@pytest.fixture
def words_only(monkeypatch):
    """No plots, which take seconds."""
    monkeypatch.setattr(throughput.throughput_plots, "draw", lambda found, out: {})


# ---- every figure is a row's ----


def strangers(text, page):
    """What looks like a figure and is none of the row that it leads to, or leads nowhere; `page`: where the text lies."""
    rows = {}
    for _, file, _ in set(LINK.findall(text)):
        rows[file] = (page.parent / file).resolve().read_text().splitlines()
    found = [
        (told, file, line)
        for told, file, line in LINK.findall(text)
        if not says(json.loads(rows[file][int(line) - 1]), told)
    ]
    for one, other, quotient in QUOTIENT.findall(text):
        a, b = (float(FIGURE.findall(each)[0].replace(",", "")) for each in (one, other))
        if float(quotient.rstrip(".")) != pytest.approx(a / b, rel=0.02):
            found.append((one, other, quotient))
    return [*found, *unlinked(text, [json.loads(line) for each in rows.values() for line in each])]


def says(row, text):
    """Whether the row holds these words, or each figure among them."""
    return text in row.values() or set(FIGURE.findall(text)) <= shown(row)


def shown(row):
    """All that a row's figures may look like: as they stand, in percent, in millions and thousands of millions."""
    values = list(leaves(row))
    return {
        look
        for value in values
        for look in (number(value), f"{100 * value:.3g}", number(value / 1e6), number(value / 1e9))
    }


def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def unlinked(text, rows):
    """Lines with a digit outside links, constants, quotients and names."""
    names = {
        row[name] for row in rows for name in ("what", "variant", "gpu", "cpu") if row.get(name)
    }
    names |= {f"{row['cpu']}, {row['cores']} cores" for row in rows} | {"H200"}
    names |= {layer["name"] for row in rows for layer in row.get("layers") or ()}
    names |= {name.split("way, ")[-1] for name in names}
    names |= {figure.name for figure in figures.required()}
    names |= {figure.name for row in rows for figure, _, _ in figures.figures_of(row)}
    found = []
    for line in text.splitlines():
        rest = re.sub(r"= [\d.e+,-]+", "", LINK.sub("", line))
        rest = re.sub(r"\[(\w+)\]\(\1\.md\)", "", rest)  # a page
        for known in (*CONSTANTS, *sorted(names, key=len, reverse=True)):
            rest = rest.replace(known, "")
        if re.search(r"\d", rest):
            found.append(line)
    return found


def test_every_figure_is_a_rows(both):
    page = both / "reports" / "throughput.md"
    text = page.read_text()
    assert len(LINK.findall(text)) > 500
    assert strangers(text, page) == []


@pytest.mark.parametrize(
    ("true", "false"),
    [
        (r"\[1,933\]\(", "[1,934]("),  # a loader's rate
        (r"#L23\)", "#L22)"),  # another row's
        (r"= (\d)", r"= 9\1"),  # a quotient
        (r"The lines", "The 12 lines"),  # typed by hand
        (r"\[5\.31 times\]\([^)]*\)", "5.31 times"),  # a figure that leads nowhere
    ],
)
def test_another_figure_is_found(both, true, false):
    page = both / "reports" / "throughput.md"
    text = page.read_text()
    changed = re.sub(true, false, text, count=1)
    assert changed != text
    assert strangers(changed, page)


def test_the_page_of_this_project_holds_its_rows_figures_and_is_of_now():
    files = {file: report.newest(file) for file in sorted(RESULTS.glob("*.jsonl"))}
    drawn = {
        file.stem.removeprefix("throughput_"): file for file in PAGE.parent.glob("throughput_*.png")
    }
    scale = sorted(PAGE.parent.glob("scale_*.md"))
    text = PAGE.read_text()
    assert text == report.pages.markdown(throughput.page(files, drawn, scale), "../results")
    assert strangers(text, PAGE) == []


# ---- what there is to be ----


def cells(text):
    """Of the table of all figures: group and name -> unit and a cell for each machine."""
    lines = [
        line.strip("| ").split(" | ") for line in text.split("## Every figure")[1].splitlines()
    ]
    return {tuple(line[:2]): line[2:] for line in lines if len(line) > 4 and line[0] != "---"}


def test_the_column_of_a_gpu_is_filled_from_its_rows_alone(tmp_path, both, words_only):
    alone = cells(written(tmp_path, made.cpu_rows()))
    for figure in figures.required():
        unit, cpu, gpu = alone[figure]
        assert unit
        assert LINK.match(cpu), figure
        assert gpu == throughput.NOT_MEASURED
    full = cells((both / "reports" / "throughput.md").read_text())
    assert full[figures.ALONE, "beton"][1] == alone[figures.ALONE, "beton"][1]
    assert "abacus_3.jsonl" in full[figures.ALONE, "beton"][2]
    form = "compiled + folded + fused + graph, pack"
    assert full[figures.RATE, form][1] == throughput.OF_A_GPU
    assert full[figures.IDLE, "eager, pack"][1:] == [
        throughput.OF_A_GPU,
        "[3.7](../results/abacus_3.jsonl#L29)",
    ]
    assert full[figures.RATE, "eager + fused, held"][2] == throughput.NOT_MEASURED


def test_a_figure_that_a_cpu_lacks_is_named():
    rows = [*made.cpu_rows(), *made.gpu_rows()]
    assert figures.missing(lined(rows)) == []
    for figure in figures.required():
        lacks = [row for row in rows if row["gpu"] or not tells(row, figure)]  # the card has it
        assert figure in figures.missing(lined(lacks))


def tells(row, figure):
    return figure in [each for each, _, _ in figures.figures_of(row)]


def lined(rows):
    return [{**row, "file": "x.jsonl", "line": i} for i, row in enumerate(rows, 1)]


def test_strict_ends_with_a_status_and_names_what_is_missing(
    tmp_path, capsys, monkeypatch, words_only
):
    rows = made.cpu_rows()
    for name, some in (("all", rows), ("few", [r for r in rows if r["what"] != "copy"])):
        for row in some:
            measure.append(tmp_path / name / "cpu_quill.jsonl", row)
    monkeypatch.setattr(report.plots, "draw", lambda *of: [])
    asked = ["--out", str(tmp_path / "reports"), "--strict", "--results"]
    assert report.main([*asked, str(tmp_path / "all")]) == 0
    assert "not measured on a CPU" not in capsys.readouterr().out
    assert report.main([*asked, str(tmp_path / "few")]) == 1
    assert capsys.readouterr().out.count("not measured on a CPU: Ceilings: copy\n") == 1
    assert (
        "Missing on the CPU: Ceilings: copy."
        in (tmp_path / "reports" / "throughput.md").read_text()
    )


def test_the_column_of_a_cpu_is_full_in_this_project():
    files = {file: report.newest(file) for file in RESULTS.glob("*.jsonl")}
    assert figures.missing(figures.read(files)) == []


# ---- one file that opens from disk ----


def test_the_html_holds_its_pictures_and_lines(both):
    text = (both / "reports" / "throughput.html").read_text()
    outside = re.sub(r"<pre.*?</pre>", "", text, flags=re.S)
    assert not re.search(r"https?:|src=\"(?!data:)|<script|<link|url\(", outside)
    assert text.count('src="data:image/png;base64,') == 6
    led, there = (set(re.findall(kind, text)) for kind in (r'href="#([^"]+)"', r'id="([^"]+)"'))
    assert led == there
    for name, line in re.findall(r'<pre id="([^"]+)">(.*?)</pre>', text, re.S):
        file, at = name.rsplit("-L", 1)
        lines = (both / "results" / file).read_text().splitlines()
        assert json.loads(line.replace("&quot;", '"').replace("&#x27;", "'")) == json.loads(
            lines[int(at) - 1]
        )


def test_it_leads_to_the_page_of_a_billion_pictures(both):
    files = {file: report.newest(file) for file in (both / "results").glob("*.jsonl")}
    page = throughput.page(files, {}, [Path("scale_x.md")])
    assert "\n\n[scale_x](scale_x.md)\n\n" in report.pages.markdown(page)
    assert '<a href="scale_x.html">scale_x</a>' in report.pages.as_html(page)


def test_pictures_lie_beside_the_markdown(both):
    text = (both / "reports" / "throughput.md").read_text()
    drawn = re.findall(r"!\[\w+\]\((\w+\.png)\)", text)
    assert len(drawn) == 6
    assert all((both / "reports" / name).stat().st_size > 10_000 for name in drawn)


# ---- rows of all kinds ----


def test_the_newest_row_counts_and_old_kinds_do_no_harm(tmp_path):
    rows = [row for row in made.cpu_rows() if row["what"] in ("loader", "copy")]
    old = {**rows[0], "p50": 7.0, "when": "2001-01-01T00:00:00+00:00", "shape": {"batch": 1}}
    step = {**rows[0], "theme": "train", "what": "step", "variant": "x eager, synthetic"}
    part = {**step, "what": "step part", "variant": "x eager, synthetic: views"}
    text = written(tmp_path, [*rows, old, step, part])
    assert cells(text)[figures.ALONE, "beton"][1].startswith("[1,933]")
    assert "synthetic: views" not in text
    assert text.count(f"{throughput.NOT_MEASURED}.") == 5  # plots
    assert f"{CPU}, 2 cores: no step of {aims.PRESET} is measured." in text


def test_what_is_not_committed_extrapolated_or_modelled_is_marked(tmp_path, words_only):
    rows = [row | {"dirty": row["what"] == "copy"} for row in made.cpu_rows()]
    table = cells(written(tmp_path, rows))
    assert table[figures.CEILING, "copy"][1].endswith(") †")
    assert table[figures.CEILING, "matrix product"][1].endswith(")")
    assert table[figures.EPOCH, "eager, pack"][1].endswith(", extrapolated")
    assert table[figures.BASELINE, "num_workers 8: epoch"][1].endswith(", extrapolated")
    assert table[figures.BASELINE, "num_workers 8: images/s"][1].endswith(")")
    assert table[figures.SCALING, "64 GPUs: images/s"][1].endswith(", modelled")


# ---- what to think of it ----


def said(rows):
    text = " ".join(throughput.verdicts(figures.machines(lined(rows))))
    return re.sub(r"\[\[\S+ ([^\]]+)\]\]", r"\1", text)


def changed(rows, what, **fields):
    return [row | fields if row["what"] == what else row for row in rows]


def test_it_says_what_binds():
    rows = made.cpu_rows()
    assert f"{CPU}, 2 cores: bound by memory: data is waited for 0.8 % of the step" in said(rows)
    assert "bound by arithmetic" in said(changed(rows, "roofline", matrix_ms=40.0))
    assert "bound by decode" in said(changed(rows, "step", wait_share=0.6))
    assert "no floor of its size" in said(changed(rows, "roofline", width=1.0))
    gpu = made.gpu_rows()
    assert "the GPU is idle for 3.7 %" in said(gpu)
    assert "bound by launch" in said(changed(gpu, "step", idle_share=0.5))


def test_it_says_how_much_quicker_where_sizes_agree():
    rows = made.cpu_rows()
    assert (
        "over the original's way, num_workers 8: 1,014 images/s / 43 images/s = 23.6 times"
        in said(rows)
    )
    assert "which has another batch" in said(changed(rows, "baseline", batch=16))
    assert "of another size" in said(changed(rows, "baseline", width=1.0))
    assert "at another commit" in said(changed(rows, "baseline", commit="e" * 40))
    assert "3.95 times as quick as the original's way, num_workers 8" in said(rows)


@pytest.mark.parametrize(
    ("seconds", "grade"),
    [(59.0, "met"), (89.0, "MISSED, very good"), (119.0, "MISSED, good"), (121.0, "MISSED")],
)
def test_it_says_which_target_is_missed(seconds, grade):
    told = said(changed(made.gpu_rows(), "epoch", p50=seconds))
    assert f"{grade}: an epoch on {CARD}, eager, pack: {seconds:.3g} s (target 60 s)." in told
    assert "eager with shards" in told
    assert "eager with pack" not in told


@pytest.mark.parametrize(
    "other", [{"extrapolated": True}, {"images": 5}, {"validation": False}, {"width": 0.5}]
)
def test_only_a_whole_epoch_on_a_gpu_meets_the_target(other):
    told = said(changed(made.gpu_rows(), "epoch", p50=10.0, **other))
    assert "Not measured: an epoch on a GPU (target 60 s)." in told
    assert "met:" not in told
    assert "Not measured: an epoch on a GPU" in said(made.cpu_rows())


def test_a_billion_pictures_have_a_page_from_all_rows_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(
        report.billion, "parts", lambda rows: [("text", f"of {len(rows)} rows, {rows[0]['line']}")]
    )
    (loader, *_) = made.cpu_rows()
    scale = made.made("order", "a billion", 3.0, "us a place", gpu=False, theme="scale")
    for row in (loader, scale):
        measure.append(tmp_path / "cpu_quill.jsonl", row)
    monkeypatch.setattr(report.plots, "draw", lambda *of: [])
    pages = report.write(tmp_path / "cpu_quill.jsonl", tmp_path / "reports")
    (page,) = (page for page in pages if page.name.startswith("scale_") and page.suffix == ".md")
    assert "\n\nof 2 rows, 1\n\n" in page.read_text()
