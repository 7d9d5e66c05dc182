"""What a GPU is asked in a quarter of an hour: the plan, its limits, and that what fails costs itself alone."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import bench_ops, bench_train, forms, gpu

ROOT = Path(__file__).parents[1]
ENV = {k: v for k, v in os.environ.items() if k not in ("COMMIT", "DIRTY", "PYTHONPATH")}
ENV |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
PLAN = gpu.plan("cuda", Path("out"), Path("pictures"))
STEPS = {step.name: step for steps in PLAN.values() for step in steps}
WORDS = {
    name: step.words if isinstance(step.words, list) else step.words([])
    for name, step in STEPS.items()
}


# ---- the plan ----


def test_limits_add_up_to_a_quarter_of_an_hour_and_a_command_to_less_than_ten_minutes():
    """With two minutes for the machine to start in; the first command with room."""
    first, rest = (sum(step.seconds for step in PLAN[name]) for name in ("first", "rest"))
    assert 400 < first <= gpu.COMMAND - 45
    assert first + rest <= gpu.WHOLE - gpu.START
    assert gpu.DRY < 180


def test_the_order_is_smoke_steps_by_form_epoch_then_the_rest():
    names = list(STEPS)
    assert names[:2] == ["tests: steps", "tests: kernels"]
    assert names[2:6] == [f"step: {form}" for form in gpu.FORMS]
    assert names[6:8] == ["epoch: the fastest", "epoch: the way out"]
    assert all(forms.words(form) for form in gpu.FORMS)
    files = {f"tests/ops/{file.name}" for file in (ROOT / "tests" / "ops").glob("test_*.py")}
    of_gpu = {file for file in files if "mark.gpu" in (ROOT / file).read_text()}
    asked = {word for words in WORDS.values() for word in words if "tests/ops/" in word}
    assert asked == of_gpu  # a file a process
    families = {words[3] for words in WORDS.values() if "benchmarks.bench_ops" in words}
    assert families == set(bench_ops.FAMILIES)


def test_each_benchmark_takes_the_words_that_it_is_given(monkeypatch, tmp_path):
    """Their own parsers read them; nothing is measured."""
    asked = []
    monkeypatch.setattr(bench_train.runs, "keep", lambda rows, given, *_: asked.append(given))
    monkeypatch.setattr(bench_train.measure, "results", lambda *_: tmp_path / "card.jsonl")
    mains = {"benchmarks.bench_ops": bench_ops.main, "benchmarks.bench_train": bench_train.main}
    benches = [words for words in WORDS.values() if words[1] in mains]
    for words in benches:
        mains[words[1]](words[2:])
    assert len(benches) == len(gpu.FORMS) + 2 + len(bench_ops.FAMILIES)
    assert {(given.device, given.quick) for given in asked} == {("cuda", False)}


@pytest.mark.parametrize("name", [name for name, words in WORDS.items() if "-k" in words])
def test_what_the_words_choose_is_there(name):
    """Each word of a pytest expression is in the name of a test, or of one of its cases."""
    words = WORDS[name]
    chosen = re.findall(r"\w+", words[words.index("-k") + 1])
    file = ROOT / words[words.index("gpu") + 1]
    files = [file] if file.is_file() else file.glob("test_*.py")
    text = "".join(each.read_text() for each in files)
    named = [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    cases = re.findall(r'id="(\w+)"', text) + re.findall(r'^ +"(\w+)": Case', text, re.MULTILINE)
    for word in set(chosen) - {"and", "or", "not"}:
        assert any(word in each for each in named + cases), word


# ---- which form's epoch is timed ----


def a_row(what, form, ms=0.0, loader="pack"):
    return {"what": what, "form": form, "p50": ms, "loader": loader}


def form_of(name, rows):
    words = STEPS[name].words(rows)
    return words[words.index("--form") + 1] if words else None


def test_the_epoch_is_of_the_fastest_step_and_has_a_way_out():
    fast = "compiled + folded + fused + graph"
    rows = [a_row("step", "eager", 15), a_row("step", fast, 9), a_row("step", "compiled", 12)]
    rows += [a_row("step", "compiled", 1, loader="held")]
    assert form_of("epoch: the fastest", rows) == fast
    assert form_of("epoch: the fastest", []) == gpu.WAY_OUT
    assert form_of("epoch: the way out", rows) == gpu.WAY_OUT
    assert form_of("epoch: the way out", [a_row("step", gpu.WAY_OUT, 9)]) == "eager"
    assert form_of("epoch: the way out", [*rows, a_row("epoch", fast)]) is None


def test_rows_of_another_day_choose_nothing(tmp_path):
    rows = [{"what": "step", "when": when} for when in ("2026-01-01T00:00:00", "2027-01-01T00:00")]
    (tmp_path / "card.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gpu.made(tmp_path, "2026-06-01T00:00:00") == rows[1:]


# ---- what fails costs itself alone ----


def python(name, seconds, code):
    return gpu.Step(name, seconds, ["-c", code])


def test_what_is_killed_fails_or_hangs_does_not_stop_the_rest(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "LEAST", 0.2)
    deaf = "import signal, time; signal.signal(2, lambda *_: None); time.sleep(9); time.sleep(9)"
    steps = [
        python("hangs", 1, "import time; time.sleep(600)"),
        python("deaf", 1, deaf),
        python("killed", 3, "import os; print('begun', flush=True); os.kill(os.getpid(), 9)"),
        python("fails", 0, "raise SystemExit(3)"),
        gpu.Step("not needed", 0, lambda rows: []),
        python("the rest", 0, "print('the rest')"),
        python("what time is left", 0, "import time; time.sleep(600)"),
    ]
    begun = time.monotonic()
    became = gpu.walk(steps, tmp_path)
    assert time.monotonic() - begun < sum(step.seconds for step in steps) + 1
    said = [each.split(",")[0] for each in became.values()]
    assert said[:2] == ["FAILED for want of time"] * 2
    assert said[2] in ("FAILED with status 137", "FAILED with status -9")
    assert said[3:] == [
        *("FAILED with status 3", "left out: not needed", "passed"),
        "broken off: no time was left",
    ]
    log = (tmp_path / "log.txt").read_text()
    said = [line for line in log.splitlines() if line in ("begun", "the rest")]
    assert said == ["begun", "the rest"]
    assert capfd.readouterr().out.split() == log.split()


def test_time_that_is_left_over_is_handed_on(tmp_path, monkeypatch):
    """And a step that comes too late for its own is left out, so that the sum holds."""
    monkeypatch.setattr(gpu, "LEAST", 0.2)
    sleeps = "import time; time.sleep(1.5)"
    quick = python("quick", 3, "pass")
    assert "passed" in gpu.walk([quick, python("long", 1, sleeps)], tmp_path)["long"]
    assert "want of time" in gpu.walk([python("long", 1, sleeps)], tmp_path)["long"]
    assert "passed" in gpu.walk([python("long", 1, sleeps)], tmp_path, seconds=4)["long"]
    monkeypatch.setattr(gpu, "LEAST", 5)
    assert gpu.walk([quick, python("late", 3, "pass")], tmp_path, seconds=4) == {
        "quick": "FAILED: no time was left", "late": "FAILED: no time was left"
    }  # fmt: skip
    monkeypatch.setattr(gpu, "LEAST", 1)
    both = [python("first", 9, sleeps), python("late", 9, "pass")]
    assert gpu.walk(both, tmp_path, seconds=1.6)["late"] == "FAILED: no time was left"


@pytest.mark.soak
@pytest.mark.parametrize("shared", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_what_failed_is_told_where_a_later_test_hangs_and_is_deaf(tmp_path, shared):
    tests = tmp_path / "test_two.py"
    hangs = "def test_b():\n    signal.signal(2, signal.SIG_IGN)\n    time.sleep(600)\n"
    fails = "import signal, time\ndef test_a():\n    assert 1 == 2, 'told'\n"
    tests.write_text(fails + hangs)
    ours = (ROOT / "tests" / "conftest.py").read_text()
    told = next(
        node
        for node in ast.parse(ours).body
        if isinstance(node, ast.FunctionDef) and node.name == "pytest_runtest_logreport"
    )
    (tmp_path / "conftest.py").write_text(ast.unparse(told))
    alone = ["-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    step = gpu.Step("two", 40, ["-m", "pytest", "-q", *alone, str(tests), *shared])
    assert "want of time" in gpu.walk([step], tmp_path)["two"]
    log = (tmp_path / "log.txt").read_text()
    assert "AssertionError: told" in log


# ---- the command ----


@pytest.fixture
def sent(tmp_path) -> Path:
    """A tree without .git, with the script alone."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy2(ROOT / "benchmarks" / "gpu.py", tmp_path / "benchmarks")
    return tmp_path


