"""A conversion that is killed, shared or out of space gives the bytes of one that was left alone."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from truth import photo

from fastrot import entry
from fastrot.config import RunError, UsageError
from fastrot.data.beton import write
from fastrot.data.prepare import parts as part_files
from fastrot.data.prepare import ranks
from fastrot.data.prepare.convert import convert, results_of
from fastrot.data.prepare.convert import run as run_conversion
from fastrot.data.prepare.encode import EncodeSpec, encode_all

HERE = Path(__file__).parent
SMALL_PARTS, KILLED_EVERYWHERE = HERE / "small_parts.py", HERE / "killed_everywhere.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PART = 10


@pytest.fixture(scope="module")
def mixed(pictures, tmp_path_factory) -> Path:
    """The pictures, and two that are rejected: one while they are listed, one while they are decoded."""
    root = tmp_path_factory.mktemp("mixed") / "pictures"
    shutil.copytree(pictures, root)
    whole = (root / "class0" / "000.jpg").read_bytes()
    (root / "class1" / "020cut.jpg").write_bytes(whole[:700])
    (root / "class2" / "empty.png").touch()
    return root


@pytest.fixture(scope="module")
def unbroken(mixed, tmp_path_factory) -> dict[str, bytes]:
    """All files of a conversion by one process that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken") / "a.beton"
    convert(options(mixed, out))
    found = files(out)
    assert {name.removeprefix("a.beton") for name in found} == {
        "",
        *(f".{name}" for name in write.BESIDE if name != "skipped.jsonl"),  # nothing is left out
    }
    return found


def options(root: Path, out: Path, **how) -> write.BetonOptions:
    return write.BetonOptions(source="imagefolder", root=root, out=out, **{"workers": 0, **how})


def files(out: Path) -> dict[str, bytes]:
    """Every file at OUT and beside it, and in folders there, by name."""
    found = sorted(out.parent.glob(f"{out.name}*")) + sorted(out.parent.glob(f"{out.name}*/*"))
    return {str(p.relative_to(out.parent)): p.read_bytes() for p in found if p.is_file()}


def command(root: Path, out: Path, workers: int, moment: str = "never", *more) -> list[str]:
    """Of a process that runs dataprep/to_ffcv.py's main."""
    to_ffcv = ["--source", "imagefolder", "--root", root, "--out", out, "--workers", workers]
    return [str(c) for c in [SMALL_PARTS, PART, moment, *to_ffcv, "--allow-rejects", *more]]


def start(*args) -> subprocess.Popen:
    return subprocess.Popen(
        args, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*args) -> subprocess.CompletedProcess:
    return subprocess.run(args, env=ENV, capture_output=True, text=True, timeout=600)


# ---- killed ----


@pytest.mark.parametrize(
    ("moment", "workers", "again"),
    [
        ("part", 2, 1),
        pytest.param("between", 1, 3, marks=pytest.mark.soak),
        pytest.param("merge", 0, 2, marks=pytest.mark.soak),
        pytest.param("publish", 2, 0, marks=pytest.mark.soak),
    ],
)
def test_a_killed_conversion_goes_on_to_the_same_bytes(
    mixed, unbroken, tmp_path, moment, workers, again
):
    """Its orphaned workers are held still meanwhile: they must not be in the way of the second start."""
    out = tmp_path / "a.beton"
    killed = start(sys.executable, *command(mixed, out, workers, moment))
    assert killed.stdout.readline() == "reached\n", killed.communicate()
    orphans = children(killed.pid)
    assert len(orphans) >= (workers if moment in ("part", "between") else 0)
    for orphan in orphans:
        os.kill(orphan, signal.SIGSTOP)
    killed.kill()
    killed.wait(30)
    assert not out.exists()
    begun = time.monotonic()
    done = run(sys.executable, *command(mixed, out, again))
    assert done.returncode == 0, done.stderr
    for orphan in orphans:
        with contextlib.suppress(ProcessLookupError):  # one that was about to end
            os.kill(orphan, signal.SIGCONT)
    assert "stood in whole parts of an earlier run" in done.stdout
    assert files(out) == unbroken
    while any(alive(orphan) for orphan in orphans):
        assert time.monotonic() - begun < 30, "a worker outlives its parent"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


EVERYWHERE = {
    "beton": ["plain", "plain-over-old", "keep", "keep-over-old", "merge-kept"],
    "pack": ["plain", "over-old"],
}


