"""What a GPU that is there for a quarter of an hour is asked, the most important first; `make gpu-dry` walks it on a CPU.

    python benchmarks/gpu.py [first|rest] [--out FOLDER] [--device cuda|cpu] [--root FOLDER] [--seconds N]

    first  smoke, a step in each of a few forms, an epoch in the fastest of them: one command of under ten minutes
    rest   the ops' tests by file, numbers in half precision, the ops' times by family: what is left of the time

Each step of the plan is a process of its own: an error that sticks to CUDA, or a form that does not compile, costs itself
alone. A step must end by the sum of its own seconds and of those before it, so that what ends early leaves its time to what
follows, and all together never outrun the sum; a step of 0 seconds has only what others left. SIGINT ends it, and SIGKILL if
it does not hear, as where a kernel hangs: pytest has told by then what failed (tests/conftest.py). FOLDER gets rows as they
are made, log.txt and profiles.txt.

Standard library alone; neither make, .git (COMMIT=... DIRTY=0 or 1 stand in for it) nor a network is needed: wheels/ holds
packages that the machine lacks (make wheels), slice/ pictures (make slice).
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WHOLE, START = 900, 120  # seconds: in all, and of these until the machine answers
COMMAND = 600  # seconds that one command takes at most
GRACE, LEAST = 10, 5  # seconds: that a step has to end in, at most; under which none is begun
ON_A_CPU, DRY = 30, 160  # seconds there: of any step, and of all together
NEEDS = "torch torchvision numpy PIL cv2 simplejpeg tyro rich tensorboard matplotlib yaml jaxtyping beartype pytest"
WAY_OUT = "eager + folded + fused + graph"
# of a step, with their seconds; the first also prepares the pictures
FORMS = {"eager": 45, WAY_OUT: 35, "compiled + folded + fused + graph": 50, "compiled": 40}
TELLING = "waits or does_not_wait or pack or bank_on"  # tests of steps that compile no network
Rows = list[dict[str, Any]]


class Step(NamedTuple):
    """A process of the plan."""

    name: str
    seconds: int
    words: list[str] | Callable[[Rows], list[str]]  # for Python; by rows: none where not needed


def plan(device: str, out: Path, root: Path) -> dict[str, list[Step]]:
    """The steps of each part. On a CPU the same in small, without graphs and what takes long to compile."""
    gpu, of = device == "cuda", ["--device", device]
    pictures, quick = ["--root", str(root)], [] if gpu else ["--quick"]
    kept = ["--out", str(out), *quick]
    shared = ["-n", "8"] if gpu and importlib.util.find_spec("xdist") else []
    doctor = ["-m", "fastrot.doctor", str(root), "--preset", "decoupling-alexnet", *of]
    doctor += [] if gpu else ["--seconds", "5", "--batch", "8", "--image-size", "64"]

    def tests(name: str, seconds: int, file: str, *words: str) -> Step:
        return Step(f"tests: {name}", seconds, ["-m", "pytest", "-q", "-m", "gpu", file, *words])

    def trained(*words: str, form: str) -> list[str]:
        form = form if gpu else form.replace(" + graph", "")
        if not gpu and "compiled" in form:
            return []
        return ["-m", "benchmarks.bench_train", *words, form, *of, *pictures, *kept]

    def way_out(rows: Rows) -> list[str]:
        if any(row["what"] == "epoch" for row in rows):
            return []
        return trained("--epoch", "--form", form="eager" if fastest(rows) == WAY_OUT else WAY_OUT)

    def ops(name: str, seconds: int) -> Step:
        words = ["-m", "benchmarks.bench_ops", "--only", name, *of, *kept]
        return Step(f"ops: {name}", seconds, words)

    steps = [
        Step(f"step: {form}", seconds, trained("--loaders", "held", "pack", "--forms", form=form))
        for form, seconds in FORMS.items()
    ]
    parts = {
        "first": [
            tests("steps", 55, "tests/test_gpu.py", "-k", f"({TELLING}) and not quick", *shared),
            tests("kernels", 35, "tests/ops", "-k", "paper or alexnets_sizes or waits", *shared),
            *steps,
            Step("epoch: the fastest", 180, lambda rows: trained("--epoch", "--form", form=fastest(rows))),
            Step("epoch: the way out", 110, way_out),
        ],
        "rest": [
            tests("rotate", 30, "tests/ops/test_rotate.py", *shared),  # 182 of them
            tests("nce", 35, "tests/ops/test_nce.py", *shared),
            tests("norm", 20, "tests/ops/test_norm.py", *shared),
            tests("blocks", 15, "tests/ops/test_blocks.py"),
            tests("rows", 15, "tests/ops/test_rows.py", "tests/ops/test_angles.py", "tests/ops/test_augment.py"),
            tests("philox", 10, "tests/ops/test_philox.py"),
            tests("numbers", 30, "tests/test_numerics.py", *shared),
            *(ops(name, 25) for name in ("unpack", "norm", "nce")),
            *(ops(name, 0) for name in ("views", "bank")),
            tests("runs", 0, "tests/test_gpu.py", "-k", f"not ({TELLING}) or quick", *shared),
            Step("roofline", 0, ["-m", "benchmarks.roofline", *of, *kept]),
            Step("doctor", 0, doctor),
        ],
    }  # fmt: skip
    if not gpu:
        for name, each in parts.items():
            parts[name] = [
                step._replace(seconds=min(step.seconds, ON_A_CPU)) for step in in_one(each)
            ]
    return parts


def in_one(steps: list[Step]) -> list[Step]:
    """The same steps, their tests in one process, the first: where there is no GPU, each of them is skipped."""
    tests: list[Any] = [step for step in steps if step.name.startswith("tests: ")]
    name = "tests: " + ", ".join(step.name.removeprefix("tests: ") for step in tests)
    files = dict.fromkeys(step.words[5] for step in tests)
    whole = tests[0]._replace(name=name, words=[*tests[0].words[:5], *files])
    return [whole, *(step for step in steps if step not in tests)]


def fastest(rows: Rows) -> str:
    """The form whose step from a pack took least; without any, the one that compiles nothing."""
    steps = [row for row in rows if row["what"] == "step" and row["loader"] == "pack"]
    return min(steps, key=lambda row: row["p50"], default={"form": WAY_OUT})["form"]


def made(out: Path, since: str) -> Rows:
    """The rows in a folder that were measured from a moment on."""
    lines = (line for file in out.glob("*.jsonl") for line in file.read_text().splitlines())
    return [row for row in map(json.loads, lines) if row["when"] >= since]


def walk(
    steps: Iterable[Step],
    out: Path,
    seconds: float | None = None,
    became: dict[str, str] | None = None,
) -> dict[str, str]:
    """Run the steps; what became of each, by its name: in `became` as it becomes known.

    `seconds`: in all. What is more than the steps' own is shared out among them; with less the last go without.
    """
    steps, begun, ends = list(steps), time.monotonic(), 0.0
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    own, became = sum(step.seconds for step in steps), {} if became is None else became
    seconds = seconds or own
    for name, share, words in steps:
        ends = min(ends + share * max(1, seconds / own), seconds)
        at = time.monotonic()
        left, words = begun + ends - at, words(made(out, since)) if callable(words) else words
        if not words or left < LEAST:
            why = "FAILED: no time was left" if share else "left out: no time was left"
            became[name] = why if words else "left out: not needed"
            continue
        grace = min(GRACE, left / 5)
        status = run(words, out / "log.txt", left - grace, grace)
        took = time.monotonic() - at
        said = f"FAILED with status {status}" if status else "passed"
        if status == 124 or (status and took > left - grace):  # by SIGINT, by SIGKILL
            said = "FAILED for want of time" if share else "broken off: no time was left"
        became[name] = f"{said}, {took:.0f} s of {left:.0f}"
    return became


def run(words: list[str], log: Path, seconds: float, grace: float) -> int:
    """Python's status with these words, in so many seconds; what it says goes into the log, and then here."""
    limit = ["timeout", "-s", "INT", "-k", f"{grace:.1f}", f"{seconds:.1f}"]
    with log.open("ab", buffering=0) as said:
        before = said.tell()
        said.write(f"\n$ python {' '.join(words)}\n".encode())
        command = [*limit, sys.executable, *words]
        child = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        try:
            status = child.wait()
        except BaseException:
            child.send_signal(signal.SIGINT)  # which timeout passes on
            child.wait()
            raise
    print(log.read_bytes()[before:].decode(errors="replace"), flush=True)
    return status