def refused(sent: Path, **env: str) -> str:
    command = [sys.executable, "benchmarks/gpu.py", "--out", "out", "--root", "benchmarks"]
    done = subprocess.run(command, cwd=sent, env=ENV | env, capture_output=True, text=True)
    assert done.returncode == 2
    return done.stderr.splitlines()[-1]


def test_what_cannot_begin_is_refused_before_anything_runs(sent):
    assert "there is no .git: set COMMIT=" in refused(sent)
    assert not (sent / "out").exists()
    text = (sent / "benchmarks" / "gpu.py").read_text()
    (sent / "benchmarks" / "gpu.py").write_text(text.replace('NEEDS = "', 'NEEDS = "absent '))
    assert "lacks absent: bring wheels of them" in refused(sent, COMMIT="abc")


def test_wheels_are_used_and_a_failure_is_the_status(tmp_path, monkeypatch, capsys):
    """And the folder of results gets few files."""
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "only_here-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("only_here.py", "there = 'in the wheel'")
    monkeypatch.setenv("COMMIT", "abc")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "NEEDS", "only_here")
    steps = [python("sees", 20, "import only_here; print(only_here.there)")]
    monkeypatch.setattr(
        gpu, "plan", lambda *_: {"first": steps, "rest": [python("no", 9, "1 / 0")]}
    )
    words = ["--out", str(tmp_path / "out"), "--root", str(tmp_path)]
    assert gpu.main(["first", *words]) == 0
    assert gpu.main(words) == 1
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["log.txt"]
    log = (tmp_path / "out" / "log.txt").read_text()
    for told in (log, capsys.readouterr().out):
        assert "in the wheel" in told
        assert "no    FAILED with status 1, " in told


