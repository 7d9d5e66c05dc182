"""The commands: what each says of itself, of its knobs, and of a word that it does not know."""

import getpass
import importlib.util
import io
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

import fastrot
from fastrot import __main__ as command
from fastrot import entry
from fastrot.presets import PRESETS

ROOT = Path(__file__).parents[1]


def fastrot_says(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    """Status, stdout and stderr of `fastrot WORDS`."""
    monkeypatch.setattr(sys, "argv", ["fastrot", *words])
    with pytest.raises(SystemExit) as end:
        command.main()
    return end.value.code, *capsys.readouterr()


HELPED = [
    *([name] for name in command.COMMANDS if name not in ("train", "evaluate", "draw")),
    ["draw", "compare"],
    *(
        ["draw", "run", name]
        for name in importlib.import_module("fastrot.draw").KINDS
        if name != "compare"
    ),
    *(["train", preset] for preset in PRESETS),
    *(
        ["evaluate", "run", name]
        for name in importlib.import_module("fastrot.evaluate").EVALUATIONS
    ),
]


def knobs_of(text: str) -> dict[str, str]:
    """What --help says behind each knob's name and type or choices."""
    said, name, at = {}, "", 0
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if found := re.match(r"\s*((?:--[a-z]|DATA).*?)(?:$|  +)(.*)", line):
            name, at = found[1], indent
            said[name] = found[2].strip()
        elif name and indent > at:
            said[name] += f" {line.strip()}"
        else:
            name = ""
    return said


@pytest.mark.parametrize("words", HELPED, ids=" ".join)
def test_every_knob_has_help(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")  # one column
    code, said, _ = fastrot_says(monkeypatch, capsys, *words, "--help")
    assert code == 0
    assert said.startswith(f"usage: fastrot {' '.join(words)} ")
    assert "None" not in said
    knobs = knobs_of(said)
    assert len(knobs) >= {"export": 4, "draw": 1}.get(words[0], 5)
    for knob, text in knobs.items():
        words = re.sub(r"\((default: .*|required)\)$", "", text)
        assert re.search(r"[a-z]{3}", words), f"{knob} says nothing of itself"


def test_help_shows_choices_and_true_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    knobs = knobs_of(fastrot_says(monkeypatch, capsys, "train", "demo", "--help")[1])
    assert knobs["--epochs INT"] == "passes over the data; default: the schedule's"
    assert knobs["--order {full,blocks}"].endswith("larger than memory (default: full)")
    assert knobs["--batch INT"].endswith("each before its rotations (default: 32)")


def test_none_takes_a_knob_back():
    from fastrot import train

    assert train.command_line(["demo", "--schedule.steps", "None"]).schedule.steps is None
    assert train.command_line(["demo"]).schedule.steps == 1120
    assert train.command_line(["demo", "--epochs", "3"]).epochs == 3


def test_a_wrong_value_is_refused_in_the_words_of_its_type(monkeypatch, capsys):
    code, _, said = fastrot_says(monkeypatch, capsys, "train", "demo", "--epochs", "x")
    assert code == 2
    assert "Error parsing --epochs: invalid literal for int()" in said
    assert "NoneType" not in said


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_fastrot_alone_shows_each_command_with_an_example(words, monkeypatch, capsys):
    code, said, _ = fastrot_says(monkeypatch, capsys, *words)
    assert code == 0
    for name, (does, example) in command.COMMANDS.items():
        assert f"{name:<8}  {does}\n" in said
        assert f"  fastrot {name} {example}\n" in said


def test_the_version(monkeypatch, capsys):
    said = fastrot_says(monkeypatch, capsys, "--version")
    assert said == (0, f"fastrot {fastrot.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["convrt"], "there is no command 'convrt': did you mean convert?"),
        (["--data", "x"], "there is no command '--data': choose one of convert, look, train"),
        (["train"], "fastrot train wants a preset as its first word, such as fastrot train demo"),
        (["train", "--data", "x", "demo"], "fastrot train wants a preset as its first word"),
        (["train", "dmeo"], "there is no preset 'dmeo': did you mean demo?"),
        (["evaluate", "run", "rotaton"], "no evaluation 'rotaton': did you mean rotation?"),
        (["doctor"], "fastrot doctor wants data: name a .beton file"),
        (["doctor", "synthetic", "--preset", "dem"], "--preset got 'dem': did you mean demo?"),
    ],
)
def test_wrong_use_is_one_sentence(words, sentence, monkeypatch, capsys):
    code, out, said = fastrot_says(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert sentence in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "suffix"), [("convert", "x.beton"), ("pack", "x.pack"), ("shards", "shards")]
)
def test_pictures_are_prepared_and_looked_at(name, suffix, pictures, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / suffix)
    given = ("--source", "imagefolder", "--root", str(pictures), "--out", out, "--workers", "0")
    assert fastrot_says(monkeypatch, capsys, name, *given)[0] == 0
    code, said, _ = fastrot_says(monkeypatch, capsys, "look", out, "--verify", "--size", "32")
    assert code == 0
    assert "37 pictures" in said
    assert "all whole" in said