def main(argv: list[str] | None = None) -> int:
    """1 where a step failed, 2 where nothing could begin."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("first", "rest"), help="default: both")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--root", type=Path, default=ROOT / "slice" / "imagenet-sample")
    parser.add_argument("--seconds", type=float, help="in all; default: the plan's")
    asked = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's & has commands ignore the first
        signal.signal(number, signal.default_int_handler)
    if not (os.environ.get("COMMIT") or (ROOT / ".git").exists()):
        parser.error("rows need a commit, and there is no .git: set COMMIT=... and DIRTY=0 or 1")
    if not asked.root.is_dir():
        parser.error(f"--root {asked.root} is no folder of pictures: make slice, or name another")
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as site:
        for wheel in (ROOT / "wheels").glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(site)
        sys.path.insert(0, site)
        if lacks := [name for name in NEEDS.split() if not importlib.util.find_spec(name)]:
            parser.error(
                f"{sys.executable} lacks {', '.join(lacks)}: bring wheels of them (make wheels)"
            )
        path = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
        os.environ |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        parts = plan(asked.device, out, asked.root.resolve())
        steps = parts.get(asked.part) or parts["first"] + parts["rest"]
        became = dict[str, str]()
        try:
            walk(steps, out, asked.seconds or (DRY if asked.device == "cpu" else None), became)
        except KeyboardInterrupt:
            became["the rest"] = "FAILED: interrupted"
    wide = max(map(len, became))
    table = "".join(f"{name:{wide}}  {what}\n" for name, what in became.items())
    print(table)
    with (out / "log.txt").open("a") as log:
        log.write(f"\n{table}")
    return int("FAILED" in table)


if __name__ == "__main__":
    sys.exit(main())
