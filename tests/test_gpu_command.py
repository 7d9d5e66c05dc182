"""`make gpu` from its first line to its last on a machine without .git, .venv or GPU: what a GPU is then asked for once."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from truth import photo

ROOT = Path(__file__).parents[1]
SECONDS = 9.5 * 60
FROM = {
    "COMMIT",
    "DIRTY",
    "OUT",
    "DEVICE",
    "GPU_PART",
    "PYTHON",
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
}
ENV = {k: v for k, v in os.environ.items() if k not in FROM}
ENV |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # other tests may keep the cores busy


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The files of this tree, as they would be sent to another machine, with a few pictures in slice/."""
    to = tmp_path_factory.mktemp("sent") / "fastrot"
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
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    for i in range(140):
        folder = to / "slice" / "imagenet-sample" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(i, 240, 260)).save(folder / f"{i}.jpg")
    for part, i in itertools.product(("train", "val"), range(40)):
        folder = to / "slice" / "imagenette128" / part / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(i, 128, 130)).save(folder / f"{i}.jpg")
    return to


def make_gpu(copy: Path, *settings: str, goal: str = "gpu") -> subprocess.CompletedProcess:
    command = ["make", goal, f"PYTHON={sys.executable}", "DEVICE=cpu", *settings]
    return subprocess.run(
        command, cwd=copy, env=ENV, capture_output=True, text=True, timeout=SECONDS
    )


def rows_in(out: Path) -> list[dict]:
    (file,) = out.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def values(rows: list[dict], what: str, name: str = "variant") -> set:
    return {row[name] for row in rows if row["what"] == what}


@pytest.mark.soak
def test_the_whole_path_runs_without_a_gpu(copy, tmp_path):
    out = tmp_path / "out"
    done = make_gpu(copy, "COMMIT=abc", "DIRTY=1", f"OUT={out}")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert not (copy / ".venv").exists()
    assert re.search(r"\d+ skipped", done.stdout), "the GPU's tests were not looked at"
    rows = rows_in(out)
    kinds = {row["what"] for row in rows}
    assert kinds >= {"rotated_views", "unpack", "loader", "first batch", "memory"}
    assert {"beton", "pack"} <= values(rows, "loader")
    assert kinds >= {"nce_loss", "random gather", "update_rows", "extra memory"}
    assert kinds >= {"matrix product", "copy", "roofline", "bank's share of a step", "step", "run"}
    assert kinds >= {"baseline", "communication", "scaling", "learning"}
    assert values(rows, "step", "loader") == {"held", "pack"}
    assert values(rows, "roofline", "preset") == {"decoupling-alexnet"}
    assert values(rows, "run") == {"decoupling-alexnet", "demo"}
    assert {(row["commit"], row["dirty"]) for row in rows} == {("abc", True)}
    assert "Self CPU" in (out / "profiles.txt").read_text()


@pytest.mark.soak
def test_the_epoch_runs_without_a_gpu_and_says_that_it_is_extrapolated(copy, tmp_path):
    out = tmp_path / "out"
    done = make_gpu(copy, "COMMIT=abc", "DIRTY=0", f"OUT={out}", goal="gpu-epoch")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (row,) = rows_in(out)
    assert (row["what"], row["preset"], row["images"]) == ("epoch", "decoupling-alexnet", 1_281_167)
    assert (row["loader"], row["extrapolated"], row["validation"]) == ("pack", True, True)
    assert row["different_pictures"] == 140


def test_a_row_without_a_commit_is_refused_before_anything_runs(copy, tmp_path):
    done = make_gpu(copy, f"OUT={tmp_path / 'out'}")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("fastrot: ")]
    assert len(told) == 1
    assert "COMMIT=" in told[0]
    assert not (tmp_path / "out").exists()


def asked_of(copy: Path, tmp_path: Path, part: str) -> list[tuple[int, list[str]]]:
    """Limit and arguments of each command that a part gives a GPU machine; none of them is run."""
    told = tmp_path / f"{part}.txt"
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "timeout").write_text(f'#!/bin/sh\nshift 2\necho "$@" >>{told}\n')
    (tools / "timeout").chmod(0o755)
    env = ENV | {"COMMIT": "abc", "DIRTY": "1", "PATH": f"{tools}:{ENV['PATH']}"}
    script = ["sh", str(copy / "benchmarks" / "gpu.sh"), "true", str(tmp_path), "cuda", part]
    subprocess.run(script, env=env, check=True, capture_output=True, timeout=300)
    lines = [line.split() for line in told.read_text().splitlines()]
    return [(int(limit), rest) for limit, _, *rest in lines]


@pytest.mark.parametrize("part", ["train", "tests", "ops", "learn", "epoch"])
def test_the_limits_of_a_part_add_up_to_less_than_nine_and_a_half_minutes(copy, tmp_path, part):
    """Each with the five seconds that a command has to clean up in, and wheels to be installed before."""
    asked = asked_of(copy, tmp_path, part)
    assert 300 < 30 + sum(limit + 5 for limit, _ in asked) < SECONDS
    assert all("--quick" not in rest for _, rest in asked if "benchmarks.bench_loaders" not in rest)


def test_the_parts_ask_for_every_figure_once(copy, tmp_path):
    parts = {"train", "tests", "ops", "learn", "epoch"}
    asked = [rest for part in parts for _, rest in asked_of(copy, tmp_path, part)]
    assert len({" ".join(rest) for rest in asked}) == len(asked)
    modules = {rest[rest.index("-m") + 1] for rest in asked}
    assert modules == {"pytest", "fastrot.doctor"} | {
        f"benchmarks.{name}"
        for name in (
            "roofline",
            "bench_train",
            "baseline",
            "scaling",
            "bench_ops",
            "bench_loaders",
            "bench_learning",
        )
    }
    makefile = (ROOT / "Makefile").read_text()
    (default,) = re.findall(r"^GPU_PART \?= (.*)$", makefile, re.MULTILINE)
    assert {*default.split(), "epoch"} == parts


def test_what_strikes_a_limit_does_not_stop_the_rest(tmp_path):
    """The script's own `within`, with commands of ours."""
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    (within,) = re.findall(r"^within\(\).*?^}$", text, re.MULTILINE | re.DOTALL)
    script = (
        f"failed=0 patience=1\n{within}\nwithin 1 sleep 30\nwithin 5 echo the rest\nexit $failed\n"
    )
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "status 124 from: sleep 30" in done.stdout
    assert done.stdout.splitlines()[-1] == "the rest"