@pytest.mark.parametrize(
    ("form", "scenario", "every"),
    [
        ("beton", "keep-over-old", 5),
        ("beton", "merge-kept", 5),
        ("pack", "over-old", 4),
        *(
            pytest.param(form, scenario, 1, marks=pytest.mark.soak)
            for form, scenarios in EVERYWHERE.items()
            for scenario in scenarios
        ),
    ],
)
def test_killed_before_any_change_to_the_disk_it_goes_on(pictures, tmp_path, form, scenario, every):
    """What stands meanwhile under the names of the result is whole: the old, the new, or nothing."""
    given = [pictures, tmp_path / "here", form, scenario, str(every)]
    done = run(sys.executable, KILLED_EVERYWHERE, *given)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20 // every


def test_two_conversions_do_not_share_parts(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("fastrot.disk.PATIENCE", 0.2)
    out = tmp_path / "a.beton"
    holder = start(sys.executable, *command(pictures, out, 0, "part"))
    assert holder.stdout.readline() == "reached\n"
    with pytest.raises(UsageError, match="another conversion writes into"):
        convert(options(pictures, out), part=PART)
    holder.kill()
    holder.communicate()
    assert convert(options(pictures, out), part=PART).resumed == PART


def test_parts_of_a_folder_without_a_plan_are_not_trusted(pictures, tmp_path):
    """They may be of other options: a removal that was broken off."""
    out = tmp_path / "a.beton"
    convert(options(pictures, out, keep_parts=True), part=PART)
    os.rename(f"{out}.set", f"{out}.parts")
    (tmp_path / "a.beton.parts" / "plan.json").unlink()
    (tmp_path / "a.beton.parts" / "notes.txt").touch()
    assert convert(options(pictures, out, quality=50), part=PART).resumed == 0
    assert [p.name for p in (tmp_path / "a.beton.parts").iterdir()] == ["notes.txt"]  # not ours


def test_parts_begun_by_an_earlier_version_are_gone_on_with(pictures, tmp_path):
    """Its plan may lack an option that is not in use."""
    out = tmp_path / "a.beton"
    convert(options(pictures, out, keep_parts=True), part=PART)
    os.rename(f"{out}.set", f"{out}.parts")
    plan = json.loads((tmp_path / "a.beton.parts" / "plan.json").read_bytes())
    plan.pop("max_side")
    (tmp_path / "a.beton.parts" / "plan.json").write_text(json.dumps(plan))
    assert convert(options(pictures, out), part=PART).resumed == 37


def test_a_part_of_other_options_or_of_none_is_made_anew(mixed, unbroken, tmp_path, monkeypatch):
    """As a rank that a killed launcher left behind may finish it, after --overwrite began other parts."""
    out, late = tmp_path / "a.beton", tmp_path / "late.beton"
    convert(options(mixed, late, quality=50, keep_parts=True), part=PART)
    with monkeypatch.context() as broken:
        broken.setattr(write, "merge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(options(mixed, out), part=PART)
    parts = tmp_path / "a.beton.parts"
    for name in ("0000000010.json", "0000000010.beton"):
        shutil.copy(tmp_path / "late.beton.set" / name, parts / name)
    facts = json.loads((parts / "0000000020.json").read_bytes())
    facts.pop("plan")  # of an earlier version
    (parts / "0000000020.json").write_text(json.dumps(facts))
    told = convert(options(mixed, out), part=PART)
    assert (told.converted, told.resumed) == (20, 18)
    assert files(out) == unbroken


def test_a_plan_that_another_process_removed_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(part_files, "begun_with", lambda folder: {})  # it was still there
    part_files.remove(_made(tmp_path / "a.beton.parts"))
    assert not [*tmp_path.iterdir()]


# ---- shared by several processes ----


class Threads(ranks.Ranks):
    """Ranks that are threads of this process."""

    def all_gather(self, value):
        values, barrier = TABLE
        values[self.rank] = value
        barrier.wait(30)
        found = [values[rank] for rank in range(self.world)]
        barrier.wait(30)
        return found


TABLE: tuple[dict, threading.Barrier]


def shared(world: int, given, part: int = PART) -> list:
    """What each rank's conversion gave or raised. `given(rank)`: its options."""
    global TABLE
    TABLE = ({}, threading.Barrier(world))
    results = [None] * world

    def work(rank: int) -> None:
        try:
            results[rank] = convert(given(rank), Threads(rank, world), part=part)
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, (UsageError, SystemExit)):
                TABLE[1].abort()

    threads = [threading.Thread(target=work, args=(r,), name=f"rank {r}") for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("world", "part"), [(2, 10), (5, 3), (4, 100)])
def test_ranks_share_the_parts(mixed, unbroken, tmp_path, monkeypatch, world, part):
    out, made = tmp_path / "a.beton", {}
    make = part_files.Part.make

    def noted(self, *args):
        made.setdefault(threading.current_thread().name, []).append(self.records.start // part)
        return make(self, *args)

    monkeypatch.setattr(part_files.Part, "make", noted)
    results = shared(world, lambda rank: options(mixed, out), part)
    assert files(out) == unbroken
    parts = -(-38 // part)
    wanted = {f"rank {r}": [*range(r, parts, world)] for r in range(min(world, parts))}
    assert made == wanted
    told = results[0]
    assert all(result == told for result in results[1:]) or all(
        (r.manifest["rows"], r.rejects) == (told.manifest["rows"], told.rejects) for r in results
    )
    assert (told.manifest["rows"], len(told.rejects), told.converted) == (37, 2, 38)


def test_ranks_go_on_from_whole_parts_and_keep_them(mixed, unbroken, tmp_path, monkeypatch):
    out = tmp_path / "a.beton"
    with monkeypatch.context() as broken:
        broken.setattr(write, "merge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(options(mixed, out), part=PART)
    for name in ("0000000010.json", "0000000020.beton"):
        (tmp_path / "a.beton.parts" / name).unlink()
    told = shared(2, lambda rank: options(mixed, out, keep_parts=True))[0]
    assert (told.converted, told.resumed) == (20, 18)
    assert shared(2, lambda rank: options(mixed, out, keep_parts=True))[0].already
    assert {*os.listdir(tmp_path)} == {"a.beton.set"}
    told = shared(3, lambda rank: options(mixed, out))[0]
    assert (told.converted, told.resumed) == (0, 38)
    assert files(out) == unbroken


def test_other_pictures_on_another_machine_are_refused_once(mixed, pictures, tmp_path):
    roots = (mixed, mixed, pictures)
    first, *others = shared(3, lambda rank: options(roots[rank], tmp_path / "a.beton"))
    assert isinstance(first, UsageError)
    assert "other pictures or labels for rank 2" in str(first)
    assert [(type(e), e.code) for e in others] == [(SystemExit, 2)] * 2  # in silence
    assert not [*tmp_path.iterdir()]


def test_what_rank_0_refuses_ends_all(mixed, tmp_path):
    out = tmp_path / "a.beton"
    convert(options(mixed, out))
    first, other = shared(2, lambda rank: options(mixed, out, quality=50))
    assert isinstance(first, UsageError)
    assert (type(other), other.code) == (SystemExit, 2)


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "SEEN_WITHIN", 0.2)
    ranks.await_shared(ranks.make_claim(tmp_path))
    with pytest.raises(UsageError, match="not the same folder for all ranks"):
        ranks.await_shared(tmp_path / "sign.of-another-machine")


def test_ranks_that_a_killed_launcher_left_stop_when_another_start_takes_over(mixed, tmp_path):
    """They write no part any more: it might be of other options."""
    work = tmp_path / "a.beton.parts"
    with part_files.parts_folder(_made(work), {"quality": 90}, False):
        ended = ranks.make_claim(work)
    assert not ended.exists()
    sign = ranks.make_claim(work)  # of a start that was killed
    with part_files.parts_folder(work, {"quality": 80}, True):
        asked = options(mixed, tmp_path / "a.beton")
        source, save = asked.open_source(), asked.writer().write_part
        parts = part_files.parts_of(work, 20, ".beton", {"quality": 80}, PART)
        spec = EncodeSpec(write.Coder())
        encoded = encode_all(spec, parts[0].chunks(source), 0)
        with pytest.raises(RunError, match="another start has taken over"):
            parts[0].make(results_of(parts[0], encoded, sign, lambda n: None), save)
        assert {p.name for p in work.iterdir()} == {"plan.json", "lock"}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.ddp
def test_torchrun_shares_a_conversion(mixed, unbroken, tmp_path):
    out = tmp_path / "a.beton"
    done = run(*TORCHRUN, "2", *command(mixed, out, 1))
    assert done.returncode == 0, done.stderr
    assert files(out) == unbroken
    assert done.stdout.count("37 written + 2 rejected + 0 left out = 39 files seen") == 1


@pytest.mark.soak
@pytest.mark.ddp
def test_a_rank_that_dies_ends_the_others_and_the_next_start_goes_on(mixed, unbroken, tmp_path):
    out = tmp_path / "a.beton"
    begun = time.monotonic()
    done = run(*TORCHRUN, "2", *command(mixed, out, 0, "die"))
    assert done.returncode != 0
    assert time.monotonic() - begun < 60
    assert not out.exists()
    done = run(sys.executable, *command(mixed, out, 2))
    assert done.returncode == 0, done.stderr
    assert "stood in whole parts" in done.stdout
    assert files(out) == unbroken


@pytest.mark.soak
@pytest.mark.ddp
def test_what_another_rank_met_is_told_before_that_it_has_ended(mixed, tmp_path):
    done = run(*TORCHRUN, "2", *command(mixed, tmp_path / "a.beton", 0, "full"))
    assert done.returncode != 0
    assert "fastrot: rank 1: " in done.stderr
    assert "File too large; nothing written before is harmed" in done.stderr
    assert "another process" not in done.stderr


@pytest.mark.soak
@pytest.mark.ddp
def test_ranks_without_torchrun_learn_that_one_has_died(mixed, tmp_path):
    """As under srun, which ends nobody. Two processes, found by the variables that torchrun sets."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, *command(mixed, tmp_path / "a.beton", 0, "die")],
            env=ENV
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
            | {"MASTER_PORT": str(port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    assert processes[1].wait(60) == -signal.SIGKILL
    _, said = processes[0].communicate(timeout=300)
    assert processes[0].returncode == 1
    assert "another process of this conversion has ended: run the same command again" in said
    assert "Traceback" not in said


# ---- a full disk ----


@pytest.fixture
def limited(request):
    """No file may grow beyond this many bytes while the function runs: what a full disk does, without one."""

    def under(most: int, do):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            return do()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return under


@pytest.fixture(scope="module")
def long_names(tmp_path_factory) -> Path:
    """Tiny pictures whose names take more room than they do."""
    root = tmp_path_factory.mktemp("long") / "class"
    root.mkdir()
    for i in range(40):
        Image.fromarray(photo(i, 2, 2)).save(root / f"{i:03d}{'x' * 200}.png")
    return root.parent


FULL = {  # which pictures, how large a file may be: more than what came before, less than what it stops
    "in-a-part": ("pictures", 9_000),
    "in-the-merge": ("pictures", 30_000),
    "in-what-lies-beside": ("long_names", 8_000),
}


@pytest.mark.parametrize("keep", [False, True], ids=["file", "set"])
@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_harms_nothing_old_and_it_goes_on(
    request, limited, tmp_path, where, keep, capsys
):
    root, most = request.getfixturevalue(FULL[where][0]), FULL[where][1]
    if keep and where == "in-the-merge":
        pytest.skip("a set is not merged")
    out, straight = tmp_path / "a" / "a.beton", tmp_path / "b" / "a.beton"
    how = {"encoding": "raw", "keep_parts": keep} if "beside" in where else {"keep_parts": keep}
    convert(options(root, out, quality=80, keep_parts=keep), part=PART)
    old = files(out)
    new = options(root, out, overwrite=True, **how)
    status = limited(
        most,
        lambda: entry.status(lambda: run_conversion(new, part=PART)),
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 1
    assert "make space, and the same command goes on" in said
    there = files(out)
    assert {name: there[name] for name in old} == old
    left = [p for p in (tmp_path / "a" / "a.beton.parts").iterdir() if p.name.startswith("new")]
    assert not left, "it takes the space that is wanted"
    told = convert(new, part=PART)
    assert (told.resumed > 0) == (where != "in-a-part")
    convert(options(root, straight, **how), part=PART)
    assert files(out) == files(straight)


def test_a_small_disk_runs_full(mixed, unbroken, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        out = disk / "a.beton"
        done = run(sys.executable, *command(mixed, out, 1))
        assert done.returncode == 1
        assert "No space left on device" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        done = run(sys.executable, *command(mixed, out, 2))
        assert done.returncode == 0, done.stderr
        assert files(out) == unbroken
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# ---- the seal of the .json ----


def test_a_changed_byte_of_the_json_is_found(mixed, unbroken):
    from fastrot.data.manifest import unsealed

    document = unbroken["a.beton.json"]
    facts = unsealed(document)
    assert facts["rows"] == 37
    assert "crc" not in facts
    draw = np.random.default_rng(0)
    places = [*range(len(document) - 40, len(document)), *draw.integers(0, len(document), 300)]
    for at in places:
        changed = bytearray(document)
        changed[at] ^= int(draw.integers(1, 256))
        with pytest.raises(ValueError):  # noqa: PT011 (of json's or ours)
            unsealed(bytes(changed))
    with pytest.raises(ValueError, match="checksum"):
        unsealed(json.dumps(json.loads(document) | {"mean": [0.5, 0.5, 0.5]}).encode())


def test_a_json_of_before_the_seal_is_read(unbroken):
    from fastrot.data.manifest import unsealed

    facts = json.loads(unbroken["a.beton.json"])
    facts.pop("crc")
    assert unsealed(json.dumps(facts, indent=1).encode()) == facts