def test_the_package_is_found_from_the_folder_above_an_editable_clone(tmp_path):
    """Where `fastrot` is the clone's folder, which Python takes for a package without __init__.py."""
    pytest.importorskip(
        "setuptools", "68"
    )  # as pyproject.toml wants it; Python 3.10 brings an older one
    clone = tmp_path / "fastrot"
    (clone / "fastrot" / "native").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "fastrot/__init__.py"):
        shutil.copy(ROOT / name, clone / name)
    made = tmp_path / "site"
    build = f"from setuptools import build_meta; build_meta.build_editable({str(made)!r})"
    env = {**os.environ, "CC": "false", "CXX": "false"}  # without the extension: that is quick
    made.mkdir()
    subprocess.run(
        [sys.executable, "-c", build], cwd=clone, env=env, check=True, capture_output=True
    )
    zipfile.ZipFile(next(made.glob("*.whl"))).extractall(made)
    env.pop("PYTHONPATH", None)
    code = f"import site; site.addsitedir({str(made)!r}); import fastrot; print(fastrot.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=env, capture_output=True
    )
    assert done.stdout.decode().strip() == str(clone / "fastrot" / "__init__.py"), done.stderr


# ---- where a command starts ----


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("torch", ["train", "demo", "--data", "x"]),
        ("tyro", ["train", "demo", "--data", "x"]),
        ("tyro", ["doctor", "synthetic"]),
        ("tyro", ["convert"]),
        ("tyro", ["look", "x"]),
    ],
    ids=str,
)
def test_a_missing_package_is_one_sentence(package, words, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fastrot.training.session", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, said = fastrot_says(monkeypatch, capsys, *words)
    assert code == 1
    assert said.startswith(f"fastrot: {package} is not installed for {sys.executable}: ")
    assert said.endswith(f"{sys.executable} -m pip install -e {ROOT}\n")
    assert said.count("\n") == 1


def test_a_package_that_fails_to_load_is_named_and_our_own_is_a_mistake():
    said = entry.describe(ImportError("libGL.so.1: cannot open", name="cv2"))
    assert said.startswith(f"cv2 (libGL.so.1: cannot open) fails in {sys.executable}: ")
    with pytest.raises(ImportError):
        entry.describe(ImportError("cannot import name 'x'", name="fastrot.core"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_terminal_will_do(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, write_through=True))
    assert entry.status(lambda: print("90° ██ ─ 日 \udcff")) == 0
    drawn = {"ascii": "90 degrees ## -", "utf-8": "90° ██ ─"}.get(encoding, "90° ## -")
    japanese = "日" if encoding == "utf-8" else r"\u65e5"
    assert raw.getvalue().decode(encoding) == rf"{drawn} {japanese} \udcff" + "\n"


@pytest.mark.parametrize(
    ("told", "spins"),
    [
        ({}, str(entry.SPINS)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
    ids=["untold", "spins", "policy"],
)
def test_threads_of_openmp_spin_briefly_unless_the_user_says_how(told, spins):
    torch = Path(importlib.util.find_spec("torch").origin).parent
    openmp = [*torch.glob("lib/libgomp*"), *torch.parent.glob("torch.libs/libgomp*")]
    if not openmp:
        pytest.skip("this torch has another OpenMP than libgomp, or the system's")
    untold = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    loads = f"import ctypes; from fastrot import entry; entry.status(lambda: ctypes.CDLL({str(openmp[0])!r}) and 0)"
    done = subprocess.run(
        [sys.executable, "-c", loads],
        capture_output=True,
        text=True,
        env=untold | {"OMP_DISPLAY_ENV": "VERBOSE"} | told,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_odd_names_are_printable_wherever_file_names_are_ascii(monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    assert entry.printable("é\udcff\n") == r"é\xff\n"


def test_a_user_without_account_and_home_gets_caches_and_no_folder_named_tilde(
    tmp_path, monkeypatch
):
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["no such user"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    entry.status(lambda: 0)
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert Path(os.path.expanduser("~/x")).parent.parent == tmp_path
    assert Path(os.environ["MPLCONFIGDIR"]).is_dir()
    assert os.environ["XDG_CACHE_HOME"] == os.environ["HOME"]


def test_nobody_reading_is_no_error(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(write, "w"))  # noqa: SIM115
    assert entry.status(lambda: print("x" * 100_000)) == 128 + 13
    assert capsys.readouterr().err == ""
