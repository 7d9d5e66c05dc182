"""`make gpu` from its first line to its last on a machine without .git, .venv or GPU: what a GPU is then asked for once."""

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
FROM = {"COMMIT", "DIRTY", "OUT", "DEVICE", "PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
ENV = {k: v for k, v in os.environ.items() if k not in FROM} | {"CUDA_VISIBLE_DEVICES": ""}


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
    return to


def make_gpu(copy: Path, *settings: str) -> subprocess.CompletedProcess:
    command = ["make", "gpu", f"PYTHON={sys.executable}", "DEVICE=cpu", *settings]
    return subprocess.run(
        command, cwd=copy, env=ENV, capture_output=True, text=True, timeout=SECONDS
    )


@pytest.mark.slow
def test_the_whole_path_runs_without_a_gpu(copy, tmp_path):
    out = tmp_path / "out"
    done = make_gpu(copy, "COMMIT=abc", "DIRTY=1", f"OUT={out}")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert not (copy / ".venv").exists()
    assert re.search(r"\d+ skipped", done.stdout), "the GPU's tests were not looked at"
    (file,) = out.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = {row["what"] for row in rows}
    assert kinds >= {"turned_views", "unpack", "loader", "first batch", "memory"}
    assert {"beton", "pack"} <= {row["variant"] for row in rows if row["what"] == "loader"}
    assert kinds >= {"nce_loss", "random gather", "update_rows", "extra memory"}
    assert kinds >= {"matrix product", "bank's share of a step", "step part", "step", "run"}
    parts = {row["variant"].split(": ")[1] for row in rows if row["what"] == "step part"}
    assert parts == {"views", "forward", "losses", "nce", "backward", "optimiser", "bank", "rest"}
    seen = {row["variant"].split(", ")[1] for row in rows if row["what"] == "step"}
    assert seen == {"one batch", "synthetic", "beton"}
    assert {row["variant"] for row in rows if row["what"] == "run"} == {
        "decoupling-alexnet",
        "demo",
    }
    assert {(row["commit"], row["dirty"]) for row in rows} == {("abc", True)}
    assert "Self CPU" in (out / "profile_eager.txt").read_text()


def test_a_row_without_a_commit_is_refused_before_anything_runs(copy, tmp_path):
    done = make_gpu(copy, f"OUT={tmp_path / 'out'}")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("fastrot: ")]
    assert len(told) == 1
    assert "COMMIT=" in told[0]
    assert not (tmp_path / "out").exists()


def test_the_time_limits_add_up_to_less_than_nine_and_a_half_minutes():
    """Each with the five seconds that a command has to clean up in; of two branches the longer one counts."""
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    branches = re.findall(r"then\n(.*?)\nelse\n(.*?)\nfi", script, re.DOTALL)
    spent = sum(map(_limits, [script]))
    spent -= sum(min(map(_limits, pair)) for pair in branches)
    assert 400 < spent < SECONDS


def _limits(script: str) -> int:
    return sum(int(limit) + 5 for limit in re.findall(r"^\s*within (\d+) ", script, re.MULTILINE))


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