@pytest.mark.soak
def test_the_whole_plan_on_a_cpu(tmp_path_factory):
    """Without .git and make, as it is sent to another machine, in small; with time for a machine that others use too."""
    sent, out = tmp_path_factory.mktemp("sent") / "fastrot", tmp_path_factory.mktemp("out")
    listed = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    done = subprocess.run(listed, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("the tree is no git checkout: what belongs to it is not known")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (sent / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, sent / name)
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--out", str(out)]
    command += ["--root", "dataprep/demo_pictures/val", "--seconds", "1200"]
    env = ENV | {"COMMIT": "abc", "DIRTY": "1"}
    done = subprocess.run(command, cwd=sent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-3000:]
    assert len(list(out.iterdir())) <= 8
    (file,) = out.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = {row["what"] for row in rows}
    assert kinds >= {"step", "epoch", "matrix product", "nce_loss", "unpack", "norm_relu_pool"}
    assert {row["loader"] for row in rows if row["what"] == "step"} == {"held", "pack"}
    assert {(row["commit"], row["dirty"]) for row in rows} == {("abc", True)}
    assert "Self CPU" in (out / "profiles.txt").read_text()
    assert re.search(r"\d+ skipped", (out / "log.txt").read_text()), (
        "the GPU's tests were not looked at"
    )
